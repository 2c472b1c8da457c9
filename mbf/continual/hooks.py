"""How a method's training hooks reach any training loop: torch's own optimiser and module hooks, nothing to call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from mbf.continual.checks import check_step
from mbf.methods import Method

if TYPE_CHECKING:
    from mbf.continual.learner import ContinualLora


class TrainingHooks:
    """Calls the method's hooks around every optimiser step that concerns what it trains, and before every forward.

    The penalty of ``loss_extra`` is differentiated here, once an optimiser step, and added to the gradients: it counts
    once whatever the gradient accumulation, and is not part of what a loop clips before the step. Where the step is
    given a closure that makes the gradients, all this follows the closure.

    Several optimisers, of A, B and what the method learns, take one step together: it is over when all that is trained
    was stepped, or all optimisers that took the last one have stepped again. An optimiser inside of another, as ZeRO's,
    is the other's business.

    Gradients with inf or NaN are refused before the optimiser takes them, those that ``after_backward`` leaves, too.
    Those that a GradScaler finds never come here, as it skips the step; a fused optimiser skips it itself, told by
    ``found_inf``, and is left to do so: nothing is counted then. Of gradients that it would divide by ``grad_scale``
    itself, the scale is taken before a method sees them.

    Attributes:
        steps: optimiser steps so far.
        checked: what ``steps`` was when the loop had the gradients checked by itself.
        held: ``id`` of the parameters that some optimiser has stepped.
    """

    def __init__(self, learner: ContinualLora) -> None:
        self.learner = learner
        self.steps = 0
        self.checked = -1
        self.held: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._now: Optimizer | None = None  # the one whose step is running
        self._stepped: set[int] = set()  # id of the optimisers that have taken the step in progress,
        self._covered: set[int] = set()  # of what they hold,
        self._together: set[int] = set()  # and of the optimisers that took the last step
        self._settles: RemovableHandle | None = None

    def attach(self) -> None:
        """From now on, until ``detach``."""
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        if _overrides(self.learner.method, "forward_mod"):
            self._handles.append(
                _forward_root(self.learner.model).register_forward_pre_hook(self._forward, with_kwargs=True)
            )

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stays_open(False)

    @classmethod
    def for_inference(cls, learner: ContinualLora) -> TrainingHooks:
        """Hooks for the learner's life: ``inference_adapter`` before every forward that trains nothing."""
        hooks = cls(learner)
        if _overrides(learner.method, "inference_adapter"):
            root = _forward_root(learner.model)
            hooks._handles.append(root.register_forward_pre_hook(hooks._infer, with_kwargs=True))
        return hooks

    # -- optimiser steps -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """End the step that some optimisers have taken, should others of them never come."""
        if self._stepped:
            self._finish()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self._begins(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare(optimizer)
            return None

        def evaluated() -> Any:
            loss = closure()
            self._prepare(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], evaluated, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluated}

    def _begins(self, optimizer: Optimizer) -> bool:
        """Whether the step is of what the task trains, and not one that another optimiser takes as its own."""
        its = _held_by(optimizer)
        if its.isdisjoint(self._trained()):
            return False
        if self._now is not None and self._now is not optimizer and its <= _held_by(self._now) and _runs(self._now):
            return False
        if id(optimizer) in self._stepped:
            self._finish()
        self._now = optimizer
        return True

    def _prepare(self, optimizer: Optimizer) -> None:
        """What comes between gradients and step."""
        method, told = self.learner.method, getattr(optimizer, "found_inf", None) is not None
        if _skips(optimizer):
            return
        changes = _overrides(method, "loss_extra") or _overrides(method, "after_backward")
        if changes:
            _unscale(optimizer)
        with torch.enable_grad():
            penalty = method.loss_extra()
        if penalty is not None and penalty.requires_grad:
            _add_gradient(penalty, [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])
        with torch.no_grad():
            if penalty is not None or not (told or self.checked == self.steps):
                self._check(optimizer)
            if not self._stepped:
                method.after_backward()
                if _overrides(method, "after_backward"):
                    self._check(optimizer)

    def _check(self, optimizer: Optimizer) -> None:
        # Not the gradients of another optimiser, which a GradScaler may still have to look at.
        check_step(self.learner, self.steps + 1, None, together=False, among=_held_by(optimizer))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._now:
            return
        self._now = None
        if _skips(optimizer):
            return
        its = _held_by(optimizer)
        self.held |= its
        self._covered |= its
        self._stepped.add(id(optimizer))
        if self._trained() <= self._covered or (self._together and self._together <= self._stepped):
            self._finish()
        else:
            self._stays_open(True)

    def _finish(self) -> None:
        self._stays_open(False)
        self._together, self._stepped, self._covered = self._stepped, set(), set()
        self.steps += 1
        with torch.no_grad():
            self.learner.method.after_step(self.steps)

    def _stays_open(self, so: bool) -> None:
        """The step that has begun ends before the next forward at the latest."""
        if self._settles is not None:
            self._settles.remove()
        self._settles = None
        if so:
            root = _forward_root(self.learner.model)
            self._settles = root.register_forward_pre_hook(self._next, prepend=True)

    def _next(self, module: nn.Module, args: Any) -> None:
        self.settle()

    def _trained(self) -> set[int]:
        """``id`` of what the task trains."""
        ours = [p for layer in self.learner.layers for p in (layer.A, layer.B)]
        ours += [p for parameters in self.learner.method.learned.values() for p in parameters]
        return {id(p) for p in ours if p.requires_grad}

    # -- forwards ------------------------------------------------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.learner.method.forward_mod(self.steps, _named(module, args, kwargs))

    def _infer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.learner.in_task and module.training):
            self.learner.method.inference_adapter(_named(module, args, kwargs))


def _held_by(optimizer: Optimizer) -> set[int]:
    """``id`` of its parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _runs(optimizer: Optimizer) -> bool:
    """Whether its step is on the stack; of one that raised no hook has told that it is over."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _skips(optimizer: Optimizer) -> bool:
    """Whether the optimiser was told to leave everything as it is."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _unscale(optimizer: Optimizer) -> None:
    """Divide its gradients by the scale that it was to take from them."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    inverse = scale.double().reciprocal().float()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                part = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                part.mul_(inverse.to(part.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _add_gradient(penalty: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    for p, g in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True):
        if g is not None:
            p.grad = g.to(p.dtype) if p.grad is None else p.grad + g


def _overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)


def _forward_root(model: nn.Module) -> nn.Module:
    """The module whose forward runs in training, evaluation and generate alike: the base model under PEFT's wrapper."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by their names; the first is the ids, whatever it is called."""
    if not args:
        return dict(kwargs)
    kinds = inspect.signature(module.forward).parameters
    by_place = [name for name, one in kinds.items() if one.kind <= one.POSITIONAL_OR_KEYWORD]
    return {"input_ids": args[0]} | dict(zip(by_place, args, strict=False)) | dict(kwargs)
