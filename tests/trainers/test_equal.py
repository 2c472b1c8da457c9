"""Trainer and SFTTrainer on the fused layer, inside a task: the losses and the adapter that plain PEFT gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mbf
from tests.peft.helpers import error, took

from .tiny import LAYERS, TRAINERS, checkpointing, factors, logged, make, peft_model, rows, twins

REENTRANT = pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["keep", "reentrant", "non-reentrant"])


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("accumulation", [1, 2])
@REENTRANT
def test_trains_as_plain_peft(kind: str, use_reentrant: bool | None, accumulation: int, tmp_path: Path) -> None:
    model, plain = twins()
    begin = factors(model)
    changes = checkpointing(use_reentrant) | {"gradient_accumulation_steps": accumulation}
    stock = make(kind, plain, tmp_path, **changes)
    stock.train()

    mbf.fuse(model, strict=True)
    learner = mbf.ContinualLora(model, learnt=False)
    trainer = make(kind, model, tmp_path, **changes)
    forwards = 4 * accumulation * (1 if use_reentrant is None else 2)  # in backward again
    with took("fast", LAYERS * forwards), learner.task("one"):
        trainer.train()
    assert [(record.name, record.steps) for record in learner.history] == [("one", 4)]
    torch.testing.assert_close(logged(trainer), logged(stock), rtol=1e-5, atol=1e-5)
    assert len(logged(trainer)) == 4
    torch.testing.assert_close(factors(model), factors(plain), rtol=1e-4, atol=1e-5)
    for name, value in factors(model).items():
        assert error(value, begin[name]) > 1e-3, f"{name} was not trained"


@pytest.mark.parametrize("kind", TRAINERS)
@REENTRANT
def test_under_autocast_no_worse_than_plain_peft(kind: str, use_reentrant: bool | None, tmp_path: Path) -> None:
    """bf16 autocast: at most twice as far from the fp32 run as PEFT's is, and two per cent of a step."""
    (exact, plain), model = twins(), peft_model()
    begin = factors(model)
    changes = checkpointing(use_reentrant) | {"gradient_accumulation_steps": 2}
    make(kind, exact, tmp_path, **changes).train()
    stock = make(kind, plain, tmp_path, bf16=True, **changes)
    stock.train()
    mbf.fuse(model, strict=True)
    trainer = make(kind, model, tmp_path, bf16=True, **changes)
    with took("fast"), mbf.ContinualLora(model, learnt=False).task("one"):
        trainer.train()
    torch.testing.assert_close(logged(trainer), logged(stock), rtol=5e-3, atol=0)
    ours, theirs, wanted = ({n: v - begin[n] for n, v in factors(m).items()} for m in (model, plain, exact))
    for name, step in wanted.items():
        assert error(ours[name], step) <= 2 * error(theirs[name], step) + 0.02, name
    assert any(not torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_checkpointing_sees_the_same_masks_again(kind: str, memory: Any, tmp_path: Path) -> None:
    """With dropout the gradients with checkpointing are those without; and something is dropped."""
    found = {}
    for p, use_reentrant in ((0.3, None), (0.3, True), (0.3, False), (0.0, None)):
        model = peft_model(lora_dropout=p)
        mbf.fuse(model, strict=True, memory=memory)
        trainer = make(kind, model, tmp_path, gradient_accumulation_steps=2, **checkpointing(use_reentrant))
        with took("fast"):
            trainer.train()
        found[p, use_reentrant] = factors(model) | {"losses": logged(trainer)}
    for use_reentrant in (True, False):
        torch.testing.assert_close(found[0.3, use_reentrant], found[0.3, None], rtol=1e-5, atol=1e-6)
    assert (found[0.3, None]["losses"] - found[0.0, None]["losses"]).abs().min() > 1e-4


@pytest.mark.parametrize("kind", TRAINERS)
def test_three_tasks_fused_are_three_tasks_of_plain_layers(kind: str, tmp_path: Path) -> None:
    models = twins()
    mbf.fuse(models[0], strict=True)
    for model in models:
        learner = mbf.ContinualLora(model, learnt=False)
        for n, use_reentrant in enumerate((None, True, False)):
            trainer = make(kind, model, tmp_path, rows(n), **checkpointing(use_reentrant))
            with learner.task(f"task {n}"):
                trainer.train()
        assert [record.steps for record in learner.history] == [4, 4, 4]
    fused, plain = map(factors, models)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", TRAINERS)
def test_adamw_clips_and_schedules_as_with_plain_peft(kind: str, tmp_path: Path) -> None:
    models = twins()
    mbf.fuse(models[0], strict=True)
    found = []
    for model in models:
        changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5}
        trainer = make(kind, model, tmp_path, max_steps=8, **changes)
        trainer.train()
        found.append({"losses": logged(trainer), "norms": logged(trainer, "grad_norm")})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert found[0]["norms"].min() > 0.5


@pytest.mark.parametrize("fused", [False, True])
def test_inputs_that_need_no_gradient(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing makes the frozen embeddings' output require a gradient, reentrant checkpointing loses the graph,
    with PEFT's layers and with ours; without reentrance both train."""
    monkeypatch.setattr(PreTrainedModel, "enable_input_require_grads", lambda self: None)
    model = peft_model()
    if fused:
        mbf.fuse(model, strict=True)
    with pytest.raises(RuntimeError, match="does not require grad"), pytest.warns(UserWarning, match="requires_grad"):
        make("Trainer", model, tmp_path, **checkpointing(True)).train()
    begin = factors(model)
    make("Trainer", model, tmp_path, **checkpointing(False)).train()
    assert all(error(value, begin[name]) > 1e-3 for name, value in factors(model).items())
