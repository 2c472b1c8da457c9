"""``empty_like_all``: memory for the results of one call over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbf.ops._library import define, reference_only


def empty_like_all_ref(like: Sequence[Tensor]) -> list[Tensor]:
    """Each by itself."""
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]


define("empty_like_all(Tensor[] like) -> Tensor[]", empty_like_all_ref, empty_like_all_ref)


def empty_like_all(like: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised contiguous tensors of these shapes, dtypes and devices; they carry no gradient.

    On the CPU those of one dtype are parts of one allocation, if they are 12 MiB and more together: there the first
    touch of every 4 KB of fresh memory costs more than what is computed for it, and one allocation can have huge pages;
    what is smaller is mostly found in memory that was given back. So keeping one of them keeps the memory of all. They
    have nothing else in common: to autograd each is a tensor of its own, with its own version.

    Args:
        like: tensors of fp64, fp32, bf16 or fp16, of any shapes, strides and devices.

    Returns:
        One for each of ``like``.

    Raises:
        RuntimeError: for anything else.
    """
    with torch.no_grad():
        return empty_like_all_ref(like) if reference_only() else torch.ops.mbf.empty_like_all.default(list(like))
