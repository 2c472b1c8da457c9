"""``out = y + s z B̂ᵀ``.

A program takes COLUMNS columns, for which it makes B̂ once, and goes down its part of the rows, so that of every element
of y no more than y itself and a share of z is read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels._configs import Config
from mbf.kernels._launch import cdiv, launch, spans
from mbf.kernels._operands import padded, precision, weight_argument
from mbf.kernels._tiles import effective_B, inside, joined, offsets, product
from mbf.kernels._tune import config_for, launched, programs_for
from torch import Tensor


@triton.jit(do_not_specialize=["height"])
def accumulate_kernel(
    y,
    out,
    z,
    B,
    merged_B,
    weight,
    scale,
    height,
    width,
    span,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MERGED: tl.constexpr,
    BY_VALUE: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y and out ``[height, width]``, contiguous; out may be y. With FIRST, B̂ is (B, merged_B): ``joined``."""
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    if FIRST:
        b = tl.trans(joined(B, merged_B, columns, ranks, width, RANK, FIRST))
    else:
        b = tl.trans(effective_B(B, merged_B, weight, columns, ranks, width, RANK, MERGED, BY_VALUE))
    sums: tl.constexpr = tl.float64 if b.dtype == tl.float64 else tl.float32
    begin = tl.program_id(1).to(tl.int64) * span
    for first in range(begin, min(begin + span, height), ROWS):
        rows = first + tl.arange(0, ROWS)
        left = tl.load(z + offsets(rows, ranks, RANK), mask=inside(rows, ranks, height, RANK), other=0.0)
        at = offsets(rows, columns, width)
        there = inside(rows, columns, height, width)
        tile = tl.load(y + at, mask=there, other=0.0)
        branch = scale * product(left, b, tl.zeros((ROWS, COLUMNS), sums), PRECISION)
        tl.store(out + at, (tile.to(sums) + branch).to(out.dtype.element_ty), mask=there)


def accumulate(y: Tensor, out: Tensor, z: Tensor, branch: Any, more: Tensor | None = None) -> None:
    """``out = y + s z B̂ᵀ`` for y and out ``[..., d_out]``, contiguous; out may be y. With ``more``, B̂ is (B, more)."""
    width, rank = branch.B.shape[0], z.shape[-1]
    height = y.numel() // width
    B = branch.B.contiguous()
    merged = branch.merged_B is not None
    weight, by_value = weight_argument(branch, y.device)
    second = branch.merged_B.contiguous() if merged else B if more is None else more.contiguous()

    def run(config: Config, out: Tensor) -> None:
        stripes = cdiv(width, config.columns)
        span, parts = spans(height, config.rows, stripes, programs_for(y.device), config.rows)
        launch(
            accumulate_kernel,
            (stripes, parts),
            y,
            out,
            z,
            B,
            second,
            weight,
            branch.scale,
            height,
            width,
            span,
            RANK=rank,
            RANKS=padded(rank),
            ROWS=config.rows,
            COLUMNS=config.columns,
            MERGED=merged,
            BY_VALUE=by_value,
            FIRST=0 if more is None else branch.B.shape[1],
            PRECISION=precision(y.device),
            num_warps=config.warps,
            num_stages=config.stages,
        )

    form = (merged, more is not None)
    config = config_for(
        "accumulate", padded(rank), B, y.dtype, (height, width), form, lambda one: run(one, torch.empty_like(y))
    )
    launched(config, lambda one: run(one, out))
