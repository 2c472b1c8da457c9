"""``h = drop(x) Aᵀ`` of up to three branches that read the same x, and what gate and mix make of h.

A program takes ROWS rows of x and a part of the columns; x is read once, whatever the number of branches, each of
which has a mask of its own, made in registers. Where the columns are parted, the program leaves its sum in a buffer,
and ``_reduce`` adds the parts up in their order: the same result in every run.
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
    Dropout,
    filled,
    gate_matrix,
    matrix,
    padded,
    parts_dtype,
    precision,
    together,
)
from mbf.kernels._reduce import reduced
from mbf.kernels._tiles import inside, offsets, product
from mbf.kernels._tune import config_for, launched, programs_for
from mbf.kernels.philox import kept
from torch import Tensor
from torch.nn import functional as F

_LEAST_COLUMNS = 512  # of a part
ROUTED = {16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (16, 8), 256: (16, 8)}  # rows and warps of a program, by ranks


@triton.jit
def _add(
    tile,
    A,
    seed,
    total,
    rows,
    columns,
    first,
    width,
    least,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + drop(tile) Aᵀ, without the factor of dropout."""
    ranks = tl.arange(0, total.shape[1]).to(tl.int64)
    a = tl.load(A + offsets(ranks, columns, width), mask=inside(ranks, columns, RANK, width), other=0.0)
    if DROP:
        tile = tl.where(kept(seed, least, rows, first, width, COLUMNS, ALIGNED), tile, 0.0)
    return product(tile.to(a.dtype), tl.trans(a), total, PRECISION)


@triton.jit
def _put(h, total, rows, part, height, RANK: tl.constexpr):
    ranks = tl.arange(0, total.shape[1])
    at = offsets(part.to(tl.int64) * height + rows, ranks, RANK)
    tl.store(h + at, total.to(h.dtype.element_ty), mask=inside(rows, ranks, height, RANK))


