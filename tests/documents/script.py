"""What the script of the three lines has around them: a model, tasks, the Trainer's arguments, an evaluation."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.continual.tiny import base_model, batch


def names() -> dict[str, Any]:
    """The names that the script uses and does not define."""
    rows = {name: batch(seed) for seed, name in enumerate(("reviews", "news"))}
    return {
        "LoraConfig": LoraConfig,
        "Trainer": Trainer,
        "args": TrainingArguments(
            "trainer", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        "base": base_model(),
        "evaluate": evaluate,
        "get_peft_model": get_peft_model,
        "tasks": {name: [{"input_ids": x, "labels": x} for x in row["input_ids"]] for name, row in rows.items()},
    }


def evaluate(model: nn.Module) -> float:
    return model(**batch(9)).loss.item()
