from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from mbf.kernels import _launch  # noqa: F401  (mends the interpreter)


@triton.jit
def cast_kernel(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_casts_of_bf16(wide: torch.dtype) -> None:
    values = torch.tensor(
        [1.0, 1.00390625, 1.01171875, -3.1415926, 1e38, 3e-41, float("inf"), float("nan")], dtype=wide
    )
    narrow, back = torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=wide)
    cast_kernel[(1,)](values, narrow, 8)
    cast_kernel[(1,)](narrow, back, 8)
    torch.testing.assert_close(narrow, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, values.bfloat16().to(wide), rtol=0, atol=0, equal_nan=True)
