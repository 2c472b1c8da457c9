"""``mbf::lilora_accumulate`` on a GPU, in the symbols of ``mbf/ops/lilora.py``.

The passes over x, y, dx and dy are those of a LoRA of rank r on x's side and r + r̃ on y's: the same kernels, which read
B and Eb where they lie (``joined``); a copy of both would cost a launch and save nothing. What is left works on a few
numbers a row: ``lilora_route_kernel`` makes z of h, and ``lilora_unroute_kernel`` takes dz back to dh and sums up dEa,
dw and ds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels._accumulate import accumulate
from mbf.kernels._input_gradient import input_gradients
from mbf.kernels._launch import cdiv, launch, spans
from mbf.kernels._operands import (
    MOST_MIX,
    matrix,
    most_rank,
    number_argument,
    padded,
    precision,
    sums_dtype,
    supported,
)
from mbf.kernels._output_gradient import output_sums, parted
from mbf.kernels._project import ROUTED, project
from mbf.kernels._reduce import LEAST_ROWS, reduced
from mbf.kernels._tiles import inside, lambda_of, offsets, product
from mbf.kernels._tune import programs_for
from torch import Tensor
from torch.nn import functional as F


@triton.jit
def _inner(Ea, RANK: tl.constexpr, RANKS: tl.constexpr, INNER: tl.constexpr, INNERS: tl.constexpr):
    """Ea whole, ``[INNERS, RANKS]``."""
    inners, ranks = tl.arange(0, INNERS), tl.arange(0, RANKS)
    return tl.load(Ea + offsets(inners, ranks, RANK), mask=inside(inners, ranks, INNER, RANK), other=0.0)


@triton.jit(do_not_specialize=["height"])
def lilora_route_kernel(
    h,
    z,
    Ea,
    weight,
    scale,
    height,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    INNER: tl.constexpr,
    INNERS: tl.constexpr,
    ROWS: tl.constexpr,
    W_BY_VALUE: tl.constexpr,
    S_BY_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z = (a h, b h Eaᵀ)`` ``[height, RANK + INNER]`` of h ``[height, RANK]``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks, inners = tl.arange(0, RANKS), tl.arange(0, INNERS)
    dtype: tl.constexpr = h.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    w = lambda_of(weight, sums, W_BY_VALUE)
    s = lambda_of(scale, sums, S_BY_VALUE)
    there = inside(rows, ranks, height, RANK)
    tile = tl.load(h + offsets(rows, ranks, RANK), mask=there, other=0.0)
    ea = _inner(Ea, RANK, RANKS, INNER, INNERS)
    u = product(tile, tl.trans(ea), tl.zeros((ROWS, INNERS), sums), PRECISION)
    tl.store(z + offsets(rows, ranks, RANK + INNER), (s * w * tile.to(sums)).to(dtype), mask=there)
    z += RANK
    u = (s * (1.0 - w) * u).to(dtype)
    tl.store(z + offsets(rows, inners, RANK + INNER), u, mask=inside(rows, inners, height, INNER))


@triton.jit(do_not_specialize=["height"])
def lilora_unroute_kernel(
    dz,
    h,
    Ea,
    weight,
    scale,
    dh,
    dEa,
    dweight,
    dscale,
    height,
    span,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    INNER: tl.constexpr,
    INNERS: tl.constexpr,
    ROWS: tl.constexpr,
    W_BY_VALUE: tl.constexpr,
    S_BY_VALUE: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_EA: tl.constexpr,
    NEED_NUMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh ``[height, RANK]`` of ``dz = (p, q)`` ``[height, RANK + INNER]`` in the accumulators' dtype.

    Of dEa ``[programs, INNER, RANK]`` and of dw and ds ``[programs]`` a program leaves the share of its rows.
    """
    program = tl.program_id(0).to(tl.int64)
    ranks, inners = tl.arange(0, RANKS), tl.arange(0, INNERS)
    dtype: tl.constexpr = h.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    w = lambda_of(weight, sums, W_BY_VALUE)
    s = lambda_of(scale, sums, S_BY_VALUE)
    ea = _inner(Ea, RANK, RANKS, INNER, INNERS)
    total = tl.zeros((INNERS, RANKS), sums)
    da = tl.zeros((ROWS,), sums)
    db = tl.zeros((ROWS,), sums)
    begin = program * span
    for first in range(begin, min(begin + span, height), ROWS):
        rows = first + tl.arange(0, ROWS)
        there = inside(rows, ranks, height, RANK)
        p = tl.load(dz + offsets(rows, ranks, RANK + INNER), mask=there, other=0.0)
        of_q = inside(rows, inners, height, INNER)
        q = tl.load(dz + RANK + offsets(rows, inners, RANK + INNER), mask=of_q, other=0.0)
        if NEED_EA or NEED_NUMBERS:
            tile = tl.load(h + offsets(rows, ranks, RANK), mask=there, other=0.0)
        if NEED_NUMBERS:  # by u, as t would be of a rounded q
            u = product(tile, tl.trans(ea), tl.zeros((ROWS, INNERS), sums), PRECISION)
            da += tl.sum(p * tile.to(sums), 1)
            db += tl.sum(q * u, 1)
        q = (s * (1.0 - w) * q).to(dtype)
        if NEED_EA:
            total = product(tl.trans(q), tile, total, PRECISION)
        if NEED_H:
            back = product(q, ea, tl.zeros((ROWS, RANKS), sums), PRECISION)
            tl.store(dh + offsets(rows, ranks, RANK), (s * w * p + back).to(dtype), mask=there)
    if NEED_EA:
        at = offsets(program * INNER + inners, ranks, RANK)
        tl.store(dEa + at, total, mask=inside(inners, ranks, INNER, RANK))
    if NEED_NUMBERS:
        tl.store(dweight + program, s * tl.sum(da - db, 0))
        tl.store(dscale + program, tl.sum(w * da + (1.0 - w) * db, 0))


