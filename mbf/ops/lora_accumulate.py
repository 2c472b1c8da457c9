"""``mbf::lora_accumulate``: the low-rank branch on top of a finished base output, whatever layer made that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbf.ops import _branch
from mbf.ops._autograd import differentiable
from mbf.ops._gpu import by_cuda, entrance
from mbf.ops._inputs import FLOATS, wrong_type
from mbf.ops._library import define, reference_only
from mbf.ops._operands import SCHEMA, Branch, autocast_to, autocasts, prepare
from mbf.ops.philox import dropout


def lora_accumulate_ref(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    mix: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    merged_B: Tensor | None = None,
    merge_weight: float | Tensor | None = None,
) -> Tensor:
    """``lora_accumulate`` as the formula, in plain torch and differentiated by torch; dropout needs a seed."""
    h = dropout(x.to(A.dtype), dropout_p, seed) @ A.T
    if mix is not None:
        h = h @ mix.to(h.dtype).T
    if gate is not None:
        h = (h * gate).to(h.dtype)
    if merged_B is not None and merge_weight is not None:
        B = merged_B + merge_weight * (B - merged_B)
    return (y + scale * (h @ B.T)).to(y.dtype)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _forward(y: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    branch = Branch(*operands)
    out = y.clone(memory_format=torch.contiguous_format)
    h = _branch.project(x, branch)
    _branch.add_branch_(out, h, branch)
    return out, h


def _backward(dy: Tensor, h: Tensor, x: Tensor | None, *operands: Any) -> tuple[Tensor | None, ...]:
    *rest, needs = operands
    branch = Branch(*rest)
    keep = _branch.mask(branch, dy.shape[:-1], dy.device) if needs[0] or needs[1] else None
    dh, gradients = _branch.branch_backward(_branch.rows(dy), h, x, keep, branch, needs)
    dx = None
    if needs[0] and dh is not None:
        dx = _branch.input_gradient(dh, keep, branch).to(dy.dtype if x is None else x.dtype)
        dx = dx.view(*dy.shape[:-1], branch.A.shape[1])
    return dx, *gradients


def _forward_fake(y: Tensor, x: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), A.new_empty((*x.shape[:-1], A.shape[0]))


def _backward_fake(dy: Tensor, h: Tensor, x: Tensor | None, *operands: Any) -> tuple[Tensor | None, ...]:
    *rest, needs = operands
    branch = Branch(*rest)
    if x is None:
        x = dy.new_empty((*dy.shape[:-1], branch.A.shape[1]))
    return _branch.asked_like((x, *branch.tensors), needs)


def _forward_gpu(y: Tensor, x: Tensor, *operands: Any) -> Any:
    from mbf.kernels import lora_accumulate as kernels

    return kernels.forward(y, x, Branch(*operands))


def _backward_gpu(dy: Tensor, h: Tensor, x: Tensor | None, *operands: Any) -> Any:
    from mbf.kernels import lora_accumulate as kernels

    *rest, needs = operands
    return kernels.backward(dy, h, x, Branch(*rest), needs)


define(
    f"lora_accumulate(Tensor y, Tensor x, {SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_gpu,
    by_cuda("lora_accumulate"),
)
define(
    f"lora_accumulate_backward(Tensor dy, Tensor h, Tensor? x, {SCHEMA}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_gpu,
    by_cuda("lora_accumulate_backward"),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, x, *operands = inputs
    # x is kept for A's gradient only, or to tell dx its dtype.
    keep = x if ctx.needs_input_grad[2] or x.dtype != y.dtype else None
    _branch.save(ctx, output[1], operands, keep)


def _autograd_backward(ctx: Any, dy: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    h, operands, (x,) = _branch.saved(ctx)
    return (dy, *_branch.spread(_backward_operator(dy, h, x, *operands, _branch.needs(ctx, 2)[1:])))


_backward_operator = entrance("lora_accumulate_backward")
_enter = differentiable("lora_accumulate", _setup_context, _autograd_backward, linear=2)


def check_output(y: Tensor, x: Tensor, B: Tensor) -> None:
    """Raise TypeError or ValueError unless the branch from x by ``B [d_out, r]`` can be added to y."""
    if y.shape != (*x.shape[:-1], B.shape[0]):
        raise ValueError(f"y has shape {list(y.shape)}; it must be {[*x.shape[:-1], B.shape[0]]}, as x and B say")
    if y.device != x.device or y.dtype not in FLOATS:
        raise ValueError(f"y is {y.dtype} on {y.device}; it must be floating-point and on {x.device}, where x is")
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}; it must be fp64, fp32, bf16 or fp16")


# -- the face ----------------------------------------------------------------------------------------------------------


def lora_accumulate(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    mix: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    merged_B: Tensor | None = None,
    merge_weight: float | Tensor | None = None,
) -> Tensor:
    """Return ``y + s · z Bᵀ`` in y's dtype: the branch of ``lora_linear`` on a base output that any layer made.

    y itself is not changed.

    Args:
        y: ``[..., d_out]``, of any floating-point dtype; its leading shape is x's.
        x: ``[..., d_in]``, of any floating-point dtype.

    The other arguments and the errors are those of ``lora_linear``.
    """
    try:
        if autocasts(x):
            x, A, B = autocast_to(x.device, x, A, B)
            (merged_B,) = autocast_to(x.device, merged_B)
        branch = prepare(x, A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight)
        check_output(y, x, B)
    except AttributeError as error:
        raise wrong_type(error, {"gate": gate, "mix": mix, "merged_B": merged_B}, y=y, x=x, A=A, B=B) from None
    if reference_only():
        return lora_accumulate_ref(y, x, **branch._asdict())
    return _enter(y, x, *branch)
