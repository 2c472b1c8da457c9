# The folders that the page says are there: a stream of three tasks, two trained adapters.
from pathlib import Path

from tests.continual.tiny import peft_model
from tests.run.tiny import write_stream

write_stream(Path("data"))
for name in ("agnews", "yahoo"):
    peft_model(init_lora_weights=False).save_pretrained(f"adapters/{name}")
