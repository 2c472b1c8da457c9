"""Losses, gradients and adapters that are no numbers, or too large: the task is refused and all is as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mbf.continual import ContinualLora, DivergedError, NonFiniteAdapterError
from mbf.continual.checks import gains
from tests.continual.test_replicas import model_for
from tests.continual.tiny import batch, batches, peft_model, train
from tests.processes import together

V_PROJ = "model.layers.1.self_attn.v_proj"


def v_proj(learner: ContinualLora):
    return next(layer for layer in learner.layers if layer.name.endswith(V_PROJ))


def everything(learner: ContinualLora) -> list[Tensor]:
    """The merged LoRA and all that the method keeps."""
    current = learner.method.current
    return [t.clone() for t in (*current.A, *current.B, *learner.method.state_dict().values())]


@contextmanager
def gradient(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = parameter.register_hook(change)
    try:
        yield
    finally:
        handle.remove()


def third(value: float) -> Callable[[Tensor], Tensor]:
    """Two places of the third gradient get ``value``."""
    seen = []

    def change(grad: Tensor) -> Tensor:
        seen.append(grad)
        return grad.index_fill(1, torch.tensor([0]), value) if len(seen) == 3 else grad

    return change


@pytest.mark.parametrize("method", ["slao", "magmax", "olora", "opcm"])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_a_gradient_stops_the_task_at_its_step(method: str, value: float, word: str) -> None:
    model = peft_model()
    learner = ContinualLora(model, method)
    with learner.task("good", batches(1)):
        train(model, 1)
    before = everything(learner)
    with pytest.raises(DivergedError) as error, learner.task("bad", batches(2)):
        layer = v_proj(learner)
        with gradient(next(p for p in (layer.B, layer.A) if p.requires_grad), third(value)):
            train(model, 2)
    found = re.fullmatch(
        rf"task 2 'bad', step 3: inf or NaN in the gradient of [AB] of {V_PROJ}: (\d+) {word} of (\d+) values; the "
        r"merged LoRA is as it was. Lower the learning rate, clip gradients, or train in a wider dtype\.",
        str(error.value),
    )
    assert found and 0 < int(found[1]) < int(found[2])
    assert all(torch.equal(a, b) for a, b in zip(everything(learner), before, strict=True))
    assert learner.task_index == 1 and not learner.in_task
    # What was wrong is not added to the gradients of the next task.
    with learner.task("next", batches(2)):
        train(model, 2)
    assert [record.name for record in learner.history] == ["good", "next"]


def test_the_step_with_a_bad_gradient_is_not_taken() -> None:
    """So a loop may leave the batch out by itself and go on with the task."""
    model = peft_model()
    learner = ContinualLora(model)
    with learner.task("one"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(3):
            model(**batch(step)).loss.backward()
            if step == 1:
                before = everything(learner)
                learner.layers[0].B.grad[0, 0] = float("nan")
                with pytest.raises(DivergedError, match="step 2"):
                    optimizer.step()
                assert all(torch.equal(a, b) for a, b in zip(everything(learner), before, strict=True))
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert learner.history[0].steps == 2


def test_before_clipping_the_one_bad_gradient_is_named() -> None:
    model = peft_model()
    learner = ContinualLora(model)

    def spoilt() -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**batch(0)).loss.backward()
        v_proj(learner).B.grad[0, 0] = float("nan")
        return optimizer

    with pytest.raises(DivergedError) as error, learner.task("one"):
        spoilt()
        learner.check_step()
    assert f"step 1: inf or NaN in the gradient of B of {V_PROJ}: 1 nan of" in str(error.value)
    with pytest.raises(DivergedError, match=r"and in 11 more of 12 gradients"), learner.task("one"):
        optimizer = spoilt()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_gradients_are_no_error(dtype: torch.dtype) -> None:
    """Nor are those whose norm is beyond their dtype, or beyond fp32."""
    model = peft_model()
    learner = ContinualLora(model, fuse=False)
    with learner.task("one"):
        for layer in learner.layers:
            layer.A.data = layer.A.data.to(dtype)
            layer.A.grad = torch.full_like(layer.A, 60000 if dtype is torch.float16 else 3e38)
        learner.check_step()
        learner.layers[1].A.grad[0, 0] = float("inf")
        with pytest.raises(DivergedError, match=r"inf or NaN in the gradient of A of .*: 1 inf of"):
            learner.check_step()
        for layer in learner.layers:
            layer.A.data, layer.A.grad = layer.A.data.float(), None


def test_an_optimiser_answers_for_its_own_gradients() -> None:
    model = peft_model()
    learner = ContinualLora(model)
    with pytest.raises(DivergedError, match="step 1: inf or NaN in the gradient of B of"), learner.task("one"):
        of_A = torch.optim.SGD([layer.A for layer in learner.layers], lr=0.1)
        of_B = torch.optim.SGD([layer.B for layer in learner.layers], lr=0.1)
        model(**batch(0)).loss.backward()
        learner.layers[0].B.grad[0, 0] = float("inf")
        of_A.step()
        of_B.step()


def test_what_a_penalty_adds_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    learner = ContinualLora(model, "olora")
    with learner.task("one"):
        train(model, 1)
    loss_extra = learner.method.loss_extra
    monkeypatch.setattr(learner.method, "loss_extra", lambda: loss_extra() * float("nan"))
    with pytest.raises(DivergedError, match="task 2 'two', step 1: inf or NaN in the gradient"), learner.task("two"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**batch(0)).loss.backward()
        learner.check_step()
        optimizer.step()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_is_named_before_its_gradients(value: str) -> None:
    model = peft_model()
    learner = ContinualLora(model)
    with pytest.raises(DivergedError) as error, learner.task("one"):
        train(model, 1, steps=2)
        loss = model(**batch(0)).loss * float(value)
        loss.backward()
        learner.check_step(loss)
    assert str(error.value).startswith(f"task 1 'one', step 3: the loss is {value}, wanted a finite number; the merged")
    with learner.task("one"):
        train(model, 1)
        learner.check_step(0.5)
        learner.check_step()  # no gradients, nothing to check


def test_check_step_needs_a_task() -> None:
    with pytest.raises(RuntimeError, match="check_step: no task is in progress"):
        ContinualLora(peft_model()).check_step(1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_are_no_errors(fused: bool) -> None:
    """With fused=True the optimiser is called all the same and skips by itself."""
    model = peft_model()
    learner = ContinualLora(model)
    with learner.task("one"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
        before = everything(learner)
        skipped = 0
        for step in range(30):
            scale = scaler.get_scale()
            scaler.scale(model(**batch(step)).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() == scale:
                break
            skipped += 1
            assert all(torch.equal(a, b) for a, b in zip(everything(learner), before, strict=True))
    assert skipped > 0 and not torch.equal(everything(learner)[-1], before[-1])


def test_a_compiled_model_is_checked_alike() -> None:
    model = peft_model()
    learner = ContinualLora(model)
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(DivergedError, match="step 3: inf or NaN in the gradient of B"),
        learner.task("one"),
        gradient(v_proj(learner).B, third(float("nan"))),
    ):
        train(compiled, 1)
    with learner.task("one"):
        train(compiled, 1)
    assert learner.history[0].steps == 4


def test_the_values_left_in_an_adapter_are_counted() -> None:
    model = peft_model()
    learner = ContinualLora(model)
    with pytest.raises(NonFiniteAdapterError) as error, learner.task("one"):
        train(model, 1)
        with torch.no_grad():
            v_proj(learner).A[0, :3] = float("nan")
            v_proj(learner).B[:2, 1] = float("-inf")
            v_proj(learner).B[0, 0] = float("inf")
    values = sum(t.numel() for t in v_proj(learner).values())
    assert f"task 1 'one' left inf or NaN in {V_PROJ} (A and B): 3 nan, 1 inf, 2 -inf of {values} values;" in str(
        error.value
    )


# -- the size of the adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e30])
def test_gains_are_the_norms_of_the_products(size: float) -> None:
    """Also of those that overflow or vanish in fp32."""
    learner = ContinualLora(peft_model())
    for layer in learner.layers:
        layer.write(torch.randn(layer.A.shape), size * torch.randn(layer.B.shape))
    wanted = [
        layer.scale * (layer.B.double() @ layer.A.double()).norm() / layer.B.shape[0] ** 0.5 for layer in learner.layers
    ]
    torch.testing.assert_close(gains(learner, learner.method.current), torch.stack(wanted).detach())


@pytest.mark.parametrize("method", ["slao", "magmax", "olora", "opcm"])
def test_an_adapter_that_explodes_is_refused(method: str) -> None:
    model = peft_model()
    learner = ContinualLora(model, method)
    with learner.task("good", batches(1)):
        train(model, 1)
    before = everything(learner)
    with pytest.raises(DivergedError) as error, learner.task("wild", batches(2)):
        train(model, 2, lr=100.0)
    found = re.match(
        r"task 2 'wild' left an adapter that exploded: (\S+) with s·‖BA‖ = (\S+), wanted at most (\S+) "
        r"\(max_norm·√d_out\), .* and 3 more layers; the merged LoRA is as it was\. .*max_norm than 1000 \(None: no ",
        str(error.value),
    )
    assert found, str(error.value)
    d_out = next(layer.B.shape[0] for layer in learner.layers if layer.name == found[1])
    assert float(found[2]) > float(found[3]) == pytest.approx(1000 * d_out**0.5, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(everything(learner), before, strict=True))


def test_a_merge_that_explodes_is_refused() -> None:
    model = peft_model()
    learner = ContinualLora(model, schedule=1e9)
    with learner.task("one"):
        train(model, 1)
    before = everything(learner)
    with (
        pytest.raises(DivergedError, match=r"merging task 2 'two' gave an adapter that exploded: .* s·‖BA‖ = "),
        learner.task("two"),
    ):
        train(model, 2)
    assert all(torch.equal(a, b) for a, b in zip(everything(learner), before, strict=True))


def test_the_limit_is_the_users(tmp_path) -> None:
    model = peft_model()
    learner = ContinualLora(model, max_norm=None)
    with learner.task("wild"):
        train(model, 1, lr=100.0)
    assert float(gains(learner, learner.method.current).max()) > 1000
    strict = ContinualLora(peft_model(), max_norm=1e-4)
    with pytest.raises(DivergedError, match=r"max_norm than 0\.0001"), strict.task("one"):
        train(strict.model, 1)
    strict.save(tmp_path / "learner")
    assert ContinualLora.load(peft_model(), tmp_path / "learner").max_norm == 1000
    assert ContinualLora.load(peft_model(), tmp_path / "learner", max_norm=2.5).max_norm == 2.5
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"max_norm: found {wrong}, wanted a number above 0, or None"):
            ContinualLora(peft_model(), max_norm=wrong)


# -- several processes -------------------------------------------------------------------------------------------------


def spoilt_on_one(kind: str) -> tuple[str, bool]:
    """A gradient that only the last process finds to be bad; of a sharded one, it has the only bad part."""
    model = model_for(kind)
    learner = ContinualLora(model)
    before = everything(learner)
    rank = torch.distributed.get_rank()

    def spoil(grad: Tensor) -> None:
        part = grad.to_local() if hasattr(grad, "to_local") else grad
        if rank == 1:
            part.view(-1)[-1] = float("nan")

    message = "nothing was wrong"
    try:
        with learner.task("one"):
            model(**batch(rank)).loss.backward()
            spoil(learner.layers[0].B.grad)
            if kind == "fsdp":
                torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
            else:
                learner.check_step()
    except DivergedError as error:
        message = str(error)
    return message, all(torch.equal(a, b) for a, b in zip(everything(learner), before, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_processes_decide_alike(kind: str) -> None:
    (first, whole), (second, also_whole) = together(spoilt_on_one, kind)
    assert whole and also_whole
    for message in (first, second):
        assert message.startswith("task 1 'one', step 1: inf or NaN in the gradient of B of ")
    assert "1 nan of" in second and ("1 nan of" if kind == "fsdp" else "none here, but on another process") in first


def loss_on_one() -> str:
    model = model_for("ddp")
    learner = ContinualLora(model)
    try:
        with learner.task("one"):
            learner.check_step(float("inf") if torch.distributed.get_rank() else 0.5)
    except DivergedError as error:
        return str(error)
    return "nothing was wrong"


def test_a_loss_of_one_process_is_refused_by_all() -> None:
    first, second = together(loss_on_one)
    assert first == second and first.startswith("task 1 'one', step 1: the loss is inf")
