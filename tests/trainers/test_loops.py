"""A loop of one's own with accelerate, and trainers that compile the model or switch its adapter off."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq
from trl import DPOConfig, DPOTrainer

import mbf
from mbf.run.model import tiny_random_llama
from tests.peft.helpers import error, took

from .tiny import LAYERS, checkpointing, factors, logged, make, peft_model, rows, settings, twins


def accelerated(
    model: Any, precision: str, learner: mbf.ContinualLora | None, draw: int = 0, lr: float = 0.1
) -> list[float]:
    """Two tasks of two optimiser steps of two micro-batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=2)
    collator, losses = DataCollatorForSeq2Seq(tiny_random_llama()[1]), []
    model = accelerator.prepare(model)
    for n in (1, 2):
        if learner is not None:
            learner.begin_task(f"task {n}")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        optimizer, loader = accelerator.prepare(optimizer, DataLoader(rows(n + 100 * draw), 2, collate_fn=collator))
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if learner is not None:
            learner.end_task()
    return losses


# What bf16 leaves of one small factor's step is a matter of luck, and the more so the longer the steps, so its errors
# are pooled over draws of adapter and data.
@pytest.mark.parametrize(("precision", "draws", "lr"), [("no", 1, 0.1), ("bf16", 6, 0.01)])
def test_accelerate(precision: str, draws: int, lr: float) -> None:
    """Plain sequential fine-tuning by PEFT alone, and by the learner's method of that name on the fused layer."""
    mine, theirs = defaultdict(list), defaultdict(list)
    for draw in range(draws):
        exact, plain, model = (peft_model(3 + draw) for _ in range(3))
        begin = factors(exact)
        accelerated(exact, "no", None, draw, lr)
        expected = accelerated(plain, precision, None, draw, lr)
        mbf.fuse(model, strict=True)
        learner = mbf.ContinualLora(model, "seqlora", learnt=False)
        with took("fast", 8 * LAYERS):
            losses = accelerated(model, precision, learner, draw, lr)
        assert [record.steps for record in learner.history] == [2, 2]
        assert losses == pytest.approx(expected, rel=1e-5 if precision == "no" else 5e-3)
        ours, peft_s, wanted = ({n: v - begin[n] for n, v in factors(one).items()} for one in (model, plain, exact))
        for name, step in wanted.items():
            mine[name].append(error(ours[name], step))
            theirs[name].append(error(peft_s[name], step))
    for name, errors in mine.items():
        off, allowed = (math.sqrt(sum(e * e for e in found) / draws) for found in (errors, theirs[name]))
        assert off <= 2 * allowed + (1e-4 if precision == "no" else 0.02), name


def test_a_trainer_that_compiles_the_model(tmp_path: Path) -> None:
    """Two tasks of one learner, a trainer each, as in eager mode."""
    eager, compiled = (
        mbf.ContinualLora(model, learnt=False) for model in twins(target_modules=["q_proj", "down_proj"])
    )
    for learner, changes in ((eager, {}), (compiled, {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        mbf.fuse(learner.model, strict=True)
        torch._dynamo.reset()
        for n in range(2):
            trainer = make("Trainer", learner.model, tmp_path, rows(n), max_steps=2, **changes)
            with learner.task(f"task {n}"):
                trainer.train()
    torch.testing.assert_close(factors(compiled.model), factors(eager.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["keep", "reentrant", "non-reentrant"])
def test_dpo_switches_to_a_reference_adapter_and_back(use_reentrant: bool | None, tmp_path: Path) -> None:
    """TRL's DPOTrainer adds a copy of the adapter as reference, after ``fuse``, and activates one or the other."""
    data = Dataset.from_dict(
        {"prompt": [f"say {n}" for n in range(8)], "chosen": [" yes"] * 8, "rejected": [f" no {n}" for n in range(8)]}
    )
    models, found = twins(), []
    mbf.fuse(models[0], strict=True)
    for model in models:
        arguments = DPOConfig(**settings(tmp_path, **checkpointing(use_reentrant)))
        trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tiny_random_llama()[1])
        with took("fast") if model is models[0] else nullcontext():
            trainer.train()
        assert [*model.peft_config] == ["default", "ref"]
        found.append(factors(model) | {"losses": logged(trainer), "margins": logged(trainer, "rewards/margins")})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0]["margins"][1:].min() > 1e-3
