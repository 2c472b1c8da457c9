"""Optimiser steps of every kind: given a closure, scaled, fused, several of them, one inside of another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import mbf
from mbf.continual import ContinualLora, DivergedError
from tests.continual.tiny import batch, batches, peft_model, train

Step = Callable[[nn.Module, torch.optim.Optimizer, dict[str, Tensor]], None]
# A penalty, what looks at the final gradients, what replaces them, what changes parameters after the step.
METHODS = [("olora", {"l1": 0.5}), ("lorac_ipc", {"threshold": 0.3}), ("loda", {}), ("codyra", {"kappa_max": 0.2})]
every_method = pytest.mark.parametrize(("method", "options"), METHODS)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def learnt(
    method: str,
    options: dict[str, Any],
    step: Step,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda ps: torch.optim.SGD(ps, lr=0.05),
) -> tuple[list[Tensor], int]:
    """Every trained parameter at the end of a second task of five steps, and the steps that were counted."""
    torch.manual_seed(0)
    model = peft_model()
    learner = ContinualLora(model, method, **options)
    with learner.task("one", batches(1), steps=4):
        train(model, 1)
    torch.manual_seed(5)
    with learner.task("two", batches(2), steps=5):
        model.train()
        one = optimizer(trained(model))
        torch.manual_seed(6)
        for seed in range(200, 205):
            step(model, one, batch(seed))
        found = [p.detach().clone() for p in trained(model)]
    return found, learner.history[-1].steps


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    difference = [(a - b).flatten() for a, b in zip(one, other, strict=True)]
    return float(torch.cat(difference).norm() / torch.cat([a.flatten() for a in other]).norm())


def by_place(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    class Named:
        def step(self, closure: Callable[[], Tensor]) -> Tensor:
            return optimizer.step(closure=closure)

        zero_grad = optimizer.zero_grad

    by_place(model, Named(), inputs)  # type: ignore[arg-type]


@every_method
@pytest.mark.parametrize("step", [by_place, by_name])
def test_a_closure_makes_no_difference(method: str, options: dict[str, Any], step: Step) -> None:
    expected, steps = learnt(method, options, plain)
    found, counted = learnt(method, options, step)
    assert apart(found, expected) == 0 and counted == steps == 5


def test_a_closures_gradients_are_checked() -> None:
    model = peft_model()
    learner = ContinualLora(model)
    with pytest.raises(DivergedError, match="task 1 'one', step 1: inf or NaN in the gradient"), learner.task("one"):
        optimizer = torch.optim.SGD(trained(model), lr=0.1)

        def closure() -> Tensor:
            loss = model(**batch(0)).loss
            loss.backward()
            learner.layers[0].B.grad[0, 0] = float("nan")
            return loss

        optimizer.step(closure)


def test_lbfgs_takes_a_step_of_many_evaluations() -> None:
    def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.001, max_iter=2)

    with_penalty, steps = learnt("olora", {"l1": 0.5}, by_place, lbfgs)
    without, _ = learnt("olora", {"l1": 0.0}, by_place, lbfgs)
    assert steps == 5 and apart(with_penalty, without) > 1e-5


# -- GradScaler --------------------------------------------------------------------------------------------------------


def scaled(unscale: bool, overflow: tuple[int, ...] = ()) -> Step:
    """Steps of a GradScaler; those numbered in ``overflow`` have an infinite loss."""
    scaler, count = torch.amp.GradScaler("cpu", init_scale=2.0**14), iter(range(1000))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
        loss = model(**inputs).loss
        if next(count) in overflow:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, fused=True)


@every_method
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make", [fused, lambda ps: torch.optim.SGD(ps, lr=0.05)], ids=["fused", "plain"])
def test_a_scale_of_the_loss_makes_no_difference(
    method: str, options: dict[str, Any], unscale: bool, make: Callable[..., torch.optim.Optimizer]
) -> None:
    expected, _ = learnt(method, options, plain)
    found, steps = learnt(method, options, scaled(unscale), make)
    assert apart(found, expected) < 1e-5 and steps == 5


@every_method
def test_a_step_that_overflows_counts_for_nothing(method: str, options: dict[str, Any]) -> None:
    expected, _ = learnt(method, options, scaled(False, (0, 2)))
    found, steps = learnt(method, options, scaled(False, (0, 2)), fused)
    assert apart(found, expected) < 1e-5 and steps == 3


# -- several optimisers ------------------------------------------------------------------------------------------------


class Split:
    """Two optimisers, of some of the parameters and of the others."""

    def __init__(self, parameters: list[nn.Parameter], every: int) -> None:
        self.parts = [torch.optim.SGD(part, lr=0.05) for part in (parameters[::every], self.rest(parameters, every))]

    @staticmethod
    def rest(parameters: list[nn.Parameter], every: int) -> list[nn.Parameter]:
        return [p for n, p in enumerate(parameters) if n % every]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


@pytest.mark.parametrize(("method", "options"), [METHODS[1], METHODS[3], ("seqlora", {})])
@pytest.mark.parametrize("every", [2, 3])
def test_two_optimisers_take_one_step(method: str, options: dict[str, Any], every: int) -> None:
    expected, _ = learnt(method, options, plain)
    found, steps = learnt(method, options, plain, lambda ps: Split(ps, every))  # type: ignore[arg-type, return-value]
    assert apart(found, expected) < 1e-6 and steps == 5


def test_optimisers_that_leave_something_out_count_their_steps(caplog: pytest.LogCaptureFixture) -> None:
    """The first step is over with the next forward; from then on it is known who takes one."""
    model = peft_model()
    learner = ContinualLora(model)
    with pytest.warns(UserWarning, match=r"task 1 'one': no optimiser held 1 of the parameters"), learner.task("one"):
        parameters = trained(model)
        halves = [torch.optim.SGD(part, lr=0.1) for part in (parameters[1:5], parameters[5:])]
        for seed, counted in ((0, 0), (1, 2), (2, 3)):
            model(**batch(seed)).loss.backward()
            for half in halves:
                half.step()
            assert learner._active.hooks.steps == counted
    assert learner.history[-1].steps == 3


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_an_optimiser_inside_of_another_takes_no_step_of_its_own() -> None:
    expected, _ = learnt("olora", {"l1": 0.5}, plain)
    found, steps = learnt("olora", {"l1": 0.5}, plain, lambda ps: ZeroRedundancyOptimizer(ps, torch.optim.SGD, lr=0.05))
    assert apart(found, expected) < 1e-6 and steps == 5


def test_after_a_step_that_failed_others_go_on() -> None:
    model = peft_model()
    learner = ContinualLora(model)

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise OSError("no")

    with learner.task("one"):
        with pytest.raises(OSError, match="no"):
            plain(model, Broken(trained(model), lr=0.1), batch(0))
        train(model, 1)
    assert learner.history[-1].steps == 4


# -- what no optimiser held --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["clora", "sdlora", "lilora", "amlora", "codyra"])
def test_parameters_that_a_filter_by_name_misses_are_told(method: str) -> None:
    model = peft_model()
    learner = ContinualLora(model, method)
    with warnings.catch_warnings(), learner.task("one", batches(1)):
        warnings.simplefilter("ignore")
        train(model, 1)
    learner.begin_task("two", batches(2))
    named = [p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
    plain(model, torch.optim.SGD(named, lr=0.1), batch(0))
    with pytest.warns(UserWarning, match=r"task 2 'two': no optimiser held \d+ of the parameters .*mbf_method"):
        learner.end_task()


def test_nothing_is_told_where_all_are_held(recwarn: pytest.WarningsRecorder) -> None:
    model = peft_model()
    learner = ContinualLora(model, "lilora")
    for name in ("one", "two"):
        with learner.task(name):
            train(model, 1)
    assert not [one for one in recwarn if "no optimiser" in str(one.message)]


# -- gradients left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("slao", {}), ("seqlora", {}), ("slao", {"train": "B"}), ("lego", {})])
def test_no_gradient_crosses_from_one_task_into_the_next(method: str, options: dict[str, Any]) -> None:
    def two(left_behind: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = peft_model()
        learner = ContinualLora(model, method, **options)
        with learner.task("one"):
            train(model, 1)
            if left_behind:
                model(**batch(9)).loss.backward()
        torch.manual_seed(1)
        with learner.task("two"):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            plain(model, optimizer, batch(3))
            return [layer_part.detach().clone() for layer in learner.layers for layer_part in (layer.A, layer.B)]

    assert apart(two(True), two(False)) == 0


def test_a_block_may_end_its_task_itself() -> None:
    model = peft_model()
    learner = mbf.ContinualLora(model)
    with learner.task("one"):
        train(model, 1)
        learner.end_task()
    with learner.task("two"):
        train(model, 2)
        learner.abandon_task()
    with learner.task("three"):
        train(model, 3)
        learner.end_task()
        learner.begin_task("four")
    assert [task.name for task in learner.history] == ["one", "three"] and learner.current_task == "four"


@pytest.mark.parametrize("method", ["sapt", "loda", "rank1"])
def test_arguments_by_place_are_seen_as_those_by_name(method: str) -> None:
    inputs = batch(3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, :4] = 0  # padding on the left

    def by_place(model: nn.Module, optimizer: torch.optim.Optimizer, _: Any) -> None:
        model(inputs["input_ids"], mask, labels=inputs["labels"]).loss.backward()
        optimizer.step()

    def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, _: Any) -> None:
        model(**inputs, attention_mask=mask).loss.backward()
        optimizer.step()

    assert apart(learnt(method, {}, by_place)[0], learnt(method, {}, by_name)[0]) == 0
