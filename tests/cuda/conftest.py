"""``cuda``: the operators of csrc/cuda, built by the host compiler against csrc/emulation and run on the CPU."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from tests.cuda import build

SEED = int(os.environ.get("MBF_EMULATION_SEED", "0"))
SANITIZE = os.environ.get("MBF_EMULATION_SANITIZE") == "1"
SEEDS = (2,) if SANITIZE else (0, 1, 2, 3)  # threads in their order, in the reverse, and twice as drawn


class Traffic(NamedTuple):
    launches: int
    loaded: int  # bytes
    stored: int


@pytest.fixture(scope="session")
def cuda() -> SimpleNamespace:
    """``torch.ops.mbf_emulation``; with MBF_EMULATION_SANITIZE=1 under AddressSanitizer and UBSan (make emulation)."""
    if reason := build.missing_compiler():
        pytest.skip(reason)
    torch.ops.load_library(str(build.library(build.SANITIZE if SANITIZE else build.RACES)))
    return torch.ops.mbf_emulation


@pytest.fixture(autouse=True)
def same_order(request) -> None:
    """Every test begins with the seed of MBF_EMULATION_SEED, whatever ran before it."""
    if "cuda" in request.fixturenames:
        request.getfixturevalue("cuda").seed(SEED)


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def order(request, cuda, same_order) -> int:
    """Runs a test once for each order of threads."""
    cuda.seed(request.param)
    return request.param


@pytest.fixture
def traffic(cuda):
    """``traffic()``: what each kernel did since the test began, by name."""
    cuda.reset_counters()

    def read() -> dict[str, Traffic]:
        lines = (line.split() for line in cuda.kernels().splitlines())
        return {name: Traffic(*map(int, numbers)) for name, *numbers in lines}

    return read
