"""``mbf::lora_mlp`` on a GPU: gate and up as a group, down as a layer, and the activation between them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels import lora_group, lora_linear
from mbf.kernels._launch import cdiv, launch
from mbf.kernels._operands import supported
from torch import Tensor

_BLOCK = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activated(g, SILU: tl.constexpr):
    """act(g) and act′(g), in g's dtype, fp32: SiLU, or GELU by its tanh approximation."""
    if SILU:
        s = _sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    t = 2.0 * _sigmoid(2.0 * inner) - 1.0
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
    return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope


@triton.jit
def activation_kernel(g, u, p, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """``p = act(g) ⊙ u``; act(g) is rounded to g's dtype, as an operator of its own would do."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    dtype: tl.constexpr = g.dtype.element_ty
    gs = tl.load(g + at, mask=there, other=0.0).to(tl.float32)
    us = tl.load(u + at, mask=there, other=0.0).to(tl.float32)
    a, _ = _activated(gs, SILU)
    tl.store(p + at, (a.to(dtype).to(tl.float32) * us).to(dtype), mask=there)


@triton.jit
def activation_gradient_kernel(dp, g, u, dg, du, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """``du = dp ⊙ act(g)`` and ``dg = dp ⊙ u ⊙ act′(g)``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    dtype: tl.constexpr = g.dtype.element_ty
    gs = tl.load(g + at, mask=there, other=0.0).to(tl.float32)
    us = tl.load(u + at, mask=there, other=0.0).to(tl.float32)
    dps = tl.load(dp + at, mask=there, other=0.0).to(tl.float32)
    a, slope = _activated(gs, SILU)
    tl.store(du + at, (dps * a).to(dtype), mask=there)
    tl.store(dg + at, (dps * us * slope).to(dtype), mask=there)


def activate(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """``act(g) ⊙ u`` for contiguous g and u ``[..., d_ff]``."""
    p = torch.empty_like(g)
    size = g.numel()
    launch(activation_kernel, (cdiv(size, _BLOCK),), g, u, p, size, SILU=activation == "silu", BLOCK=_BLOCK)
    return p


def deactivate(dp: Tensor, g: Tensor, u: Tensor, activation: str) -> list[Tensor]:
    """dg and du."""
    dg, du = torch.empty_like(g), torch.empty_like(u)
    size = g.numel()
    launch(
        activation_gradient_kernel,
        (cdiv(size, _BLOCK),),
        dp,
        g,
        u,
        dg,
        du,
        size,
        SILU=activation == "silu",
        BLOCK=_BLOCK,
    )
    return [dg, du]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    branches: Sequence[Any],
    activation: str,
    recompute: bool,
) -> Any:
    """The operator's outputs, or NotImplemented for what the kernels don't compute."""
    if not (supported(branches, x) and x.numel() and weights[0].numel()) or x.dtype not in _DTYPES:
        return NotImplemented
    (g, u), (h_gate, h_up) = lora_group.forward(x, weights[:2], biases[:2], branches[:2])
    y, h_down = lora_linear.forward(activate(g, u, activation), weights[2], biases[2], branches[2])
    if recompute:
        g, u = x.new_empty(0), x.new_empty(0)
    return [y, g, u, h_gate, h_up, h_down]


def backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor | None,
    u: Tensor | None,
    hs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    branches: Sequence[Any],
    activation: str,
    needs: Sequence[bool],
) -> Any:
    """The operator's gradients, None where not asked, or NotImplemented."""
    if not (supported(branches, x, dy) and x.numel() and weights[0].numel()) or x.dtype not in _DTYPES:
        return NotImplemented
    if g is None or u is None:
        g, u = map(lora_linear.recomputed, (x, x), weights, biases, branches, hs)
    above = needs[: 1 + 2 * lora_group.GRADIENTS]
    of_down = needs[1 + 2 * lora_group.GRADIENTS :]
    p = activate(g, u, activation) if of_down[0] else None
    dp, _, _, *down = lora_linear.backward(dy, hs[2], p, weights[2], branches[2], [any(above), False, False, *of_down])
    if dp is None:
        return [None] * len(above) + down
    dg_du = deactivate(dp, g, u, activation)
    return [*lora_group.backward(dg_du, hs[:2], x, weights[:2], branches[:2], above), *down]
