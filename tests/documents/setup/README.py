# Around the three lines, and two trained adapters for the commands.
from tests.continual.tiny import peft_model
from tests.documents.script import names

globals().update(names())
for name in ("agnews", "yahoo"):
    peft_model(init_lora_weights=False).save_pretrained(f"adapters/{name}")
