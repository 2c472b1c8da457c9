# What the script of the three lines and the commands have around them: a model, tasks, arguments, adapters.
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.continual.tiny import base_model, batch, peft_model

base = base_model()
tasks = {name: [{k: v[0] for k, v in batch(seed, rows=1).items()} for _ in range(4)] for seed, name in enumerate("ab")}
args = TrainingArguments("trainer", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
evaluated = []


def evaluate(model: torch.nn.Module) -> None:
    evaluated.append(model(**batch(9)).loss.item())


for name in ("agnews", "yahoo"):
    peft_model().save_pretrained(str(Path("adapters", name)))
