"""A learner on several processes: the same LoRA on each, the same as on one, replicated (DDP) and in parts (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mbf.continual import ContinualLora, TaskError
from mbf.continual.replicas import Replicas
from mbf.peft import calls, fuse
from tests.continual.tiny import base_model, batch, logits, peft_model
from tests.processes import together

TASKS = ("first", "second", "third")


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    return model


def prepared(model: nn.Module, how: str) -> nn.Module:
    return DistributedDataParallel(model) if how == "ddp" else model


def train(model: nn.Module, seed: int, steps: int = 3) -> None:
    """Each process takes its rows of the global batch of four; gradients are averages."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(steps):
        ids = batch(100 * seed + step)["input_ids"][rank::size]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def model_for(how: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = peft_model(r=3)
    with torch.no_grad():  # B of a fresh adapter is zero, and A is random: apart on purpose
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape) / 6)
    fuse(model)
    return sharded(model) if how == "fsdp" else model


def learn(how: str, method: str, options: dict[str, Any], out: Path | None = None) -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = model_for(how, seed=rank if how == "ddp" else 0)
    torch.manual_seed(10 + rank)  # every process draws its own numbers
    learner = ContinualLora(model, method, **options)
    starts = []
    before = calls.copy()
    for n, task in enumerate(TASKS, 1):
        learner.begin_task(task)
        starts.append([t.clone() for t in learner.method.current.A])
        train(prepared(model, how), n)
        learner.end_task()
    assert calls["fast"] > before["fast"] and calls["slow"] == before["slow"]
    if out is not None:
        learner.save(out)
    factors = learner.method.current.clone()
    return {
        "starts": starts,
        "A": factors.A,
        "B": factors.B,
        "state": [t.clone() for t in learner.method.state_tensors()],
        "logits": logits(model),
        "steps": [record.steps for record in learner.history],
        "bytes": learner.memory_bytes(),
    }


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    else:
        assert left == right


METHODS = [
    ("slao", {}),
    ("slao", {"basis": "rsvd", "B_start": "preserve"}),
    ("slao", {"start": "zero"}),
    ("slao", {"A_start": "random"}),
    ("magmax", {}),
    ("opcm", {}),
    ("lego", {}),
]
# What changes the rank or learns more than A and B is for DDP alone: test_what_parts_cannot_follow.
REPLICATED: list[tuple[str, dict[str, Any]]] = [
    ("olora", {}),
    ("clora", {}),
    ("rank1", {}),
    ("sdlora", {}),
    ("codyra", {"steps": 3, "kappa_max": 0.05}),
    ("lorac_ipc", {"threshold": 0.2}),  # a frozen layer's parameters have gradients of zero, without which DDP waits
    ("amlora", {}),
    ("share", {}),
    ("sapt", {}),
]
CASES = [
    *((how, *method) for how in ("ddp", "fsdp") for method in METHODS),
    *(("ddp", *method) for method in REPLICATED),
]


@pytest.mark.parametrize(("how", "method", "options"), CASES)
def test_every_process_ends_with_the_lora_of_one(how: str, method: str, options: dict[str, Any]) -> None:
    first, second = together(learn, how, method, options)
    for key in ("starts", "A", "B", "state", "steps", "bytes"):
        assert_equal(first[key], second[key])
    assert first["steps"] == [3, 3, 3]
    torch.manual_seed(0)
    alone = learn("alone", method, options)
    assert all(bool(B.count_nonzero()) for B in alone["B"])
    for key in ("A", "B"):
        for mine, wanted in zip(first[key], alone[key], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(first["logits"], alone["logits"], rtol=2e-3, atol=2e-3)
    assert first["bytes"] == alone["bytes"]


def learn_loda(gao: bool) -> list[list[Tensor]]:
    """Every process sees all of the task's batches for the statistics and trains on its rows, of which it has two."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = model_for("ddp", seed=rank)
    torch.manual_seed(10 + rank)
    learner = ContinualLora(model, "loda", gao=gao)
    for n in (1, 2):
        data = [batch(100 * n + step) for step in range(3)]
        learner.begin_task(f"t{n}", data)
        train(prepared(model, "ddp" if size > 1 else "alone"), n)
        learner.end_task(data)
    factors = learner.method.current.clone()
    return [factors.A, factors.B]


@pytest.mark.parametrize("gao", [False, True])
def test_loda_takes_one_step_on_two_processes(gao: bool) -> None:
    """Aligned gradients are made outside of the wrapper, which averages none of them."""
    first, second = together(learn_loda, gao)
    assert_equal(first, second)
    torch.manual_seed(0)
    alone = learn_loda(gao)
    assert all(bool(B.count_nonzero()) for B in first[1])
    if not gao:  # with it the rows are split apart by each process
        for factors, wanted in zip(first, alone, strict=True):
            torch.testing.assert_close(factors, wanted, rtol=2e-3, atol=2e-4)


def learn_with_statistics(method: str, options: dict[str, Any], own: bool) -> dict[str, list[Tensor]]:
    """Two tasks of four batches, of which a process looks at all or, ``own``, at every other one."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = model_for("ddp", seed=rank)
    torch.manual_seed(10 + rank)
    learner = ContinualLora(model, method, **options)
    for n in (1, 2):
        data = [batch(100 * n + step) for step in range(4)]
        with learner.task(f"t{n}", data[rank::size] if own else data):
            train(prepared(model, "ddp" if size > 1 else "alone"), n)
    factors = learner.method.current.clone()
    return {"A": factors.A, "B": factors.B, "state": [t.clone() for t in learner.method.state_tensors()]}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("inflora", {}),
        ("inflora", {"energy": "C^1/2"}),
        ("keeplora", {}),
        ("loda", {"gao": False}),
        ("pm", {"eps": 0.0}),
        ("pm", {"eps": 0.0, "fisher": "factored"}),
        ("corda", {}),
    ],
)
def test_statistics_are_those_of_all_processes_data(method: str, options: dict[str, Any], own: bool) -> None:
    first, second = together(learn_with_statistics, method, options, own)
    for key in ("A", "B", "state"):
        assert_equal(first[key], second[key])
    torch.manual_seed(0)
    alone = learn_with_statistics(method, options, False)
    for A, B, wanted_A, wanted_B in zip(first["A"], first["B"], alone["A"], alone["B"], strict=True):
        torch.testing.assert_close(B @ A, wanted_B @ wanted_A, rtol=1e-2, atol=2e-3)
    assert [t.shape for t in first["state"]] == [t.shape for t in alone["state"]]


