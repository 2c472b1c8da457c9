"""How operators get their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mbf.ops._gpu import entrance
from mbf.ops._library import LIBRARY

Outputs: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


def _first(outputs: Outputs) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Tensor]:
    """Give operator ``mbf::name`` its autograd formula, and return the function by which its face enters.

    Graphs (torch.compile, torch.export) hold the operator, differentiated through ``register_autograd``. Eager mode
    enters through a Function of the same two functions, as the Python between the registered formula and its operator
    costs a small layer more than its products do. A second output, h, is only there to be saved.

    Args:
        name: of an operator that returns y, or y and h.
        setup_context: called with ctx, the operator's inputs and its outputs.
        backward: called with ctx and y's gradient, and in graphs with h's, which is None.
    """
    operator = getattr(torch.ops.mbf, name).default
    compute = entrance(name)
    differentiable_once = once_differentiable(backward)

    def setup_in_graph(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        if not isinstance(output, Tensor):
            ctx.mark_non_differentiable(output[1])
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"mbf::{name}", differentiable_once, setup_context=setup_in_graph, lib=LIBRARY)

    def eager_forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = compute(*inputs)
        setup_context(ctx, inputs, outputs)
        return _first(outputs)

    def eager_backward(ctx: Any, dy: Tensor | None) -> Any:
        # The guard against a second derivative costs as much as the rest of the Python here.
        return differentiable_once(ctx, dy) if torch.is_grad_enabled() else backward(ctx, dy)

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)},
    )
    # Function.apply serves torch.func's transforms, and looks at every input for it, before it calls this.
    apply: Callable[..., Tensor] = super(torch.autograd.Function, function).apply

    def enter(*inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _first(operator(*inputs))
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return _first(compute(*inputs))
        if torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return apply(*inputs)

    return enter
