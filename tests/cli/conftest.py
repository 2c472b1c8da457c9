"""The command line in this process, and what a command needs on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mbf.cli.app import app
from mbf.continual import ScoreMatrix
from mbf.report import RunResult


@pytest.fixture
def mbf() -> Callable[..., Any]:
    """``mbf("run", "quickstart")`` → the result, with ``exit_code``, ``stdout``, ``stderr`` and ``output``."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], prog_name="mbf")


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stream of two tasks, 16 training and 6 test rows each."""
    root = tmp_path_factory.mktemp("data") / "letters"
    for task, labels in (("vowels", ("a", "e")), ("digits", ("1", "2"))):
        for split, rows in (("train", 16), ("test", 6)):
            path = root / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"text": f"{split} {n} {labels[n % 2] * 3}", "label": labels[n % 2]} for n in range(rows)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def result() -> RunResult:
    """Two tasks: 80 falls to 50, the other goes from 20 over 40 to 90."""
    matrix = ScoreMatrix(tasks=("news", "mail"), scores=[[80.0, 50.0], [40.0, 90.0]], zero_shot=[10.0, 20.0])
    return RunResult(
        method="slao", label="slao", stream="post", order=1, order_tasks=matrix.tasks, seed=0, matrix=matrix
    )
