"""A branch's operands as kernels take them.

A ``branch`` is the ``Branch`` of ``mbf/ops/_operands.py``; formulas and names are those of ``mbf/ops/_branch.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mbf.kernels._launch import interpreted, tracing_now
from mbf.kernels._tune import family_for
from torch import Tensor

MOST_MIX = 64  # ranks; wider ones are mixed by the BLAS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def most_rank(dtype: torch.dtype) -> int:
    """The greatest rank of A and B in dtype whose sums fit the registers of a program."""
    return 256 if dtype.itemsize == 2 else 128


def at_once(branch: Any) -> int:
    """How many branches like this one a launch can serve."""
    return 3 if branch.A.shape[0] <= (64 if branch.A.dtype.itemsize == 2 else 32) else 1


def supported(branches: Sequence[Any], *tensors: Tensor | None) -> bool:
    """Whether the kernels compute with these dtypes and ranks, and the branches have elements at all."""
    dtypes = (*DTYPES, torch.float64) if interpreted() else DTYPES
    return all(t is None or t.dtype in dtypes for t in tensors) and all(
        branch.A.dtype in dtypes
        and branch.A.shape[0] <= most_rank(branch.A.dtype)
        and branch.A.numel()
        and branch.B.numel()
        for branch in branches
    )


def matrix(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]`` with rows that are contiguous; a copy only where it must be one."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def padded(rank: int) -> int:
    """The ranks of a tile: a power of 2, at least the 16 that tensor cores take."""
    return max(16, 1 << (rank - 1).bit_length())


def sums_dtype(branch: Any) -> torch.dtype:
    """Of the accumulators."""
    return torch.float64 if branch.A.dtype == torch.float64 else torch.float32


def parts_dtype(branch: Any) -> torch.dtype:
    """Of the sums that programs leave to be added up in the accumulators' dtype.

    Those of a bf16 branch are rounded to bf16 where torch lets its own products do so, as it does by default: that
    halves their bytes, and an error as large as that of the final rounding joins it. fp16 has not the range.
    """
    if branch.A.dtype == torch.bfloat16 and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction:
        return torch.bfloat16
    return sums_dtype(branch)


def precision(device: torch.device) -> str:
    """Of products of fp32: three products of TF32 make them about as exact as fp32 ones; half types ignore it."""
    return "ieee" if family_for(device).startswith("gfx") else "tf32x3"


class Dropout(NamedTuple):
    """A branch's dropout."""

    on: bool
    least: int
    factor: float

    @classmethod
    def of(cls, branch: Any) -> Dropout:
        return cls(True, branch.least, branch.keep_scale) if branch.dropout_p else cls(False, 0, 1.0)


def together(branches: Sequence[Any]) -> list[list[int]]:
    """The numbers of the branches, in one list those that one launch can serve: a few of one rank, dtype and p."""
    kinds: dict[Any, list[list[int]]] = {}
    for n, branch in enumerate(branches):
        lists = kinds.setdefault((branch.A.shape[0], branch.A.dtype, branch.dropout_p), [[]])
        if len(lists[-1]) == at_once(branch):
            lists.append([])
        lists[-1].append(n)
    return [numbers for lists in kinds.values() for numbers in lists]


def filled(values: Sequence[Any]) -> list[Any]:
    """Three, as kernels take them: the first stands for those that are not there."""
    return [*values, *[values[0]] * (3 - len(values))]


def gate_matrix(branch: Any, h: Tensor) -> Tensor | None:
    """The gate as ``[rows, r]`` of any strides."""
    return None if branch.gate is None else branch.gate.expand(h.shape).reshape(-1, h.shape[-1])


def weight_argument(branch: Any, device: torch.device) -> tuple[Any, bool]:
    """λ as ``number_argument`` has it."""
    return (0.0, True) if branch.merge_weight is None else number_argument(branch.merge_weight, device)


def number_argument(number: Tensor, device: torch.device) -> tuple[Any, bool]:
    """A 0-d tensor, and whether by value: one that lies on the GPU is read there, so that nothing waits for it."""
    if number.device == device:
        return number, False
    return (number.to(device), False) if tracing_now() else (number.item(), True)
