"""The sanitizers, proved: each planted fault is caught, and what does no wrong passes. Needs a compiler with them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sanitize.environment import ADDRESSES, LEAKS, compiler, environment, flags, leaks_of

SOURCE = Path(__file__).with_name("planted.cpp")
# Without torch, whose import would be most of the time: the memory is Python's own, of exactly this size.
CALL = """
import ctypes, sys
planted = ctypes.CDLL(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = ctypes.c_void_p(libc.malloc(4 * 8))
ctypes.memset(memory, 0, 4 * 8)
sizes = {sizes}
planted.{name}(*(map(ctypes.c_int64, sizes) if sizes else (memory, ctypes.c_int64(8))))
libc.free(memory)
print("survived")
"""
# In memory that torch allocated for a tensor.
TENSOR = """
import ctypes, sys, torch
planted = ctypes.CDLL(sys.argv[1])
tensor = torch.zeros(7)
planted.{name}(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(7))
print("survived")
"""

pytestmark = pytest.mark.skipif(shutil.which(compiler()) is None, reason=f"no compiler {compiler()}")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("planted") / "libplanted.so"
    command = [compiler(), "-std=c++20", "-O1", "-g1", "-shared", "-fPIC", *flags(), str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def run(library: Path, script: str, options: str = ADDRESSES) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(library)],
        env=environment(options, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def call(name: str, *sizes: int) -> str:
    """Calls it with these sizes, or with memory and the number of floats in it."""
    return CALL.format(name=name, sizes=sizes)


def test_what_is_right_passes(planted: Path) -> None:
    found = run(planted, call("planted_right"))
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "survived", "")


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("planted_overrun", (), "heap-buffer-overflow"),
        ("planted_overwrite", (), "heap-buffer-overflow"),
        ("planted_division", (5, 0), "division by zero"),
        ("planted_overflow", (5,), "signed integer overflow"),
    ],
)
def test_a_fault_is_caught(planted: Path, name: str, sizes: tuple[int, ...], words: str) -> None:
    found = run(planted, call(name, *sizes))
    assert found.returncode != 0 and "survived" not in found.stdout
    assert words in found.stderr and "planted.cpp" in found.stderr, found.stderr


def test_an_overrun_of_a_tensor_is_caught(planted: Path) -> None:
    """Its storage is no larger than it is, also where the allocator is torch's."""
    found = run(planted, TENSOR.format(name="planted_overrun"))
    assert "heap-buffer-overflow" in found.stderr and "survived" not in found.stdout, found.stderr


def test_a_leak_is_caught_and_those_of_others_are_left_alone(planted: Path) -> None:
    leaking = run(planted, call("planted_leak", 1234), LEAKS)
    assert "survived" in leaking.stdout and "leak of" in leaking.stderr
    (leak,) = leaks_of(leaking.stderr, SOURCE.name)
    assert leak.startswith("Direct leak of ") and "planted_leak" in leak
    assert int(leak.split()[3]) >= 5 * 1234
    assert leaks_of(run(planted, call("planted_right"), LEAKS).stderr, SOURCE.name) == []
