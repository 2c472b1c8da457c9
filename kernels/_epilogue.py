"""The base product with the branch in its epilogue, ``y = x W' + b + s · drop(left right)``: y is written once.

Forward, W' is Wᵀ, left z and right B̂ᵀ; for dx, x is dy, W' is W, left dh and right A. It saves the trip of y or dx
through memory, and loses what the vendor's BLAS is better at its product; which is more, the GPU must say (``_tune``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels._configs import Config
from mbf.kernels._launch import cdiv, launch
from mbf.kernels._operands import Dropout, matrix, padded, precision, weight_argument
from mbf.kernels._tiles import effective_B, inside, offsets, product
from mbf.kernels._tune import config_for, launched
from mbf.kernels.philox import kept
from torch import Tensor

_DEPTH = 64
_GROUP = 8  # blocks of rows that follow each other in one stripe of columns, whose W then stays in the L2 cache
HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def _block(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The block of rows and that of columns of this program."""
    program = tl.program_id(0)
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    group = program // (GROUP * across)
    rows = min(down - group * GROUP, GROUP)
    within = program % (GROUP * across)
    return group * GROUP + within % rows, within // rows


@triton.jit(do_not_specialize=["height", "least"])
def epilogue_kernel(
    x,
    W,
    bias,
    left,
    right,
    merged_B,
    weight,
    seed,
    y,
    height,
    width,
    depth,
    stride,
    scale,
    least,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FORWARD: tl.constexpr,
    BIAS: tl.constexpr,
    MERGED: tl.constexpr,
    BY_VALUE: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x ``[height, depth]``, y ``[height, width]``; the rows of x are ``stride`` apart, all else is contiguous."""
    down, across = _block(height, width, ROWS, COLUMNS, GROUP)
    rows = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = across * COLUMNS
    columns = first.to(tl.int64) + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        deep = start + tl.arange(0, DEPTH)
        a = tl.load(x + offsets(rows, deep, stride), mask=inside(rows, deep, height, depth), other=0.0)
        if FORWARD:
            w = tl.load(W + offsets(columns, deep, depth), mask=inside(columns, deep, width, depth), other=0.0)
            total = product(a, tl.trans(w), total, PRECISION)
        else:
            deep = deep.to(tl.int64)
            w = tl.load(W + offsets(deep, columns, width), mask=inside(deep, columns, depth, width), other=0.0)
            total = product(a, w, total, PRECISION)
    ranks = tl.arange(0, RANKS)
    z = tl.load(left + offsets(rows, ranks, RANK), mask=inside(rows, ranks, height, RANK), other=0.0)
    if FORWARD:
        b = tl.trans(effective_B(right, merged_B, weight, columns, ranks, width, RANK, MERGED, BY_VALUE))
    else:
        ranks = ranks.to(tl.int64)
        b = tl.load(right + offsets(ranks, columns, width), mask=inside(ranks, columns, RANK, width), other=0.0)
    branch = product(z, b, tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION)
    if DROP:
        branch = tl.where(kept(tl.load(seed), least, rows, first, width, COLUMNS, ALIGNED), branch, 0.0)
    total += scale * branch
    if BIAS:
        total += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets(rows, columns, width), total.to(y.dtype.element_ty), mask=inside(rows, columns, height, width))


def possible(x: Tensor, W: Tensor, branch: Any) -> bool:
    """Whether the product is one of half types, for which alone this can be faster than the BLAS, and fits."""
    fits = branch.A.shape[0] <= (256 if branch.A.dtype in HALVES else 64)
    return fits and x.dtype in HALVES and W.dtype == x.dtype and W.is_contiguous()


def forward(x: Tensor, W: Tensor, bias: Tensor | None, z: Tensor, branch: Any) -> Tensor:
    """``x Wᵀ + b + s z B̂ᵀ``."""
    y = x.new_empty((*x.shape[:-1], W.shape[0]))
    _product(matrix(x), W, bias, z, branch, y, branch.scale)
    return y


def input_gradient(dy: Tensor, W: Tensor, dh: Tensor, branch: Any) -> Tensor:
    """``dy W + drop(dh A)`` for dy ``[rows, d_out]``."""
    dx = dy.new_empty((dy.shape[0], W.shape[1]))
    _product(dy, W, None, dh, branch, dx, None)
    return dx


def _product(
    x: Tensor, W: Tensor, bias: Tensor | None, left: Tensor, branch: Any, y: Tensor, scale: float | None
) -> None:
    """Into y: forward with the scale s or, where there is none, the gradient of the input."""
    (height, depth), width, rank = x.shape, y.shape[-1], left.shape[-1]
    is_forward = scale is not None
    dropout = Dropout(False, 0, 1.0) if is_forward else Dropout.of(branch)
    right = (branch.B if is_forward else branch.A).contiguous()
    merged = is_forward and branch.merged_B is not None
    weight, by_value = weight_argument(branch, x.device) if merged else (0.0, True)

    def run(config: Config) -> None:
        launch(
            epilogue_kernel,
            (cdiv(height, config.rows) * cdiv(width, config.columns),),
            x,
            W,
            x if bias is None else bias,
            left,
            right,
            branch.merged_B.contiguous() if merged else right,
            weight,
            branch.seed if dropout.on else x,
            y,
            height,
            width,
            depth,
            x.stride(0),
            dropout.factor if scale is None else scale,
            dropout.least,
            RANK=rank,
            RANKS=padded(rank),
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=_DEPTH,
            GROUP=_GROUP,
            FORWARD=is_forward,
            BIAS=bias is not None,
            MERGED=merged,
            BY_VALUE=by_value,
            DROP=dropout.on,
            ALIGNED=width % 8 == 0,
            PRECISION=precision(x.device),
            num_warps=config.warps,
            num_stages=config.stages,
        )

    form = (is_forward, bias is not None, merged, dropout.on)
    launched(config_for("epilogue", padded(rank), right, x.dtype, (height, width, depth), form, run), run)
