"""The dropout mask of ``mbf/ops/philox.py``: of a tile, in registers, and as a tensor.

A block of Philox decides 8 elements. Where rows are a multiple of 8 elements long, a tile takes one block for each 8
of its columns and spreads the words over them, which stay in the thread that loads the 8 elements; elsewhere every
element takes the block that it lies in for itself, 8 times the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mbf.kernels._launch import cdiv, launch
from torch import Tensor

_PER_PROGRAM = 4096  # elements


@triton.jit
def words(seed, j):
    """The four words, uint32, of the blocks j, int64: Philox 4x32-10 at counter (j mod 2³², j div 2³², 0, 0).

    As ``tl.philox``, but both halves of a product come from one instruction: a third less integer arithmetic.
    """
    c0 = j.to(tl.uint32)
    c1 = (j >> 32).to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def kept(seed, least, rows, first, width, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Which elements of a contiguous ``[..., width]`` are kept: of its rows, int64, and columns first, first + 1, …

    Args:
        seed: int64.
        least: the least half-word that is kept.
        ALIGNED: whether width and first are multiples of 8.

    Returns:
        int1 ``[rows, COLUMNS]``.
    """
    if ALIGNED:
        blocks = first // 8 + tl.arange(0, COLUMNS // 8)
        w0, w1, w2, w3 = words(seed, rows[:, None] * (width // 8) + blocks[None, :])
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [rows, blocks, index div 2, index mod 2]
        half = tl.reshape(tl.join(word & 0xFFFF, word >> 16), (rows.shape[0], COLUMNS))
    else:
        columns = first + tl.arange(0, COLUMNS)
        half = half_words(seed, rows[:, None] * width + columns[None, :])
    return half >= least


@triton.jit
def half_words(seed, i):
    """What decides the elements i, int64."""
    w0, w1, w2, w3 = words(seed, i // 8)
    word = (i % 8) // 2
    found = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return tl.where(i % 2 == 0, found & 0xFFFF, found >> 16)


@triton.jit(do_not_specialize=["least"])
def dropout_mask_kernel(seed, mask, size, least, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.zeros((1,), tl.int64)
    # The whole tensor as one row, cut at a multiple of 8.
    keep = tl.reshape(kept(tl.load(seed), least, row, first, 0, BLOCK, True), (BLOCK,))
    at = first + tl.arange(0, BLOCK)
    tl.store(mask + at, keep, mask=at < size)


def dropout_mask(seed: Tensor, shape: Sequence[int], least: int) -> Tensor:
    """``mbf::dropout_mask`` on the seed's device; ``least`` is the least half-word that is kept."""
    mask = torch.empty(shape, dtype=torch.bool, device=seed.device)
    size = math.prod(shape)
    if size:
        launch(dropout_mask_kernel, (cdiv(size, _PER_PROGRAM),), seed, mask, size, least, BLOCK=_PER_PROGRAM)
    return mask
