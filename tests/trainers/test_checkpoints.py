"""Saving, resuming, choosing the best and evaluating with trainers, inside tasks and between them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file

import mbf
from mbf.run.model import tiny_random_llama
from tests.peft.helpers import took

from .tiny import LAYERS, TRAINERS, factors, logged, make, peft_model, rows


def fused_learner(dropout: float = 0.2, **options: Any) -> mbf.ContinualLora:
    model = peft_model(lora_dropout=dropout)
    mbf.fuse(model, strict=True)
    return mbf.ContinualLora(model, learnt=False, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 19)[None]).logits


def adapter_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_task_ends_as_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    """The second task of SLAO, Adam, dropout: killed after step 3 of 6 and gone on with in a new model."""
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    learner = fused_learner()
    with learner.task("one"):
        make(kind, learner.model, tmp_path / "one").train()
    learner.save(tmp_path / "learner")
    with learner.task("two"):
        whole = make(kind, learner.model, tmp_path / "two", rows(1), **changes)
        whole.train()
        assert logged(whole).shape == (6,)

    resumed = mbf.ContinualLora.load(tiny_random_llama()[0], tmp_path / "learner")
    mbf.fuse(resumed.model, strict=True)
    with resumed.task("two"):
        resumed.continue_task(resumed.method.state_dict(), steps=3)
        trainer = make(kind, resumed.model, tmp_path / "again", rows(1), **changes)
        with took("fast", 3 * LAYERS):
            trainer.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert [(record.name, record.steps) for record in resumed.history] == [("one", 4), ("two", 6)]
    torch.testing.assert_close(logged(trainer)[-3:], logged(whole)[-3:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factors(resumed.model), factors(learner.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_best_checkpoint_is_what_is_merged(kind: str, tmp_path: Path) -> None:
    """Asked for the largest loss, so that the best is the first and not what training ends with."""
    learner = fused_learner()
    with learner.task("one"):
        make(kind, learner.model, tmp_path / "one").train()
    one = factors(learner.model)
    with learner.task("two"):
        trainer = make(
            kind,
            learner.model,
            tmp_path / "two",
            rows(1),
            eval_dataset=rows(1),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        )
        trainer.train()
        best = adapter_in(tmp_path / "two" / "checkpoint-1")
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
        torch.testing.assert_close(factors(learner.model), best, rtol=0, atol=0)
        last = adapter_in(tmp_path / "two" / "checkpoint-4")
        assert any(not torch.equal(last[name], best[name]) for name in best)
    for name, value in factors(learner.model).items():
        weight = 2**-0.5 if "lora_B" in name else 1.0
        torch.testing.assert_close(value, one[name] + weight * (best[name] - one[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_inside_a_task_changes_nothing(kind: str, tmp_path: Path) -> None:
    """No step is counted, no gradient left: the adapter is that of a task without evaluation. With dropout it is not,
    nor is PEFT's: the loader of the test rows draws from the generator of the masks."""
    found = []
    for changes in ({}, {"eval_dataset": rows(2), "eval_strategy": "steps", "eval_steps": 1}):
        learner = fused_learner(dropout=0.0)
        with learner.task("one"):
            trainer = make(kind, learner.model, tmp_path, **changes)
            trainer.train()
        assert learner.history[0].steps == 4
        assert len(logged(trainer, "eval_loss")) == (4 if changes else 0)
        found.append(factors(learner.model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["slao", "inclora"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_between_tasks_is_of_the_merged_lora(kind: str, method: str, tmp_path: Path) -> None:
    """Also with the trainer that trained the task, and what it saves then is what it evaluated."""
    learner = fused_learner(method=method)
    for n in (1, 2):
        trainer = make(kind, learner.model, tmp_path / str(n), rows(n), eval_dataset=rows(3))
        with learner.task(f"task {n}"):
            trainer.train()
        before = factors(learner.model)
        with took("fast"):
            loss = trainer.evaluate()["eval_loss"]
        torch.testing.assert_close(factors(learner.model), before, rtol=0, atol=0)
        trainer.save_model(str(tmp_path / "saved"))
        stock = PeftModel.from_pretrained(tiny_random_llama()[0], str(tmp_path / "saved"))
        assert make(kind, stock, tmp_path, eval_dataset=rows(3)).evaluate()["eval_loss"] == pytest.approx(
            loss, abs=1e-4
        )
        torch.testing.assert_close(logits(stock), logits(learner.model), rtol=1e-4, atol=1e-4)
        assert {type(m) for m in stock.modules() if isinstance(m, Linear)} == {Linear}
    assert [record.steps for record in learner.history] == [4, 4]


def test_a_task_whose_training_raises_leaves_the_merged_lora(tmp_path: Path) -> None:
    learner = fused_learner()
    with learner.task("one"):
        make("Trainer", learner.model, tmp_path).train()
    before = factors(learner.model)
    broken = make("Trainer", learner.model, tmp_path, rows(1))
    steps = []

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return type(broken).training_step(broken, *args, **kwargs)

    broken.training_step = step
    with pytest.raises(KeyboardInterrupt), learner.task("two"):
        broken.train()
    torch.testing.assert_close(factors(learner.model), before, rtol=0, atol=0)
    assert [record.name for record in learner.history] == ["one"]


WITHOUT_MBF = textwrap.dedent(
    """
    import sys
    sys.modules["mbf"] = None
    import torch
    from pathlib import Path
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base, checkpoint, out = map(Path, sys.argv[1:])
    for file in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        torch.load(checkpoint / file, weights_only=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(3, 19)[None]).logits, out)
    """
)


def test_a_trainers_checkpoint_needs_no_mbf(tmp_path: Path) -> None:
    """A process in which mbf cannot be imported reads all files of it, and computes the same."""
    tiny_random_llama()[0].save_pretrained(tmp_path / "base")
    learner = fused_learner()
    with learner.task("one"):
        make("Trainer", learner.model, tmp_path, save_strategy="steps", save_steps=4).train()
    paths = [str(tmp_path / part) for part in ("base", "checkpoint-4", "out")]
    subprocess.run([sys.executable, "-c", WITHOUT_MBF, *paths], check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "out"), logits(learner.model), rtol=1e-4, atol=1e-4)
