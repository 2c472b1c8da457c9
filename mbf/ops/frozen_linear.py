"""``mbf::frozen_linear``: a linear layer whose weights don't train, by the products of the fused layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mbf.ops._autograd import differentiable
from mbf.ops._inputs import FLOATS, wrong_type
from mbf.ops._library import define, native_status, reference_only
from mbf.ops._operands import autocast_to, autocasts


def frozen_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``frozen_linear`` as torch computes it."""
    return F.linear(x, weight, bias)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _backward(dy: Tensor, weight: Tensor) -> Tensor:
    return dy @ weight


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_fake(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]))


define("frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", frozen_linear_ref, _forward_fake)
define("frozen_linear_backward(Tensor dy, Tensor weight) -> Tensor", _backward, _backward_fake)
_backward_operator = torch.ops.mbf.frozen_linear_backward.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _backward_operator(dy, *ctx.saved_tensors), None, None


_enter = differentiable("frozen_linear", _setup_context, _autograd_backward, linear=1)


# -- the face ----------------------------------------------------------------------------------------------------------


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x Wᵀ + b`` with W and b that need no gradient, by the kernels of ``lora_linear``'s base product.

    On a CPU that cannot multiply bf16 or fp16, where torch has slow loops of its own, tiles of W are widened into the
    fp32 BLAS in both directions; on one with AMX, fp32 is multiplied on its bf16 tiles to fp32 accuracy; on one with
    AVX2 and no more, or with AMD's AVX-512, both are by loops of mbf's own. Elsewhere it computes as torch does:
    ``gains`` says where.
    Under ``torch.autocast`` it is in autocast's dtype.
    Differentiable once in x. Nothing but W is kept for backward.

    Args:
        x: ``[..., d_in]``, of any strides.
        weight: W, ``[d_out, d_in]``, of x's dtype.
        bias: b, ``[d_out]``, of x's dtype.

    Returns:
        y, ``[..., d_out]``.

    Raises:
        ValueError: a shape that does not fit, or a weight or bias that requires a gradient.
        TypeError: a dtype or device that differs from x's.
    """
    try:
        if autocasts(x):
            x, weight = autocast_to(x.device, x, weight)
            (bias,) = autocast_to(x.device, bias)
        _check(x, weight, bias)
    except AttributeError as error:
        raise wrong_type(error, {"bias": bias}, x=x, weight=weight) from None
    return frozen_linear_ref(x, weight, bias) if reference_only() else _enter(x, weight, bias)


def gains(dtype: torch.dtype, rows: int) -> bool:
    """Whether ``frozen_linear`` is faster than torch on this machine, for x on the CPU of this dtype and so many rows.

    Few rows are not worth the widening or splitting of W.
    """
    kernels = native_status().kernels
    if dtype is torch.float32:
        return rows >= 64 and ("AMX" in kernels or "own products" in kernels)
    names = {torch.bfloat16: "native bf16", torch.float16: "native fp16"}
    return rows >= 16 and bool(kernels) and dtype in names and names[dtype] not in kernels


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)} and x {list(x.shape)}; they must be [d_out, d_in] and [..., d_in]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [d_out] = [{weight.shape[0]}]")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype or value.device != x.device:
            raise TypeError(
                f"{name} is {value.dtype} on {value.device} but x {x.dtype} on {x.device}; convert one of them"
            )
        if value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which frozen_linear does not compute; freeze it with "
                f"{name}.requires_grad_(False), or call torch.nn.functional.linear"
            )
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}; it must be floating-point: fp64, fp32, bf16 or fp16")
