"""What kernels do with a tile: addresses, products, the interpolated B."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offsets(rows, columns, stride):
    """Of the elements ``[rows, columns]`` of a matrix with contiguous rows; rows are int64, and so are the offsets."""
    return rows[:, None] * stride + columns[None, :]


@triton.jit
def inside(rows, columns, height, width):
    """Which elements ``[rows, columns]`` a matrix ``[height, width]`` has."""
    return (rows < height)[:, None] & (columns < width)[None, :]


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """``total + left · right``, summed in total's dtype."""
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def lambda_of(weight, sums: tl.constexpr, BY_VALUE: tl.constexpr):
    """λ, which is a number or lies in memory, in the dtype of sums."""
    return weight if BY_VALUE else tl.load(weight).to(sums)


@triton.jit
def effective_B(
    B, merged_B, weight, rows, ranks, height, RANK: tl.constexpr, MERGED: tl.constexpr, BY_VALUE: tl.constexpr
):
    """The tile ``[rows, ranks]`` of ``B̂ = B₀ + λ (B − B₀)``, made in fp32 or more and rounded to B's dtype once."""
    at = offsets(rows, ranks, RANK)
    there = inside(rows, ranks, height, RANK)
    found = tl.load(B + at, mask=there, other=0.0)
    if MERGED:
        before = tl.load(merged_B + at, mask=there, other=0.0)
        sums: tl.constexpr = tl.float64 if found.dtype == tl.float64 else tl.float32
        wide = before.to(sums)
        found = (wide + lambda_of(weight, sums, BY_VALUE) * (found.to(sums) - wide)).to(found.dtype)
    return found


@triton.jit
def joined(B, Eb, rows, ranks, height, RANK: tl.constexpr, FIRST: tl.constexpr):
    """The tile ``[rows, ranks]`` of (B, Eb), of which B has the FIRST ranks."""
    left = tl.load(B + offsets(rows, ranks, FIRST), mask=inside(rows, ranks, height, FIRST), other=0.0)
    there = inside(rows, ranks, height, RANK) & (ranks >= FIRST)[None, :]
    return left + tl.load(Eb + offsets(rows, ranks - FIRST, RANK - FIRST), mask=there, other=0.0)
