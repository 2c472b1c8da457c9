# A model, three trained adapters of one rank, and one of another.
from tests.continual.tiny import base_model, peft_model

base = base_model()
for name in "ABC":
    peft_model(init_lora_weights=False).save_pretrained(name)
peft_model(r=6, init_lora_weights=False).save_pretrained("D")
