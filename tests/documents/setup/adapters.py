# A model, and three trained adapters.
from tests.continual.tiny import base_model, peft_model

base = base_model()
for name in "ABC":
    peft_model(init_lora_weights=False).save_pretrained(name)
