"""Dropout from a counter: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The mask of a tensor is a pure function of (seed, element index), so it is recomputed in the backward pass instead of
stored, and every implementation (this one, C++, Triton, CUDA) makes the same one:

* key = (seed mod 2³², seed div 2³²), the seed being 64 bits;
* element ``i`` (flat index in the contiguous tensor, 64 bits) takes 16 bits of the block at counter
  ``(j mod 2³², j div 2³², 0, 0)`` with ``j = i div 8``, the layout of ``tl.philox(seed, j_lo, j_hi, 0, 0)``: of its
  word ``(i mod 8) div 2`` the low half if ``i`` is even, the high half if it is odd;
* it is kept iff that half-word, as an unsigned integer, is at least ``round(p · 2¹⁶)``, rounded half to even;
* what is kept is multiplied by ``2¹⁶ / (2¹⁶ − round(p · 2¹⁶))``: exact in the mean, p being taken in steps of 2⁻¹⁶.

A p that rounds to 0 keeps everything; one that rounds to 1 is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mbf.ops._library import define, reference_only

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
STEPS = 1 << 16  # of probability
P_END = 1.0 - 0.5 / STEPS  # from here on p rounds to 1
_WORD = 0xFFFFFFFF
_HALF_WORD = 0xFFFF
_BLOCKS_AT_ONCE = 1 << 14  # the working set of the rounds then stays in a core's second-level cache


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four random words of each counter block.

    Args:
        counter: four int64 tensors of one shape that hold 32-bit words; the first and the third are overwritten.
        key: two 0-d int64 tensors that hold 32-bit words.

    Returns:
        Four int64 tensors of that shape, each value in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    steps = torch.arange(ROUNDS, device=c0.device)
    keys = [((k + steps * step) & _WORD).unbind() for k, step in zip(key, KEY_STEPS, strict=True)]
    # Products of two words fill 64 bits: as int64 they wrap to the same bits, of which `>> 32` leaves the high word
    # under copies of the sign. c1 and c3 are only ever xored, so their high halves are cleared with c0's and c2's.
    for k0, k1 in zip(*keys, strict=True):
        low0, low1 = c0.mul_(MULTIPLIERS[0]), c2.mul_(MULTIPLIERS[1])
        c0 = (low1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (low0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = low1, low0
    return c0, c1 & _WORD, c2, c3 & _WORD


def threshold(p: float) -> int:
    """The least half-word that is kept: ``round(p · 2¹⁶)``."""
    return round(p * STEPS)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by, so that dropout keeps the mean: ``1 / (1 − p)`` of the p really used."""
    return STEPS / (STEPS - threshold(p))


def counters(first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The counters ``(j mod 2³², j div 2³², 0, 0)`` of blocks ``first ≤ j < first + count``."""
    j = torch.arange(first, first + count, device=device)
    return j & _WORD, j >> 32, torch.zeros_like(j), torch.zeros_like(j)


def dropout_mask_ref(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """``dropout_mask`` in integer arithmetic of torch, a cacheful of counters at a time."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    size = math.prod(shape)
    blocks = -(-size // 8)
    keep = torch.empty(blocks, 8, dtype=torch.bool, device=seed.device)
    least = threshold(p)
    for first in range(0, blocks, _BLOCKS_AT_ONCE):
        rows = keep[first : first + _BLOCKS_AT_ONCE]
        for lane, word in enumerate(philox_4x32(counters(first, rows.shape[0], seed.device), key)):
            torch.ge(word & _HALF_WORD, least, out=rows[:, 2 * lane])
            torch.ge(word >> 16, least, out=rows[:, 2 * lane + 1])
    return keep.flatten()[:size].clone().view(shape) if size % 8 else keep.view(shape)


def _mask_gpu(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    from mbf.kernels import philox as kernels

    return kernels.dropout_mask(seed, shape, threshold(p))


define(
    "dropout_mask(Tensor seed, SymInt[] shape, float p) -> Tensor",
    dropout_mask_ref,
    lambda seed, shape, p: seed.new_empty(shape, dtype=torch.bool),
    _mask_gpu,
)


def dropout_mask(seed: int | Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Return which elements of a contiguous tensor of ``shape`` dropout keeps.

    Args:
        seed: int (the mask is made on the CPU) or 0-d int64 tensor (on its device).
        shape: any, the empty one included.
        p: probability that an element is dropped, in [0, 1 − 2⁻¹⁷), taken in steps of 2⁻¹⁶.

    Returns:
        Bool tensor of ``shape``, True where an element is kept.

    Raises:
        ValueError: p out of range, a size below 0, or a seed that is neither a 64-bit integer nor a 0-d int64 tensor.
        TypeError: a seed, p or shape of another type.
    """
    check_p(p)
    key = seed_tensor(seed, "cpu")
    try:
        return _mask(key, shape, p)
    except (RuntimeError, TypeError):
        _check_shape(shape)
        raise


def _check_shape(shape: Sequence[int]) -> None:
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, (int, torch.SymInt)) for size in shape):
        raise TypeError(f"shape: got {shape!r}; pass a sequence of ints")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape is {list(shape)}; no size can be negative")


def keep_mask(shape: Sequence[int], p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """``dropout_mask`` on ``device``; None where p = 0, which alone may go without a seed."""
    if p == 0.0:
        return None
    if seed is None:
        raise ValueError(f"dropout with p = {p} needs a seed; pass an int, or what draw_seed(device) gives")
    return _mask(seed_tensor(seed, device), shape, p)


def _mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    return dropout_mask_ref(seed, shape, p) if reference_only() else torch.ops.mbf.dropout_mask.default(seed, shape, p)


def drop(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """``keep ⊙ x · keep_scale(p)``, differentiable in x; x itself without a mask."""
    return x if keep is None else torch.where(keep, x * keep_scale(p), 0.0)


def dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """Dropout of x with the mask of ``seed``, differentiable in x."""
    return drop(x, keep_mask(x.shape, p, seed, x.device), p)


def draw_seed(device: torch.device | str) -> Tensor:
    """Draw a seed, a 0-d int64 tensor, from torch's default generator of ``device``.

    ``torch.manual_seed`` therefore fixes every mask, and activation checkpointing, which rewinds that generator, sees
    the same mask again. Nothing waits for the device.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def seed_tensor(seed: int | Tensor, device: torch.device | str) -> Tensor:
    """Return the seed as a 0-d int64 tensor, made on ``device`` if it is an int."""
    if not isinstance(seed, Tensor):
        if not isinstance(seed, (int, torch.SymInt)):
            raise TypeError(f"seed: got {type(seed).__name__}; pass an int or a 0-d int64 tensor")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}, which has more than 64 bits; take one in [-2**63, 2**63)")
        return torch.tensor(seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"seed is a {seed.dtype} tensor of shape {list(seed.shape)}; it must be an int or a 0-d int64 tensor, "
            "such as draw_seed(device) gives"
        )
    return seed


def check_p(p: float) -> None:
    """Raise TypeError or ValueError unless p is a probability that does not drop everything."""
    try:
        allowed = 0.0 <= p < P_END
    except (TypeError, RuntimeError):
        raise TypeError(f"dropout_p: got {type(p).__name__}; pass a number") from None
    if not allowed:
        raise ValueError(
            f"dropout_p is {p}; it must lie in [0, 1 - 2**-17), as it is taken in steps of 2**-16. To switch the "
            "low-rank branch off, pass scale=0.0 instead"
        )
