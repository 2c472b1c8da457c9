"""Sums over the parts that programs left, in the order of the parts, and what of dB̂ falls to B, B₀ and λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from mbf.kernels._launch import cdiv, launch
from mbf.kernels._operands import sums_dtype, weight_argument
from mbf.kernels._tiles import lambda_of
from torch import Tensor

LEAST_ROWS = 256  # of a part
_BLOCK = 1024  # elements of a program


@triton.jit(do_not_specialize=["units", "count"])
def reduce_kernel(
    parts,
    gradient,
    merged_gradient,
    weight_gradient,
    B,
    merged_B,
    weight,
    units,
    count,
    factor,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    BY_VALUE: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_MERGED_B: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
):
    """The sum of ``parts [count, size]`` times factor: a gradient or, MERGED, dB̂, which gives those of B, B₀ and λ.

    It is taken in fp32 or more. Of λ's, a program leaves the share of its elements. The size is ``units · UNIT``, so
    that accesses are as wide as UNIT allows, whatever the number of rows.
    """
    size = units.to(tl.int64) * UNIT
    sums: tl.constexpr = tl.float64 if parts.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    total = tl.load(parts + at, mask=there, other=0.0).to(sums)
    at_part = at
    for _ in range(1, count):
        at_part += size
        total += tl.load(parts + at_part, mask=there, other=0.0).to(sums)
    total *= factor
    dtype: tl.constexpr = gradient.dtype.element_ty
    if MERGED:
        lam = lambda_of(weight, total.dtype, BY_VALUE)
        if NEED_WEIGHT:
            b = tl.load(B + at, mask=there, other=0.0).to(total.dtype)
            before = tl.load(merged_B + at, mask=there, other=0.0).to(total.dtype)
            tl.store(weight_gradient + block, tl.sum(total * (b - before), 0))
        if NEED_MERGED_B:
            tl.store(merged_gradient + at, ((1.0 - lam) * total).to(dtype), mask=there)
        total *= lam
    if NEED_B:
        tl.store(gradient + at, total.to(dtype), mask=there)


def reduced(parts: Tensor, out: Tensor, factor: float, row: int | None = None) -> Tensor:
    """``out = factor · Σ parts``, out being contiguous and of any dtype; ``row`` is its width if tokens are its rows.

    The parts are flat: how many there are would be a dimension whose size, 1 or not, a graph is guarded by.
    """
    size = out.numel()
    unit, count = _unit(size, row or size, parts, out), parts.numel() // size
    launch(
        reduce_kernel,
        (cdiv(size, _BLOCK),),
        *(parts, out, out, parts, out, out, 0.0),
        size // unit,
        count,
        factor,
        UNIT=unit,
        BLOCK=_BLOCK,
        MERGED=False,
        BY_VALUE=True,
        NEED_B=True,
        NEED_MERGED_B=False,
        NEED_WEIGHT=False,
    )
    return out


def _unit(size: int, row: int, *tensors: Tensor) -> int:
    """A divisor of size for accesses of 16 bytes: one of the row's, so that the number of rows compiles nothing anew.

    Rows that have none allow such accesses for some numbers of rows, which have a binary of their own; not so in a
    graph, which is one for any number.
    """
    wanted = 16 // min(tensor.element_size() for tensor in tensors)
    unit = math.gcd(row, wanted)
    return unit if unit == wanted or isinstance(size, torch.SymInt) else math.gcd(size, wanted)


def reduced_B(parts: Tensor, branch: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of B, B₀ and λ that are asked, from the parts of dB̂ without s."""
    need_B, need_merged_B, need_weight = needs
    B, merged_B = branch.B.contiguous(), branch.merged_B.contiguous()
    weight, by_value = weight_argument(branch, B.device)
    size = B.numel()
    unit, count = _unit(size, size, parts, B), parts.numel() // size
    programs = cdiv(size, _BLOCK)
    dB, dmerged_B = torch.empty_like(B), torch.empty_like(B) if need_merged_B else B
    shares = parts.new_empty(programs, dtype=sums_dtype(branch))
    launch(
        reduce_kernel,
        (programs,),
        *(parts, dB, dmerged_B, shares, B, merged_B, weight),
        size // unit,
        count,
        branch.scale,
        UNIT=unit,
        BLOCK=_BLOCK,
        MERGED=True,
        BY_VALUE=by_value,
        NEED_B=need_B,
        NEED_MERGED_B=need_merged_B,
        NEED_WEIGHT=need_weight,
    )
    return [
        dB if need_B else None,
        dmerged_B if need_merged_B else None,
        shares.sum().to(branch.merge_weight) if need_weight else None,
    ]
