"""How operators get their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mbf.ops._gpu import entrance
from mbf.ops._library import LIBRARY

Outputs: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


_REFUSAL = (
    b"mbf: the fused operators have no second derivatives; compute this one within mbf.use_backend('reference'), or "
    b"after mbf.unfuse(model)"
)


def once(linear: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a backward, called with ctx and the gradients of the outputs: it raises where differentiated.

    torch's own ``once_differentiable`` raises only where a gradient of the output is itself differentiated. Where that
    is constant, after a sum say, the gradients would pass for constants, though they depend on the inputs.

    Args:
        linear: of how many inputs, the first ones, the outputs are linear functions: if no other input has a gradient
            and those of the outputs are constant, so are those of these inputs.
    """

    def guarded(backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(ctx: Any, *dys: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *dys)
            with torch.no_grad():
                found = backward(ctx, *dys)
            if not any(ctx.needs_input_grad[linear:]) and not any(dy is not None and dy.requires_grad for dy in dys):
                return found
            gradients = found if isinstance(found, tuple) else (found,)
            refusing: Any = torch._C._functions.DelayedError(_REFUSAL, len(gradients))
            return refusing(*[None if one is None else one.detach().requires_grad_() for one in gradients])

        return run

    return guarded


def _first(outputs: Outputs) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any], linear: int
) -> Callable[..., Tensor]:
    """Give operator ``mbf::name`` its autograd formula, and return the function by which its face enters.

    Graphs (torch.compile, torch.export) hold the operator, differentiated through ``register_autograd``. Eager mode
    enters through a Function of the same two functions, as the Python between the registered formula and its operator
    costs a small layer more than its products do. A second output, h, is only there to be saved.

    Args:
        name: of an operator that returns y, or y and h.
        setup_context: called with ctx, the operator's inputs and its outputs.
        backward: called with ctx and y's gradient, and in graphs with h's, which is None.
        linear: as ``once`` takes it.
    """
    operator = getattr(torch.ops.mbf, name).default
    compute = entrance(name)
    backward = once(linear)(backward)

    def setup_in_graph(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        if not isinstance(output, Tensor):
            ctx.mark_non_differentiable(output[1])
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"mbf::{name}", backward, setup_context=setup_in_graph, lib=LIBRARY)

    def eager_forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = compute(*inputs)
        setup_context(ctx, inputs, outputs)
        return _first(outputs)

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(eager_forward), "backward": staticmethod(backward)},
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