# -- launches ----------------------------------------------------------------------------------------------------------


def forward(y: Tensor, x: Tensor, operands: Any) -> Any:
    """The operator's outputs, or NotImplemented for what the kernels don't compute."""
    branch = operands.branch
    if not _supported(operands, y, x) or not y.numel():
        return NotImplemented
    y = y.contiguous()
    out = torch.empty_like(y)
    ((h, _),) = project(x, [branch])
    accumulate(y, out, route(h, operands), branch, operands.Eb)
    return out, h


def backward(dy: Tensor, h: Tensor, x: Tensor | None, operands: Any, needs: Sequence[bool]) -> Any:
    """The operator's gradients, or NotImplemented."""
    if not _supported(operands, dy, x) or not dy.numel():
        return NotImplemented
    need_x, need_A, need_B, need_Ea, need_Eb, need_weight, need_scale = needs
    branch, (d_out, rank), inner = operands.branch, operands.B.shape, operands.Eb.shape[1]
    h = h.contiguous()
    of_y, of_z = need_B or need_Eb, need_x or need_A or need_Ea or need_weight or need_scale
    dx = dA = dB = dEb = dEa = dweight = dscale = None
    if of_y or of_z:
        z = route(h, operands) if of_y else h.new_empty((0, rank + inner))
        shares, of_parts = output_sums(matrix(dy), z, branch, of_z, of_y, operands.Eb)
    if of_y:
        of_B, of_Eb = parted(of_parts, rank, rank + inner)
        dB = reduced(of_B, h.new_empty(d_out, rank), 1.0) if need_B else None
        dEb = reduced(of_Eb, h.new_empty(d_out, inner), 1.0) if need_Eb else None
    if of_z:
        dz = h.new_empty(h.numel() // rank, rank + inner, dtype=sums_dtype(operands))
        dz = reduced(shares, dz, 1.0, rank + inner)
        dh, dEa, dweight, dscale = unroute(dz, matrix(h), operands, need_x or need_A, *needs[3:4], *needs[5:])
        if dh is not None:
            width = operands.A.shape[1]
            dx = dh.new_empty(dh.shape[0], width, dtype=(dy if x is None else x).dtype) if need_x else None
            (dA,) = input_gradients(x, dx, [dh], [branch], [need_A], add=False)
            dx = None if dx is None else dx.view(*dy.shape[:-1], width)
    return dx, dA, dB, dEa, dEb, dweight, dscale


def _supported(operands: Any, *tensors: Tensor | None) -> bool:
    ranks = operands.B.shape[1] + operands.Eb.shape[1]
    return supported([operands.branch], *tensors) and operands.Eb.numel() > 0 and ranks <= most_rank(operands.A.dtype)


def _by_blas(operands: Any) -> bool:
    """Whether Ea is too large for a program to have whole, beside its gradient."""
    inner, rank = operands.Ea.shape
    return padded(rank) * padded(inner) > MOST_MIX**2


def _meta(h: Tensor, operands: Any) -> tuple[list[Any], dict[str, Any]]:
    """w and s, and what both kernels are compiled for."""
    inner, rank = operands.Ea.shape
    (weight, w_by_value), (scale, s_by_value) = (
        number_argument(number, h.device) for number in (operands.weight, operands.scale)
    )
    rows, warps = ROUTED[max(padded(rank), padded(inner))]
    return [weight, scale], {
        "RANK": rank,
        "RANKS": padded(rank),
        "INNER": inner,
        "INNERS": padded(inner),
        "ROWS": rows,
        "W_BY_VALUE": w_by_value,
        "S_BY_VALUE": s_by_value,
        "PRECISION": precision(h.device),
        "num_warps": warps,
    }


def route(h: Tensor, operands: Any) -> Tensor:
    """``z = (a h, b h Eaᵀ)``, ``[..., r + r̃]``."""
    if _by_blas(operands):
        a, b = operands.factors()
        return torch.cat([(a * h).to(h.dtype), (b * F.linear(h, operands.Ea)).to(h.dtype)], -1)
    numbers, meta = _meta(h, operands)
    z = h.new_empty((*h.shape[:-1], meta["RANK"] + meta["INNER"]))
    height = h.numel() // meta["RANK"]
    launch(
        lilora_route_kernel,
        (cdiv(height, meta["ROWS"]),),
        *(h, z, operands.Ea.contiguous(), *numbers, height),
        **meta,
    )
    return z


def unroute(
    dz: Tensor, h: Tensor, operands: Any, need_h: bool, need_Ea: bool, need_weight: bool, need_scale: bool
) -> tuple[Tensor | None, ...]:
    """dh ``[rows, r]`` and the gradients of Ea, w and s that are asked, of dz ``[rows, r + r̃]`` and h ``[rows, r]``."""
    if _by_blas(operands):
        return _unroute_by_blas(dz, h, operands, need_h, need_Ea, need_weight, need_scale)
    numbers, meta = _meta(h, operands)
    Ea, height, need_numbers = operands.Ea.contiguous(), h.shape[0], need_weight or need_scale
    span, programs = spans(height, meta["ROWS"], 1, programs_for(h.device), LEAST_ROWS)
    dh = torch.empty_like(h) if need_h else h
    of_Ea = h.new_empty(programs * Ea.numel() if need_Ea else 1, dtype=sums_dtype(operands))
    of_weight, of_scale = (h.new_empty(programs if need_numbers else 1, dtype=of_Ea.dtype) for _ in range(2))
    launch(
        lilora_unroute_kernel,
        (programs,),
        *(dz, h, Ea, *numbers, dh, of_Ea, of_weight, of_scale, height, span),
        **meta,
        NEED_H=need_h,
        NEED_EA=need_Ea,
        NEED_NUMBERS=need_numbers,
    )
    return (
        dh if need_h else None,
        reduced(of_Ea, torch.empty_like(Ea), 1.0) if need_Ea else None,
        of_weight.sum().to(operands.weight) if need_weight else None,
        of_scale.sum().to(operands.scale) if need_scale else None,
    )


def _unroute_by_blas(
    dz: Tensor, h: Tensor, operands: Any, need_h: bool, need_Ea: bool, need_weight: bool, need_scale: bool
) -> tuple[Tensor | None, ...]:
    p, q = dz.split([h.shape[1], operands.Ea.shape[0]], 1)
    t = q @ operands.Ea.to(q.dtype)
    a, b = operands.factors()
    dweight = dscale = None
    if need_weight or need_scale:
        weight, scale = (number.to(dz.dtype) for number in (operands.weight, operands.scale))
        da, db = (p * h).sum(), (t * h).sum()
        dweight = (scale * (da - db)).to(operands.weight) if need_weight else None
        dscale = (weight * da + (1.0 - weight) * db).to(operands.scale) if need_scale else None
    return (
        (a * p + b * t).to(h.dtype) if need_h else None,
        ((b * q).to(h.dtype).t() @ h).to(operands.Ea.dtype) if need_Ea else None,
        dweight,
        dscale,
    )
