"""One pass over x and dx, for ``dA = dhᵀ drop(x)`` and ``dx += drop(dh A)`` of up to three branches that read x.

A program takes COLUMNS columns of x and goes down its part of the rows. The mask of a tile serves both gradients; dx is
read and written once for all branches; the sums for dA stay in registers, and ``reduce_kernel`` adds up the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels._configs import Config
from mbf.kernels._launch import cdiv, launch, spans
from mbf.kernels._operands import Dropout, filled, matrix, padded, parts_dtype, precision, together
from mbf.kernels._reduce import LEAST_ROWS, reduced
from mbf.kernels._tiles import inside, offsets, product
from mbf.kernels._tune import config_for, launched, programs_for
from mbf.kernels.philox import kept
from torch import Tensor


@triton.jit
def _branch(
    tile,
    total,
    dx,
    a,
    dh,
    seed,
    rows,
    first,
    height,
    width,
    least,
    factor,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_A: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total, of dA, and dx, both with what this branch adds."""
    ranks = tl.arange(0, total.shape[0])
    g = tl.load(dh + offsets(rows, ranks, RANK), mask=inside(rows, ranks, height, RANK), other=0.0)
    if DROP:
        keep = kept(seed, least, rows, first, width, COLUMNS, ALIGNED)
    if NEED_A:
        dropped = tl.where(keep, tile, 0.0) if DROP else tile
        total = product(tl.trans(g), dropped.to(g.dtype), total, PRECISION)
    if NEED_X:
        back = product(g, a, tl.zeros((rows.shape[0], COLUMNS), total.dtype), PRECISION)
        dx += tl.where(keep, back * factor, 0.0) if DROP else back
    return total, dx


@triton.jit
def _columns_of(A, columns, width, RANK: tl.constexpr, RANKS: tl.constexpr):
    ranks = tl.arange(0, RANKS).to(tl.int64)
    return tl.load(A + offsets(ranks, columns, width), mask=inside(ranks, columns, RANK, width), other=0.0)


@triton.jit
def _put(dA, total, part, columns, width, RANK: tl.constexpr):
    ranks = tl.arange(0, total.shape[0]).to(tl.int64)
    at = offsets(part * RANK + ranks, columns, width)
    tl.store(dA + at, total.to(dA.dtype.element_ty), mask=inside(ranks, columns, RANK, width))


