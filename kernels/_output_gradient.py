"""One pass over dy, for ``dB̂ = s dyᵀ z`` and ``dz = s dy B̂``, and what becomes of the two.

A program takes COLUMNS columns of dy and goes down its part of the rows: the sum for its columns of dB̂ stays in
registers, and a row's share of dz, which is a sum over the columns, goes to a buffer. ``_reduce`` adds up both.
``unroute_kernel`` takes the gradient of z back through gate and mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels._configs import Config
from mbf.kernels._launch import cdiv, launch, spans
from mbf.kernels._operands import (
    MOST_MIX,
    gate_matrix,
    matrix,
    most_rank,
    padded,
    parts_dtype,
    precision,
    sums_dtype,
    weight_argument,
)
from mbf.kernels._project import ROUTED, mixed, route
from mbf.kernels._reduce import LEAST_ROWS, reduced, reduced_B
from mbf.kernels._tiles import effective_B, inside, joined, offsets, product
from mbf.kernels._tune import config_for, launched, programs_for
from torch import Tensor
from torch.nn import functional as F


@triton.jit(do_not_specialize=["height"])
def output_gradient_kernel(
    dy,
    z,
    B,
    merged_B,
    weight,
    dz,
    dB,
    height,
    width,
    stride,
    span,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_B: tl.constexpr,
    MERGED: tl.constexpr,
    BY_VALUE: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Shares of dz ``[stripes, height, RANK]`` and of dB̂ ``[parts, width, RANK]``, both without s and of any dtype.

    With FIRST, B̂ is (B, merged_B), and all parts ``[width, FIRST]`` of dB stand before those of the other's gradient.
    """
    stripe = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    columns = stripe * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    dtype: tl.constexpr = B.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    if NEED_Z and FIRST:
        b = joined(B, merged_B, columns, ranks, width, RANK, FIRST)
    elif NEED_Z:
        b = effective_B(B, merged_B, weight, columns, ranks, width, RANK, MERGED, BY_VALUE)
    total = tl.zeros((COLUMNS, RANKS), sums)
    begin = part * span
    for first in range(begin, min(begin + span, height), ROWS):
        rows = first + tl.arange(0, ROWS)
        tile = tl.load(dy + offsets(rows, columns, stride), mask=inside(rows, columns, height, width), other=0.0)
        tile = tile.to(dtype)
        at = offsets(rows, ranks, RANK)
        there = inside(rows, ranks, height, RANK)
        if NEED_Z:
            share = product(tile, b, tl.zeros((ROWS, RANKS), sums), PRECISION)
            tl.store(dz + stripe * height * RANK + at, share.to(dz.dtype.element_ty), mask=there)
        if NEED_B:
            total = product(tl.trans(tile), tl.load(z + at, mask=there, other=0.0), total, PRECISION)
    total = total.to(dB.dtype.element_ty)
    if NEED_B and FIRST:
        at_B = offsets(part * width + columns, ranks, FIRST)
        tl.store(dB + at_B, total, mask=inside(columns, ranks, width, FIRST))
        dB += tl.num_programs(1).to(tl.int64) * width * FIRST
        at_B = offsets(part * width + columns, ranks - FIRST, RANK - FIRST)
        tl.store(dB + at_B, total, mask=inside(columns, ranks, width, RANK) & (ranks >= FIRST)[None, :])
    elif NEED_B:
        at_B = offsets(part * width + columns, ranks, RANK)
        tl.store(dB + at_B, total, mask=inside(columns, ranks, width, RANK))