def share_other_shapes() -> str:
    mine = [torch.full((2, 3), 1.0), torch.full((4, 3 + dist.get_rank()), 2.0)]
    with pytest.raises(RuntimeError, match="1 of the 2 processes") as error:
        Replicas().share(mine, torch.device("cpu"))
    return str(error.value)


def test_adapters_of_other_shapes_are_told_on_every_process() -> None:
    first, second = together(share_other_shapes)
    assert first == second and "give all of them the same method, options and model" in first


def learn_and_save(how: str, out: Path) -> list[Tensor]:
    return learn(how, "slao", {}, out)["B"]


def go_on(out: Path, processes: int) -> list[Tensor]:
    model = PeftModel.from_pretrained(base_model(), out, is_trainable=True)
    fuse(model)
    learner = ContinualLora.load(model, out)
    with learner.task("fourth"):
        train(prepared(model, "ddp" if processes > 1 else "alone"), 4)
    return learner.method.current.clone().B


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_what_two_saved_one_and_two_and_plain_peft_load(how: str, tmp_path: Path) -> None:
    saved = together(learn_and_save, how, tmp_path / "learner")[0]
    stored = load_file(tmp_path / "learner" / "adapter_model.safetensors")
    assert sorted(t.shape for name, t in stored.items() if "lora_B" in name) == sorted(B.shape for B in saved)
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "learner")
    loaded = [p for name, p in plain.named_parameters() if "lora_B" in name]
    assert {tuple(B.flatten().tolist()) for B in saved} == {tuple(p.flatten().tolist()) for p in loaded}
    on_two = together(go_on, tmp_path / "learner", 2)
    assert_equal(on_two[0], on_two[1])
    for mine, wanted in zip(on_two[0], go_on(tmp_path / "learner", 1), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=2e-4)


def train_apart() -> tuple[str, bool]:
    model = model_for("alone")
    learner = ContinualLora(model)
    learner.begin_task("first")
    before = learner.method.current.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = batch(dist.get_rank())["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(TaskError) as error:
        learner.end_task()
    assert not learner.in_task
    assert_equal(learner.method.current.B, before.B)
    return str(error.value), True


def test_adapters_that_were_not_trained_together_are_not_merged() -> None:
    (message, _), (same, _) = together(train_apart)
    assert message == same  # nobody is left waiting
    assert "task 1 'first' left" in message and "on process 1 other than on process 0" in message
    assert "Wrap the model in DDP" in message


def alone_by_choice() -> list[Tensor]:
    model = model_for("alone")
    learner = ContinualLora(model, process_group=False)
    with learner.task("first"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        ids = batch(dist.get_rank())["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return learner.method.current.clone().B


def test_adapters_of_their_own_are_left_alone() -> None:
    mine, theirs = together(alone_by_choice)
    assert not any(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def begin_in_parts(method: str, options: dict[str, Any], tasks: int) -> str:
    model = model_for("fsdp")
    learner = ContinualLora(model, method, **options)
    for n in range(1, tasks):
        with learner.task(f"task{n}"):
            train(model, n, steps=1)
    before = [t.clone() for t in learner.method.current.B]
    with pytest.raises(TaskError) as error:
        learner.begin_task("last")
    assert not learner.in_task
    assert_equal(learner.method.current.B, before)
    return str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "tasks", "what"),
    [
        ("inclora", {}, 1, "changes the rank"),
        ("slao", {"rank": 5, "basis": "rsvd", "B_start": "preserve"}, 1, "changes the rank"),
        ("slao", {"train": "B"}, 2, "trains only one of A and B"),
        ("clora", {}, 0, "learns parameters beside A and B"),
    ],
)
def test_what_parts_cannot_follow(method: str, options: dict[str, Any], tasks: int, what: str) -> None:
    message, _ = together(begin_in_parts, method, options, tasks)
    assert what in message and "Train with DDP" in message


def nan_everywhere() -> str:
    model = model_for("fsdp")
    learner = ContinualLora(model)
    learner.begin_task("first")
    with torch.no_grad():
        for layer in learner.layers:
            layer.B.mul_(float("nan"))
    with pytest.raises(TaskError, match="inf or NaN"):
        learner.end_task()
    assert all(bool(torch.isfinite(B).all()) for B in learner.method.current.B)
    return "undone"


def test_a_diverged_task_is_undone_on_every_process() -> None:
    assert together(nan_everywhere) == ["undone", "undone"]


def views() -> list[Tensor]:
    model = model_for("fsdp")
    learner = ContinualLora(model)
    with learner.task("first"):
        train(model, 1)
    learner.begin_task("second")
    train(model, 2)
    with learner.merged_view():
        seen = logits(model)
    learner.end_task()
    return [seen, logits(model)]


def test_the_would_be_merge_of_a_sharded_model_is_what_it_becomes() -> None:
    seen, merged = together(views)[0]
    torch.testing.assert_close(seen, merged, rtol=1e-4, atol=1e-5)
