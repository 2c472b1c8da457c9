"""Bases, decompositions and merges once more on the baseline instruction set, in a process held to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mbf.ops import native_status

ROOT = Path(__file__).resolve().parents[2]
FILES = [f"tests/ops/test_{name}.py" for name in ("basis", "rsvd", "task_boundary", "merge")]
SOME = "fast_path or orthonormal or exact or sketch or replacement or ends or diverged"


@pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
def test_the_baseline():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({SOME}) and not reference", *FILES],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) > 100
