"""Checks that the operators share, and grouping for those that take matrices singly, stacked or in lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def wrong_type(error: Exception, optional: Mapping[str, Any] | None = None, **tensors: Any) -> Exception:
    """What to raise where a check ran into ``error``: a TypeError that names the first argument that is no tensor.

    So a call that is right looks at no argument's type. ``error`` itself comes back where all are as they must be;
    ``optional`` ones may be None.
    """
    given = tensors | {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            return TypeError(f"{name}: got {type(value).__name__}; pass a tensor")
    return error


def finite(value: Any, name: str) -> float:
    """``value`` as a float; TypeError or ValueError unless it is a finite real number."""
    if isinstance(value, (str, bytes, bytearray)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {type(value).__name__}; pass a finite number")
    try:
        number = float(value)
    except (OverflowError, TypeError):
        raise ValueError(f"{name}: got {value!r}; pass a finite number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}; it must be finite")
    return number


def whole(value: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """``value``; TypeError or ValueError unless it is an int from ``least`` to ``most``."""
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}; pass an int")
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{name} is {value}; it must be at least {least}" + ("" if most is None else f" and at most {most}")
        )
    return value  # type: ignore[return-value]


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless ``tensor`` is an fp64, fp32, bf16 or fp16 tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: got {found}; pass a tensor of fp64, fp32, bf16 or fp16")


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise TypeError for a sparse tensor."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: is {tensor.layout}; pass its to_dense()")


def check_matrix(matrix: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless ``matrix`` is such a tensor of shape ``[..., rows, columns]``."""
    check_floating(matrix, name)
    if matrix.dim() < 2:
        raise ValueError(f"{name}: has shape {tuple(matrix.shape)}; pass a matrix [..., rows, columns]")
    check_dense(matrix, name)
    if matrix.is_meta:
        raise ValueError(f"{name}: is on meta, where it has no values; load it first")


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of ``tensors``, grouped by device: a model may be spread over several."""
    groups: dict[torch.device, list[int]] = {}
    for n, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(n)
    return list(groups.values())
