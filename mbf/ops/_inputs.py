"""Checks and grouping shared by the operators that take matrices singly, stacked or in lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless ``tensor`` is an fp64, fp32, bf16 or fp16 tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: got {found}; pass a tensor of fp64, fp32, bf16 or fp16")


def check_matrix(matrix: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless ``matrix`` is such a tensor of shape ``[..., rows, columns]``."""
    check_floating(matrix, name)
    if matrix.dim() < 2:
        raise ValueError(f"{name}: has shape {tuple(matrix.shape)}; pass a matrix [..., rows, columns]")


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of ``tensors``, grouped by device: a model may be spread over several."""
    groups: dict[torch.device, list[int]] = {}
    for n, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(n)
    return list(groups.values())
