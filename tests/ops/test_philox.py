from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf import ops
from mbf.ops import philox
from mbf.ops.philox import counters, dropout, keep_scale, philox_4x32

native = pytest.mark.skipif(not ops.native_status().loaded, reason=f"mbf._C: {ops.native_status().reason}")

# Random123's published vectors for philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The algorithm as published, on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    blocks = tuple(torch.full((3,), word) for word in words(counter))
    k0, k1 = (torch.tensor(word) for word in words(key))
    got = philox_4x32(blocks, (k0, k1))
    assert [word.tolist() for word in got] == [[word] * 3 for word in words(expected)]
    assert scalar_philox(words(counter), words(key)) == words(expected)


def scalar_half_word(seed: int, i: int) -> int:
    """What the mask's element ``i`` is decided by, as documented."""
    j = i // 8
    block = scalar_philox([j & 0xFFFFFFFF, j >> 32, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    return block[i % 8 // 2] >> (16 * (i % 2)) & 0xFFFF


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), size=st.integers(0, 70), p=st.floats(0.0, 0.999))
def test_mask_is_the_documented_function_of_seed_and_index(seed: int, size: int, p: float) -> None:
    kept = [scalar_half_word(seed, i) >= round(p * 2**16) for i in range(size)]
    assert ops.dropout_mask(seed, (size,), p).tolist() == kept


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_threshold_is_rounded_half_to_even_and_itself_kept(offset: float) -> None:
    half_words = torch.tensor([scalar_half_word(11, i) for i in range(200)])
    for least in half_words[:50].tolist():
        p = (least - 1 + offset) / 2**16
        assert torch.equal(ops.dropout_mask(11, (200,), p), half_words >= round(p * 2**16))


def test_mask_does_not_depend_on_shape_or_on_the_blocks_of_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ops.dropout_mask(3, (7, 11, 13), 0.4)
    assert whole.shape == (7, 11, 13) and whole.dtype == torch.bool
    assert torch.equal(ops.dropout_mask(torch.tensor(3), (1001,), 0.4), whole.flatten())
    monkeypatch.setattr(philox, "_BLOCKS_AT_ONCE", 5)
    with ops.use_backend("reference"):
        assert torch.equal(ops.dropout_mask(3, (7, 11, 13), 0.4), whole)


@native
def test_the_native_kernel_serves_the_cpu() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mbf::dropout_mask", "CPU")


SHAPES = [(0,), (1,), (3, 5), (31,), (32,), (7, 11, 13), (64, 577), (200_003,)]


def masks(shape: tuple[int, ...]) -> torch.Tensor:
    cases = itertools.product((0, -1, 2**62 + 12345), (0.0, 2**-17, 0.1, 0.5, 0.999, 1 - 2**-16))
    return torch.stack([ops.dropout_mask(seed, shape, p) for seed, p in cases])


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_and_reference_masks_are_equal(shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    found = masks(shape)
    with ops.use_backend("reference"):
        assert torch.equal(found, masks(shape))


@native
def test_the_mask_is_the_same_without_vector_instructions(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from tests.ops.test_philox import *; torch.save([masks(s) for s in SHAPES], sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "masks.pt")],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=300,
    )
    for found, shape in zip(torch.load(tmp_path / "masks.pt"), SHAPES, strict=True):
        assert torch.equal(found, masks(shape))


def test_counter_is_64_bits_wide() -> None:
    low, high, *rest = counters(2**32 - 1, 2, torch.device("cpu"))
    assert low.tolist() == [2**32 - 1, 0] and high.tolist() == [0, 1]
    assert [word.tolist() for word in rest] == [[0, 0], [0, 0]]
    words = philox_4x32(counters(2**32 - 1, 2, torch.device("cpu")), (torch.tensor(5), torch.tensor(6)))
    expected = scalar_philox([2**32 - 1, 0, 0, 0], [5, 6]), scalar_philox([0, 1, 0, 0], [5, 6])
    assert torch.stack(words, 1).tolist() == [*expected]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mask_statistics(p: float) -> None:
    n = 200_000
    masks = torch.stack([ops.dropout_mask(seed, (n,), p) for seed in (1, 2)]).double()
    five_sigma = 5 * math.sqrt(p * (1 - p) / n)
    assert ((masks.mean(1) - (1 - p)).abs() < five_sigma).all()
    for lanes in masks[0].view(-1, 8).T:
        assert abs(lanes.mean() - (1 - p)) < math.sqrt(8) * five_sigma
    centred = masks - (1 - p)
    bound = 5 * p * (1 - p) / math.sqrt(n)
    assert abs((centred[0] * centred[1]).mean()) < bound, "two seeds"
    for lag in (1, 2, 4, 8, 64):
        assert abs((centred[0, lag:] * centred[0, :-lag]).mean()) < bound, f"lag {lag}"


def test_extreme_probabilities() -> None:
    assert ops.dropout_mask(1, (100,), 0.0).all()
    assert ops.dropout_mask(1, (100_000,), 2**-17).all(), "rounds to 0"
    most = math.nextafter(1 - 2**-17, 0.0)  # rounds to 1 - 2**-16
    kept = ops.dropout_mask(1, (2**20,), most)
    assert 0 < kept.sum() < 50
    assert torch.equal(kept, ops.dropout_mask(1, (2**20,), 1 - 2**-16))


def test_what_is_kept_is_scaled_by_the_probability_that_is_used() -> None:
    assert (keep_scale(0.0), keep_scale(2**-17), keep_scale(0.25), keep_scale(0.5)) == (1.0, 1.0, 4 / 3, 2.0)
    assert keep_scale(0.1) == 65536 / (65536 - 6554)
    assert keep_scale(1 - 2**-16) == 65536.0


def test_dropout_rescales_what_it_keeps_and_passes_gradients_through_it() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    keep = ops.dropout_mask(9, x.shape, 0.3)
    y = dropout(x, 0.3, 9)
    assert torch.equal(y, torch.where(keep, x * keep_scale(0.3), 0.0))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, keep.double() * keep_scale(0.3))


def test_seeds_come_from_the_default_generator() -> None:
    torch.manual_seed(5)
    first, second = ops.draw_seed("cpu"), ops.draw_seed("cpu")
    torch.manual_seed(5)
    assert ops.draw_seed("cpu") == first != second
    assert first.dtype == torch.int64 and first.shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, (3,), 1.0), r"dropout_p is 1\.0; it must lie in \[0, 1 - 2\*\*-17\)"),
        ((1, (3,), 1 - 2**-17), r"dropout_p is 0\.99999"),
        ((1, (3,), -0.1), r"dropout_p is -0\.1"),
        ((1, (3,), math.nan), r"dropout_p is nan"),
        ((2**63, (3,), 0.5), r"seed is 9223372036854775808, which has more than 64 bits"),
        ((torch.tensor([1]), (3,), 0.5), r"seed is a torch\.int64 tensor of shape \[1\]"),
        ((torch.tensor(1.0), (3,), 0.5), r"seed is a torch\.float32 tensor"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.dropout_mask(*arguments)


@native
def test_the_native_kernel_refuses_what_the_face_does() -> None:
    for p in (1.0, 1 - 2**-17, -0.1, math.nan):
        with pytest.raises(RuntimeError, match="it must lie in"):
            torch.ops.mbf.dropout_mask.default(torch.tensor(1), [3], p)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.mbf.dropout_mask.default, (torch.tensor(3), [3, 5], 0.3))
