"""No operator keeps memory, whether it computes or refuses: what malloc has given out is the same after more calls.

LeakSanitizer (``make sanitize``) sees what the extension allocates itself; this sees the tensors, too, that torch
allocates for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch

from mbf.ops import native_status
from tests.sanitize.arguments import VALID, wrong

CALLS = 40
ALLOWED = 4096  # bytes: a tensor's own, without its numbers, are some 300


class MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33; the numbers of pieces that stand between have no names here."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcd", "hblkhd", *"efg"[:2], "used", "free", "top")]


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """What other tests have left is not looked at again by every collection: that would take most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def in_use() -> int:
    """Bytes that malloc has given out, mapped ones included."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.used + info.hblkhd


glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc that says nothing: no glibc 2.33"
)


def growth(call: Callable[[], object]) -> int:
    """The least of three looks: a table that grows once is no leak."""
    found = []
    for _ in range(3):
        for _ in range(3):
            call()
        before = in_use()
        for _ in range(CALLS):
            call()
        found.append(in_use() - before)
    return min(found)


@glibc
@pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
@pytest.mark.parametrize("name", sorted(VALID))
def test_calls_keep_no_memory(name: str) -> None:
    operator = getattr(torch.ops.mbf, name).default
    for number in range(3):
        right = VALID[name](Random(f"memory {name} {number}"))
        assert growth(lambda right=right: operator(*right)) < ALLOWED
        random = Random(f"wrong {name} {number}")
        at = random.randrange(len(right))
        bad = [*right[:at], wrong(random, right[at], huge=False), *right[at + 1 :]]

        def refused(bad: list[object] = bad) -> None:
            with contextlib.suppress(Exception):
                operator(*bad)

        assert growth(refused) < ALLOWED


@glibc
def test_a_tensor_that_is_kept_shows() -> None:
    kept: list[torch.Tensor] = []
    assert growth(lambda: kept.append(torch.ones(()))) > ALLOWED
