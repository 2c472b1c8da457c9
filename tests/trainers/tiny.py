"""A tiny Llama with a random adapter, rows of several lengths, and both trainers with settings that take seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mbf.run.model import tiny_random_llama
from tests.peft.helpers import TARGETS, randomise

TRAINERS = ["Trainer", "SFTTrainer"]
LAYERS = 14
"""LoRA layers of the model."""


def peft_model(seed: int = 3, **options: Any) -> Any:
    """The same one on every call with the same seed."""
    base, _ = tiny_random_llama()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))
    randomise(model)
    return model


def twins(**options: Any) -> tuple[Any, Any]:
    model = peft_model(**options)
    return model, copy.deepcopy(model)


def rows(seed: int = 0, count: int = 8) -> Dataset:
    """Token ids between 3 and 258, of 5 to 12 tokens; the labels leave the first two out."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 13, (count,), generator=draw).tolist()
    ids = [torch.randint(3, 259, (length,), generator=draw).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """SGD keeps the difference between two runs as small as it is; Adam's quotient makes noise as large as a step."""
    return {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    } | changes


def checkpointing(use_reentrant: bool | None) -> dict[str, Any]:
    """Settings for it: no checkpointing for None."""
    if use_reentrant is None:
        return {}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


def make(kind: str, model: Any, output: Path, data: Dataset | None = None, **changes: Any) -> Any:
    """A trainer of this kind for the model; ``changes`` are settings, and ``eval_dataset``."""
    _, tokenizer = tiny_random_llama()
    data, tests = rows() if data is None else data, changes.pop("eval_dataset", None)
    if kind == "SFTTrainer":
        arguments = SFTConfig(**settings(output, **changes))
        trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=tests, processing_class=tokenizer)
    else:
        arguments = TrainingArguments(**settings(output, **changes))
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=tests, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: Any, key: str = "loss") -> Tensor:
    """What the trainer logged under ``key``, in the order of the steps."""
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def factors(model: Any) -> dict[str, Tensor]:
    """A and B of every layer, copied."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
