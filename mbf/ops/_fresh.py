"""Fresh memory for the results of one call over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_HUGE = 1 << 21  # bytes of a huge page, which the kernels ask for (csrc/cpu/huge.h)
_WORTH = 1 << 22  # bytes from which on that is worth more than views cost


def empty_like_all(like: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised contiguous tensors of these shapes, dtypes and devices.

    On the CPU those of one dtype are parts of one allocation, if they are large together: the first touch of every 4 KB
    of a fresh one costs more than what is computed for them. So keeping one of them keeps the memory of all.
    """
    found: dict[int, Tensor] = {}
    if not torch.compiler.is_compiling() and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in like):
        for dtype in dict.fromkeys(t.dtype for t in like):
            here = [n for n, t in enumerate(like) if t.dtype is dtype]
            if len(here) > 1:
                found |= dict(zip(here, _parts([like[n] for n in here]), strict=True))
    return [
        found[n] if n in found else torch.empty_like(t, memory_format=torch.contiguous_format)
        for n, t in enumerate(like)
    ]


def _parts(like: list[Tensor]) -> Sequence[Tensor]:
    numel, size = sum(t.numel() for t in like), like[0].element_size()
    if numel * size < _WORTH:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    memory = torch.empty(numel + _HUGE // size, dtype=like[0].dtype)
    start = -memory.data_ptr() % _HUGE // size
    parts: Sequence[Tensor] = torch._utils._unflatten_dense_tensors(memory[start : start + numel], like)
    return parts
