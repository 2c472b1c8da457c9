"""The scripts of examples/, run as a user runs them."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ["trainer", "sft_trainer", "loop"]

Scores = dict[str, dict[str, tuple[float, float]]]
"""``scores[learned][tested]``: loss, and accuracy in percent."""


def run(script: Path, *options: object) -> str:
    """What the script prints when it is run with these options."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(script), *map(str, options)]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def small(name: str, output: Path) -> list[object]:
    """Options with which a script learns a tiny task in some steps, deterministically and without dropout."""
    if name == "loop":
        return ["--output", output, "--epochs", 2, "--batch-size", 4, "--lr", 0.01, "--dropout", 0]
    sizes = ["--num_train_epochs", 2, "--per_device_train_batch_size", 4, "--learning_rate", 0.01, "--dropout", 0]
    return ["--output_dir", output, *sizes, "--use_cpu", "true", "--disable_tqdm", "true"]


def scores(printed: str) -> Scores:
    """The rows ``after <task>: <task> <loss> <accuracy>%   ...`` of what a script printed."""
    rows = re.findall(r"^after (\S+): (.*)$", printed, re.MULTILINE)
    cells = {learned: re.findall(r"(\S+) (\d+\.\d+) (\d+\.\d)%", row) for learned, row in rows}
    return {learned: {task: (float(loss), float(right)) for task, loss, right in row} for learned, row in cells.items()}
