"""Same seed, same bits: for any number of threads, with activations stored or computed again, across a save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mbf
from mbf.continual import ContinualLora

VOCABULARY, ROWS, LENGTH, STEPS, TASKS = 97, 4, 80, 3, 3  # rows times length: enough for several threads


@pytest.fixture(autouse=True)
def threads_as_before():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def make_model() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=5, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def batches(task: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(task)
    ids = torch.randint(VOCABULARY, (STEPS, ROWS, LENGTH), generator=draw)
    return [{"input_ids": one, "labels": one} for one in ids]


def learn(
    seed: int = 0,
    prepare: Callable[[PeftModel], object] = lambda model: None,
    between: Callable[[ContinualLora], ContinualLora] = lambda learner: learner,
) -> dict[str, Tensor]:
    """What the learner and its method hold after all tasks; ``seed`` is that of starts and dropout."""
    model = make_model()
    prepare(model)
    learner = ContinualLora(model, "slao")
    for task in range(1, TASKS + 1):
        torch.manual_seed(100 * seed + task)
        with learner.task(f"task {task}"):
            learner.model.train()
            optimizer = torch.optim.AdamW([p for p in learner.model.parameters() if p.requires_grad], lr=0.01)
            for batch in batches(task):
                learner.model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        learner = between(learner)
    found = {
        f"{layer.name}.{f}": t.detach().clone()
        for layer in learner.layers
        for f, t in zip("AB", layer.values(), strict=True)
    }
    return found | {f"state.{name}": tensor.clone() for name, tensor in learner.method.state_dict().items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """On one thread."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    found = learn()
    torch.set_num_threads(count)
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    apart = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not apart, f"{len(apart)} of {len(one)} tensors differ, the first {apart[0]}"
    assert any(tensor.count_nonzero() for name, tensor in one.items() if name.endswith(".B"))


def test_another_seed_gives_other_bits(alone) -> None:
    """What is compared here depends on the random numbers."""
    other = learn(seed=1)
    assert all(not torch.equal(tensor, other[name]) for name, tensor in alone.items() if name.endswith(".B"))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads(alone, threads: int) -> None:
    torch.set_num_threads(threads)
    assert_same_bits(alone, learn())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_activations_computed_again(alone, use_reentrant: bool, threads: int) -> None:
    def prepare(model: PeftModel) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    torch.set_num_threads(threads)
    assert_same_bits(alone, learn(prepare=prepare))


def test_low_memory_on_any_number_of_threads() -> None:
    """Its MLP is computed in another order than layer by layer, so the bits are its own."""
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(learn(prepare=lambda model: mbf.fuse(model, memory="low")))
    assert_same_bits(*found)


def test_saved_and_loaded_after_every_task(alone, tmp_path: Path) -> None:
    def between(learner: ContinualLora) -> ContinualLora:
        learner.save(tmp_path / "state")
        return ContinualLora.load(make_model(), tmp_path / "state")

    assert_same_bits(alone, learn(between=between))
