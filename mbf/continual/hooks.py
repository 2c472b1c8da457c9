"""How a method's training hooks reach any training loop: torch's own optimiser and module hooks, nothing to call."""

from __future__ import annotations

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
    once whatever the gradient accumulation, and is not part of what a loop clips before the step.

    Gradients with inf or NaN are refused before the optimiser takes them, those that ``after_backward`` leaves, too.
    Those that a GradScaler finds never come here, as it skips the step; optimisers that skip it themselves, told by
    ``found_inf``, are left to do so.
    """

    def __init__(self, learner: ContinualLora) -> None:
        self.learner = learner
        self.steps = 0
        self.checked = -1  # what ``steps`` was when the loop had the gradients checked by itself
        self._handles: list[RemovableHandle] = []

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

    @classmethod
    def for_inference(cls, learner: ContinualLora) -> TrainingHooks:
        """Hooks for the learner's life: ``inference_adapter`` before every forward that trains nothing."""
        hooks = cls(learner)
        if _overrides(learner.method, "inference_adapter"):
            root = _forward_root(learner.model)
            hooks._handles.append(root.register_forward_pre_hook(hooks._infer, with_kwargs=True))
        return hooks

    def _concerns(self, optimizer: Optimizer) -> bool:
        ours = {id(p) for layer in self.learner.layers for p in (layer.A, layer.B)}
        ours |= {id(p) for parameters in self.learner.method.learned.values() for p in parameters}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._concerns(optimizer):
            return
        with torch.enable_grad():
            penalty = self.learner.method.loss_extra()
        if penalty is not None and penalty.requires_grad:
            _add_gradient(penalty, [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])
        with torch.no_grad():
            refuses = getattr(optimizer, "found_inf", None) is None
            if refuses and (penalty is not None or self.checked != self.steps):
                self._check(optimizer)
            self.learner.method.after_backward()
            if refuses and _overrides(self.learner.method, "after_backward"):
                self._check(optimizer)

    def _check(self, optimizer: Optimizer) -> None:
        # Not the gradients of another optimiser, which a GradScaler may still have to look at.
        its = {id(p) for group in optimizer.param_groups for p in group["params"]}
        check_step(self.learner, self.steps + 1, None, together=False, among=its)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._concerns(optimizer):
            self.steps += 1
            with torch.no_grad():
                self.learner.method.after_step(self.steps)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.learner.method.forward_mod(self.steps, _named(args, kwargs))

    def _infer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.learner.in_task and module.training):
            self.learner.method.inference_adapter(_named(args, kwargs))


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


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return ({"input_ids": args[0]} if args else {}) | dict(kwargs)