@triton.jit(do_not_specialize=["height"])
def unroute_kernel(
    dz,
    h,
    gate,
    mix,
    dgate,
    du,
    dh,
    height,
    gate_stride,
    gate_step,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    GATE: tl.constexpr,
    MIX: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_MIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh of dz ``[height, RANK]``, in the accumulators' dtype; also ``dz ⊙ u`` into dgate and ``gate ⊙ dz`` into du."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    at = offsets(rows, ranks, RANK)
    there = inside(rows, ranks, height, RANK)
    dtype: tl.constexpr = dh.dtype.element_ty
    total = tl.load(dz + at, mask=there, other=0.0)
    if NEED_GATE:
        u = tl.load(h + at, mask=there, other=0.0)
        if MIX:
            u = mixed(u, mix, RANK, RANKS, False, PRECISION)
        tl.store(dgate + at, total * u.to(total.dtype), mask=there)
    if GATE:
        g = tl.load(gate + rows[:, None] * gate_stride + ranks[None, :] * gate_step, mask=there, other=0.0)
        total *= g.to(total.dtype)
    if NEED_MIX:
        tl.store(du + at, total.to(dtype), mask=there)
    if MIX:
        total = mixed(total.to(dtype), mix, RANK, RANKS, True, PRECISION)
    tl.store(dh + at, total.to(dtype), mask=there)


# -- launches ----------------------------------------------------------------------------------------------------------


def output_gradients(
    dy: Tensor, h: Tensor, branch: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Everything that comes from dy.

    Args:
        dy: ``[..., d_out]``.
        h: ``[..., r]``.
        needs: which gradients are asked: of x, A, B, gate, mix, merged_B, merge_weight.

    Returns:
        dh ``[rows, r]`` if x's, A's, gate's or mix's is asked, and the gradients of B, gate, mix, merged_B and
        merge_weight.
    """
    _, _, need_B, need_gate, need_mix, need_merged_B, need_weight = needs
    need_z = needs[0] or needs[1] or need_gate or need_mix
    need_B_hat = need_B or need_merged_B or need_weight
    if not (need_z or need_B_hat):
        return None, [None] * 5
    dy, h = matrix(dy), h.contiguous()
    z = route(h, branch) if need_B_hat else h
    shares, of_parts = output_sums(dy, z, branch, need_z, need_B_hat)
    dB = dmerged_B = dweight = dgate = dmix = dh = None
    if need_B_hat and branch.merged_B is None:
        dB = reduced(of_parts, torch.empty_like(branch.B, memory_format=torch.contiguous_format), branch.scale)
    elif need_B_hat:
        dB, dmerged_B, dweight = reduced_B(of_parts, branch, [need_B, need_merged_B, need_weight])
    if need_z:
        dh, dgate, dmix = unroute(shares, h, branch, need_gate, need_mix)
    return dh, [dB, dgate, dmix, dmerged_B, dweight]


def output_sums(
    dy: Tensor, z: Tensor, branch: Any, need_z: bool, need_B: bool, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The shares ``[stripes, rows, r]`` of dz and the parts ``[parts, d_out, r]`` of dB̂, both flat, without s.

    Args:
        dy: ``[rows, d_out]``, its rows contiguous.
        z: ``[..., r]``, of which the shape alone counts without ``need_B``.
        more: with it, B̂ is (B, more), and the parts of dB stand before those of the other's gradient: ``parted``.
    """
    B = branch.B.contiguous()

    def run(config: Config) -> tuple[Tensor, Tensor]:
        return _launch_output_gradient(dy, z, B, branch, need_z, need_B, more, config)

    ranks = padded(z.shape[-1])
    if more is not None:  # two matrices take more registers than one: the tile of twice the ranks
        ranks = min(2 * ranks, most_rank(B.dtype))
    form = (need_z, need_B, branch.merged_B is not None, more is not None)
    return launched(config_for("output_gradient", ranks, B, dy.dtype, tuple(dy.shape), form, run), run)


def parted(of_parts: Tensor, first: int, rank: int) -> list[Tensor]:
    """The parts ``[parts, d_out, first]`` and ``[parts, d_out, r - first]`` of ``[parts, d_out, r]``, flat."""
    columns = of_parts.shape[0] // rank
    return list(of_parts.split([columns * first, columns * (rank - first)]))


def _launch_output_gradient(
    dy: Tensor, z: Tensor, B: Tensor, branch: Any, need_z: bool, need_B: bool, more: Tensor | None, config: Config
) -> tuple[Tensor, Tensor]:
    (height, width), rank = dy.shape, z.shape[-1]
    stripes = cdiv(width, config.columns)
    span, parts = spans(height, config.rows, stripes, programs_for(dy.device), LEAST_ROWS)
    dz = z.new_empty(stripes * height * rank if need_z else 1, dtype=parts_dtype(branch))
    dB = z.new_empty(parts * width * rank if need_B else 1, dtype=parts_dtype(branch))
    merged = branch.merged_B is not None
    weight, by_value = weight_argument(branch, dy.device)
    launch(
        output_gradient_kernel,
        (stripes, parts),
        dy,
        z,
        B,
        branch.merged_B.contiguous() if merged else B if more is None else more.contiguous(),
        weight,
        dz,
        dB,
        height,
        width,
        dy.stride(0),
        span,
        RANK=rank,
        RANKS=padded(rank),
        ROWS=config.rows,
        COLUMNS=config.columns,
        NEED_Z=need_z,
        NEED_B=need_B,
        MERGED=merged,
        BY_VALUE=by_value,
        FIRST=0 if more is None else B.shape[1],
        PRECISION=precision(dy.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dz, dB


def unroute(
    shares: Tensor, h: Tensor, branch: Any, need_gate: bool, need_mix: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh ``[rows, r]`` from dz's shares without s, and the gradients of gate and mix."""
    rank = h.shape[-1]
    height = h.numel() // rank
    dh = h.new_empty(height, rank)
    if branch.gate is None and branch.mix is None:
        return reduced(shares, dh, branch.scale, rank), None, None
    dz = reduced(shares, h.new_empty(height, rank, dtype=sums_dtype(branch)), branch.scale, rank)
    gate, mix, u = gate_matrix(branch, h), branch.mix, h
    by_blas = mix is not None and padded(rank) > MOST_MIX
    if by_blas:
        u = F.linear(h, mix.to(h.dtype)) if need_gate else h
        mix = None
    du = torch.empty_like(dh) if need_mix and not by_blas else dh
    products = torch.empty_like(dz).view(h.shape) if need_gate else dz
    rows, warps = ROUTED[padded(rank)]
    launch(
        unroute_kernel,
        (cdiv(height, rows),),
        dz,
        u,
        h if gate is None else gate,
        h if mix is None else mix.contiguous(),
        products,
        du,
        dh,
        height,
        0 if gate is None else gate.stride(0),
        0 if gate is None else gate.stride(1),
        RANK=rank,
        RANKS=padded(rank),
        ROWS=rows,
        GATE=gate is not None,
        MIX=mix is not None,
        NEED_GATE=need_gate,
        NEED_MIX=need_mix and not by_blas,
        PRECISION=precision(h.device),
        num_warps=warps,
    )
    dgate = products.sum_to_size(branch.gate.shape).to(branch.gate.dtype) if need_gate else None
    dmix = (du.t() @ matrix(h)).to(branch.mix.dtype) if need_mix else None
    return dh @ branch.mix.to(h.dtype) if by_blas else dh, dgate, dmix
