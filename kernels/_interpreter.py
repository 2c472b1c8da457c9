"""bf16 as a GPU has it in Triton's interpreter, which rounds towards zero and multiplies the bits as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """Replace the interpreter's casts and products of bf16, for the process."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        pair = source.dtype.scalar, to.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        if pair == (tl.bfloat16, tl.float64):
            return TensorHandle(widened(source.data).astype(np.float64), tl.float64)
        if pair in ((tl.float32, tl.bfloat16), (tl.float64, tl.bfloat16)):
            return TensorHandle(rounded(source.data), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self: Any, left: Any, right: Any, total: Any, *precision: Any) -> Any:
        operands = (
            TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (left, right)
        )
        return dot(self, *operands, total, *precision)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """bf16's bits of fp32 values, rounded to nearest, half to even; of fp64 ones by way of fp32, as torch has it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