@triton.jit(do_not_specialize=["height", "least"])
def input_gradient_kernel(
    x,
    dx,
    A0,
    A1,
    A2,
    seed0,
    seed1,
    seed2,
    dh0,
    dh1,
    dh2,
    dA0,
    dA1,
    dA2,
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
    NEED_X: tl.constexpr,
    NEED_A: tl.constexpr,
    ADD: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx ``[height, width]``, contiguous, added to or, where not ADD, written; dA ``[parts, RANK, width]`` each, of any
    dtype.

    ``factor``, that of dropout, goes into dx here and into dA by ``reduce_kernel``.
    """
    first_column = (tl.program_id(0) * COLUMNS).to(tl.int64)
    columns = first_column + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    sums: tl.constexpr = tl.float64 if A0.dtype.element_ty == tl.float64 else tl.float32
    total0 = tl.zeros((RANKS, COLUMNS), sums)
    total1 = total0
    total2 = total0
    a0 = _columns_of(A0, columns, width, RANK, RANKS)
    a1 = _columns_of(A1, columns, width, RANK, RANKS) if COUNT > 1 else a0
    a2 = _columns_of(A2, columns, width, RANK, RANKS) if COUNT > 2 else a0
    key0 = tl.load(seed0) if DROP else 0
    key1 = tl.load(seed1) if DROP and COUNT > 1 else 0
    key2 = tl.load(seed2) if DROP and COUNT > 2 else 0
    begin = part * span
    for first in range(begin, min(begin + span, height), ROWS):
        rows = first + tl.arange(0, ROWS)
        there = inside(rows, columns, height, width)
        at = offsets(rows, columns, width)
        tile = tl.zeros((ROWS, COLUMNS), sums)
        if NEED_A:
            tile = tl.load(x + offsets(rows, columns, stride), mask=there, other=0.0)
        more = tl.zeros((ROWS, COLUMNS), sums)
        if NEED_X and ADD:
            more += tl.load(dx + at, mask=there, other=0.0).to(sums)
        total0, more = _branch(
            tile, total0, more, a0, dh0, key0, rows, first_column, height, width, least, factor,
            RANK, COLUMNS, NEED_X, NEED_A, DROP, ALIGNED, PRECISION,
        )  # fmt: skip
        if COUNT > 1:
            total1, more = _branch(
                tile, total1, more, a1, dh1, key1, rows, first_column, height, width, least, factor,
                RANK, COLUMNS, NEED_X, NEED_A, DROP, ALIGNED, PRECISION,
            )  # fmt: skip
        if COUNT > 2:
            total2, more = _branch(
                tile, total2, more, a2, dh2, key2, rows, first_column, height, width, least, factor,
                RANK, COLUMNS, NEED_X, NEED_A, DROP, ALIGNED, PRECISION,
            )  # fmt: skip
        if NEED_X:
            tl.store(dx + at, more.to(dx.dtype.element_ty), mask=there)
    if NEED_A:
        _put(dA0, total0, part, columns, width, RANK)
        if COUNT > 1:
            _put(dA1, total1, part, columns, width, RANK)
        if COUNT > 2:
            _put(dA2, total2, part, columns, width, RANK)


# -- launches ----------------------------------------------------------------------------------------------------------


def input_gradients(
    x: Tensor | None,
    dx: Tensor | None,
    dhs: Sequence[Tensor],
    branches: Sequence[Any],
    need_As: Sequence[bool],
    add: bool = True,
) -> list[Tensor | None]:
    """Add ``drop(dh A)`` of every branch to dx, and return each gradient of A that is asked.

    Args:
        x: ``[..., d_in]``; read for the gradients of A only.
        dx: ``[rows, d_in]``, contiguous, or None where it isn't asked.
        dhs: ``[rows, r]`` each.
        need_As: which gradients of A are asked.
        add: to what dx holds; otherwise it is overwritten.
    """
    found: list[Tensor | None] = [None] * len(branches)
    for need_A in (True, False):
        members = [n for n, need in enumerate(need_As) if need == need_A]
        if dx is None and not need_A:
            continue
        for places in together([branches[n] for n in members]):
            numbers = [members[place] for place in places]
            gradients = _input_gradients(
                x if need_A else None, dx, [dhs[n] for n in numbers], [branches[n] for n in numbers], add
            )
            add = True
            for n, gradient in zip(numbers, gradients, strict=True):
                found[n] = gradient
    return found


def _input_gradients(
    x: Tensor | None, dx: Tensor | None, dhs: Sequence[Tensor], alike: Sequence[Any], add: bool
) -> list[Tensor | None]:
    factors = [branch.A.contiguous() for branch in alike]
    rank, width = factors[0].shape

    def run(config: Config, dx: Tensor | None) -> list[Tensor]:
        return _launch_input_gradient(x, dx, dhs, factors, alike, add, config)

    config = config_for(
        "input_gradient" if len(alike) == 1 else "input_gradient_group",
        padded(rank),
        factors[0],
        next((one.dtype for one in (x, dx) if one is not None), dhs[0].dtype),
        (dhs[0].shape[0], width),
        (len(alike), x is None, dx is None, add, Dropout.of(alike[0]).on),
        lambda one: run(one, None if dx is None else torch.empty_like(dx)),
    )
    sums = launched(config, lambda one: run(one, dx))
    if x is None:
        return [None] * len(alike)
    factor = Dropout.of(alike[0]).factor
    return [reduced(of_parts, torch.empty_like(A), factor) for of_parts, A in zip(sums, factors, strict=True)]


def _launch_input_gradient(
    x: Tensor | None,
    dx: Tensor | None,
    dhs: Sequence[Tensor],
    factors: Sequence[Tensor],
    alike: Sequence[Any],
    add: bool,
    config: Config,
) -> list[Tensor]:
    """Change dx, and return the parts of each dA without the factor of dropout."""
    (height, rank), width = dhs[0].shape, factors[0].shape[1]
    dropout = Dropout.of(alike[0])
    rows = dhs[0] if x is None else matrix(x)
    stripes = cdiv(width, config.columns)
    span, parts = spans(height, config.rows, stripes, programs_for(rows.device), LEAST_ROWS)
    sums = [A.new_empty(parts * rank * width if x is not None else 1, dtype=parts_dtype(alike[0])) for A in factors]
    # In a pipeline, dh in fp32 that only dA needs would be loaded to be read transposed, 4 bytes at a time.
    pipelined = dx is not None or factors[0].dtype.itemsize == 2
    launch(
        input_gradient_kernel,
        (stripes, parts),
        rows,
        rows if dx is None else dx,
        *filled(factors),
        *filled([branch.seed if dropout.on else rows for branch in alike]),
        *filled([dh.contiguous() for dh in dhs]),
        *filled(sums),
        height,
        width,
        rows.stride(0),
        span,
        dropout.least,
        dropout.factor,
        RANK=rank,
        RANKS=padded(rank),
        ROWS=config.rows,
        COLUMNS=config.columns,
        COUNT=len(alike),
        NEED_X=dx is not None,
        NEED_A=x is not None,
        ADD=add,
        DROP=dropout.on,
        ALIGNED=width % 8 == 0,
        PRECISION=precision(rows.device),
        num_warps=config.warps,
        num_stages=config.stages if pipelined else 1,
    )
    return sums
