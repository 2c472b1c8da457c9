"""The stand-in for CUDA, proved: right kernels give the right result in every order of threads, and each planted fault
is caught, by a wrong result in some order, by an error that names the kernel, or by AddressSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda import build

SOURCE = Path(__file__).with_name("planted.cu")
SEEDS = range(12)
SUMS = ("sum", "sum-of-halves", "sum-of-bfloats")
RIGHT = (*SUMS, "count", "scan", "transpose", "histogram", "reverse", "rotate", "vote", "sum-last")

pytestmark = pytest.mark.skipif(build.missing_compiler() is not None, reason=str(build.missing_compiler()))


@pytest.fixture(scope="module")
def planted():
    program = build.program(SOURCE, build.PLAIN)

    def run(case: str, seed: int = 0) -> str:
        return subprocess.check_output([program, case, str(seed)], text=True).strip()

    return run


@pytest.fixture(scope="module")
def watched():
    """With every access told to races.cpp."""
    program = build.program(SOURCE, build.RACES)

    def run(case: str, seed: int = 0) -> str:
        return subprocess.check_output([program, case, str(seed)], text=True).strip()

    return run


@pytest.fixture(scope="module")
def sanitized():
    program = build.program(SOURCE, build.SANITIZE)

    def run(case: str, seed: int = 0) -> tuple[str, str]:
        done = subprocess.run([program, case, str(seed)], capture_output=True, text=True, check=False)
        return done.stdout.strip(), done.stderr

    return run


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_kernel_is_right_in_every_order(planted, case):
    assert {planted(case, seed) for seed in SEEDS} == {"right"}


@pytest.mark.parametrize("case", ["recover", "counted", "halves"])
def test_what_else_must_hold(planted, case):
    assert {planted(case, seed) for seed in (0, 1, 5)} == {"right"}


WITHOUT_BARRIER = [f"{kernel}-without-barrier" for kernel in ("sum", "scan", "transpose", "reverse", "rotate")]


@pytest.mark.parametrize("case", WITHOUT_BARRIER)
def test_a_missing_barrier_gives_a_wrong_result_in_most_orders(planted, case):
    results = [planted(case, seed) for seed in SEEDS]
    assert results.count("wrong") >= 6, results


@pytest.mark.parametrize("case", ["count-without-atomic", "sum-last-without-atomic"])
def test_an_update_that_is_not_atomic_goes_wrong_in_most_orders(planted, case):
    results = [planted(case, seed) for seed in SEEDS]
    assert results.count("wrong") >= 6, results


@pytest.mark.parametrize("case", [*RIGHT, "recover", "counted"])
def test_a_right_kernel_has_no_race(watched, case):
    assert {watched(case, seed) for seed in SEEDS[:6]} == {"right"}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        *((case, "shared memory that thread") for case in WITHOUT_BARRIER),
        ("histogram-without-atomic", "shared memory that thread"),
        ("count-without-atomic", "global memory that thread"),
        ("sum-last-without-atomic", "global memory that another block"),
    ],
)
def test_a_race_is_an_error_in_every_order(watched, case, words):
    for seed in (0, 1, 2, 3):
        message = watched(case, seed)
        assert message.startswith(f"mbf emulation: {case.split('-without')[0].replace('-', '_')}, block "), message
        assert "race: " in message and words in message, message


@pytest.mark.parametrize("case", ["transpose-unset", "reverse-unset", "static-unset", "dynamic-unset"])
def test_shared_memory_that_nobody_wrote_is_noticed(planted, case):
    assert {planted(case, seed) for seed in SEEDS} == {"wrong"}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("leave-before-barrier", ["diverge, block (0,0,0)", "24 have left", "40 wait at __syncthreads (planted.cu:"]),
        ("two-barriers", ["diverge, block", "comes to __syncthreads (planted.cu:", "waits at __syncthreads"]),
        ("leave-before-shuffle", ["diverge, block", "6 have left the kernel", "58 wait at __shfl_xor_sync"]),
        ("two-masks", ["diverge", "the mask leaves out the thread that calls"]),
        ("absent-lane", ["diverge, block (0,0,0), thread", "reads lane", "which the mask leaves out"]),
        ("misaligned", ["misalign", "no multiple of the 16 bytes"]),
        ("reverse-beyond", ["reverse, block", "wrote beyond the 400 bytes of its dynamic shared memory"]),
        ("too-many-threads", ["reverse", "the block is (1025,1,1)"]),
        ("too-much-shared", ["reverse", "300000 bytes of shared memory"]),
    ],
)
def test_a_broken_rule_is_an_error_with_the_kernels_name(planted, case, words):
    for seed in SEEDS[:4]:
        message = planted(case, seed)
        assert message.startswith("mbf emulation: "), message
        assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("case", ["transpose", "reverse", "rotate", "sum-of-halves", "recover"])
def test_a_right_kernel_passes_the_sanitizers(sanitized, case):
    for seed in (0, 1, 7):
        assert sanitized(case, seed) == ("right", "")


@pytest.mark.parametrize(
    ("case", "kernel", "memory"),
    [
        ("transpose-beyond", "transpose", "heap-buffer-overflow"),
        ("reverse-beyond", "reverse", "heap-buffer-overflow"),
        ("static-beyond", "write_beyond_static", "global-buffer-overflow"),
    ],
)
def test_a_write_out_of_bounds_is_caught(sanitized, case, kernel, memory):
    output, report = sanitized(case)
    assert output == ""
    frames = report.replace("(anonymous namespace)::", "")
    assert memory in report and "WRITE of size" in report and f"in {kernel}" in frames, report
