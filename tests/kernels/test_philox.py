from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mbf.kernels import philox as kernels
from mbf.kernels.philox import kept

from mbf import ops
from mbf.ops.philox import dropout_mask_ref, threshold
from tests.ops.test_philox import scalar_half_word


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), size=st.integers(0, 9000), p=st.floats(0.0, 0.999))
def test_the_same_mask_everywhere(seed: int, size: int, p: float) -> None:
    key = torch.tensor(seed)
    by_kernel = kernels.dropout_mask(key, (size,), threshold(p))
    assert torch.equal(by_kernel, dropout_mask_ref(key, (size,), p))
    assert torch.equal(by_kernel, ops.dropout_mask(seed, (size,), p))


@triton.jit
def kept_kernel(mask, seed, least, row, first, width, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    rows = tl.load(row) + tl.arange(0, 2)
    keep = kept(tl.load(seed), least, rows, first, width, COLUMNS, ALIGNED)
    tl.store(mask + tl.arange(0, 2)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    row=st.integers(0, 2**42),
    width=st.integers(64, 4096),
    first=st.integers(0, 4),
    p=st.floats(0.05, 0.95),
)
def test_a_tile_far_into_a_tensor(seed: int, row: int, width: int, first: int, p: float) -> None:
    mask = torch.zeros(2, 16, dtype=torch.bool)
    aligned = width % 8 == 0
    first *= 8 if aligned else 1
    kept_kernel[(1,)](mask, torch.tensor(seed), threshold(p), torch.tensor(row), first, width, 16, aligned)
    expected = [
        [scalar_half_word(seed, (row + i) * width + first + j) >= threshold(p) for j in range(16)] for i in range(2)
    ]
    assert mask.tolist() == expected


@pytest.mark.parametrize("shape", [(), (3, 0), (4097,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert torch.equal(kernels.dropout_mask(torch.tensor(5), shape, threshold(0.5)), ops.dropout_mask(5, shape, 0.5))