@triton.jit(do_not_specialize=["height", "least"])
def project_kernel(
    x,
    A0,
    A1,
    A2,
    seed0,
    seed1,
    seed2,
    h0,
    h1,
    h2,
    height,
    width,
    stride,
    span,
    least,
    factor,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h ``[parts, height, RANK]`` of COUNT branches; ``factor`` multiplies it."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    sums: tl.constexpr = tl.float64 if A0.dtype.element_ty == tl.float64 else tl.float32
    total0 = tl.zeros((ROWS, RANKS), sums)
    total1 = total0
    total2 = total0
    key0 = tl.load(seed0) if DROP else 0
    key1 = tl.load(seed1) if DROP and COUNT > 1 else 0
    key2 = tl.load(seed2) if DROP and COUNT > 2 else 0
    begin = part * span
    for first in range(begin, min(begin + span, width), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        tile = tl.load(x + offsets(rows, columns, stride), mask=inside(rows, columns, height, width), other=0.0)
        total0 = _add(
            tile, A0, key0, total0, rows, columns, first, width, least, RANK, COLUMNS, DROP, ALIGNED, PRECISION
        )
        if COUNT > 1:
            total1 = _add(
                tile, A1, key1, total1, rows, columns, first, width, least, RANK, COLUMNS, DROP, ALIGNED, PRECISION
            )
        if COUNT > 2:
            total2 = _add(
                tile, A2, key2, total2, rows, columns, first, width, least, RANK, COLUMNS, DROP, ALIGNED, PRECISION
            )
    _put(h0, total0 * factor, rows, part, height, RANK)
    if COUNT > 1:
        _put(h1, total1 * factor, rows, part, height, RANK)
    if COUNT > 2:
        _put(h2, total2 * factor, rows, part, height, RANK)


@triton.jit
def mixed(h, mix, RANK: tl.constexpr, RANKS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """``h mixᵀ`` or, TRANSPOSED, ``h mix``, in fp32 or more, of h and mix in h's dtype."""
    ranks = tl.arange(0, RANKS)
    tile = tl.load(mix + offsets(ranks, ranks, RANK), mask=inside(ranks, ranks, RANK, RANK), other=0.0).to(h.dtype)
    sums: tl.constexpr = tl.float64 if h.dtype == tl.float64 else tl.float32
    total = tl.zeros((h.shape[0], RANKS), sums)
    return product(h, tile if TRANSPOSED else tl.trans(tile), total, PRECISION)


@triton.jit(do_not_specialize=["height"])
def route_kernel(
    h,
    z,
    gate,
    mix,
    height,
    gate_stride,
    gate_step,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    GATE: tl.constexpr,
    MIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z = gate ⊙ (h mixᵀ)`` for h and z ``[height, RANK]``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    at = offsets(rows, ranks, RANK)
    there = inside(rows, ranks, height, RANK)
    dtype: tl.constexpr = h.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    u = tl.load(h + at, mask=there, other=0.0)
    u = mixed(u, mix, RANK, RANKS, False, PRECISION) if MIX else u.to(sums)
    if GATE:
        g = tl.load(gate + rows[:, None] * gate_stride + ranks[None, :] * gate_step, mask=there, other=0.0)
        u *= g.to(sums)
    tl.store(z + at, u.to(dtype), mask=there)


# -- launches ----------------------------------------------------------------------------------------------------------


def project(x: Tensor, branches: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """h and z of each branch, both ``[..., r]`` in its dtype; z is h where there is no gate and no mix."""
    found: list[Any] = [None] * len(branches)
    for numbers in together(branches):
        for n, h in zip(numbers, _project(x, [branches[n] for n in numbers]), strict=True):
            found[n] = h, route(h, branches[n])
    return found


def _project(x: Tensor, alike: Sequence[Any]) -> list[Tensor]:
    rows = matrix(x)
    height, width = rows.shape
    rank = alike[0].A.shape[0]
    factors = [branch.A.contiguous() for branch in alike]
    hs = [A.new_empty((*x.shape[:-1], rank)) for A in factors]

    def run(config: Config) -> list[Tensor]:
        """h where it is finished, else its parts."""
        blocks = cdiv(height, config.rows)
        span, parts = spans(width, config.columns, blocks, programs_for(x.device), _LEAST_COLUMNS)
        of_parts = hs
        if isinstance(parts, torch.SymInt) or parts > 1:
            of_parts = [A.new_empty(parts * height * rank, dtype=parts_dtype(alike[0])) for A in factors]
        _launch_project(rows, factors, alike, of_parts, (blocks, parts), span, config)
        return of_parts

    name = "project" if len(alike) == 1 else "project_group"
    form = (len(alike), Dropout.of(alike[0]).on)
    sums = launched(config_for(name, padded(rank), factors[0], x.dtype, (height, width), form, run), run)
    return hs if sums is hs else [reduced(of_parts, h, 1.0, rank) for of_parts, h in zip(sums, hs, strict=True)]


def _launch_project(
    rows: Tensor,
    factors: Sequence[Tensor],
    alike: Sequence[Any],
    out: Sequence[Tensor],
    grid: tuple[int, int],
    span: int,
    config: Config,
) -> None:
    height, width = rows.shape
    dropout = Dropout.of(alike[0])
    launch(
        project_kernel,
        grid,
        rows,
        *filled(factors),
        *filled([branch.seed if dropout.on else rows for branch in alike]),
        *filled(out),
        height,
        width,
        rows.stride(0),
        span,
        dropout.least,
        dropout.factor,
        RANK=factors[0].shape[0],
        RANKS=padded(factors[0].shape[0]),
        ROWS=config.rows,
        COLUMNS=config.columns,
        COUNT=len(alike),
        DROP=dropout.on,
        ALIGNED=width % 8 == 0,
        PRECISION=precision(rows.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def route(h: Tensor, branch: Any) -> Tensor:
    """``z = gate ⊙ (h mixᵀ)``: h itself where there is neither."""
    if branch.gate is None and branch.mix is None:
        return h
    rank = h.shape[-1]
    if branch.mix is not None and padded(rank) > MOST_MIX:
        u = F.linear(h, branch.mix.to(h.dtype))
        return u if branch.gate is None else (u * branch.gate).to(h.dtype)
    gate, mix, z = gate_matrix(branch, h), branch.mix, torch.empty_like(h)
    height = h.numel() // rank
    rows, warps = ROUTED[padded(rank)]
    launch(
        route_kernel,
        (cdiv(height, rows),),
        h,
        z,
        h if gate is None else gate,
        h if mix is None else mix.contiguous(),
        height,
        0 if gate is None else gate.stride(0),
        0 if gate is None else gate.stride(1),
        RANK=rank,
        RANKS=padded(rank),
        ROWS=rows,
        GATE=gate is not None,
        MIX=mix is not None,
        PRECISION=precision(h.device),
        num_warps=warps,
    )
    return z
