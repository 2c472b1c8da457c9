"""SIGKILL, at any moment: the run goes on from its last whole checkpoint and ends with the same bits.

Moments are counted in events of Python's audit hooks: opening, renaming and removing of files in the run's directory,
and in steps and batches told to the progress. A first run counts them all; the others are killed at chosen ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import mbf.report
from mbf.run import LogProgress, resume, run
from mbf.run.config import parse_config
from tests.run.tiny import tiny_settings, write_stream

# A server that imported everything forks the children: no child pays for the imports again, and none inherits threads.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["mbf.run.workbench", "mbf.run.cell", "datasets", "tests.run.test_kill"])

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


class Bomb(LogProgress):
    """Counts events, writes down the steps, and kills the process at event number ``at``."""

    def __init__(self, root: Path, at: int | None, log: Path) -> None:
        self.root, self.at, self.log = str(root), at, log
        self.count = 0
        sys.addaudithook(self.audit)

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in EVENTS and str(arguments[0]).startswith(self.root):
            self.event()

    def write(self, *words: Any) -> None:
        with self.log.open("a") as file:
            print(*words, file=file)

    def task_started(self, cell, task, number, total, steps) -> None:
        self.write("task", number)

    def step(self, step, *rest) -> None:
        self.write("step", step)
        self.event()

    def evaluating(self, *rest) -> None:
        self.event()


def child(settings: dict[str, Any], root: Path, at: int | None, log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    bomb = Bomb(root, at, log)
    mbf.report.write_report = lambda results, directory: directory  # pictures take longer than all else here
    if (root / "run.json").exists():
        resume(root, bomb)
    else:
        run(parse_config(settings | {"output": root}), bomb)
    bomb.at = None
    bomb.write("events", bomb.count)


def go(settings: dict[str, Any], root: Path, at: int | None, log: Path) -> int:
    process = CHILDREN.Process(target=child, args=(settings, root, at, log))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def outcome(root: Path) -> dict[str, Any]:
    """What must be the same: every adapter, the state of every learner, all scores and counts of tokens."""
    found: dict[str, Any] = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*.safetensors")}
    for file in root.rglob("result.json"):
        result = json.loads(file.read_text())
        found[str(file.relative_to(root))] = (result["matrix"], result["train_tokens"], result["memory"])
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_settings(write_stream(tmp_path_factory.mktemp("stream") / "tiny", train=20, test=5))


@pytest.fixture(scope="module")
def unbroken(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    root = tmp_path_factory.mktemp("unbroken")
    assert go(settings, root / "run", None, root / "log") == 0
    return outcome(root / "run"), int((root / "log").read_text().split()[-1])


@pytest.mark.parametrize("moment", range(6))
def test_killed_once(settings, unbroken, tmp_path: Path, moment: int) -> None:
    wanted, events = unbroken
    at = random.Random(moment).randint(moment * events // 6 + 1, (moment + 1) * events // 6)
    root, log = tmp_path / "run", tmp_path / "log"
    assert go(settings, root, at, log) == -signal.SIGKILL
    assert go(settings, root, None, log) == 0
    assert outcome(root) == wanted, f"killed at event {at} of {events}"


def test_killed_again_and_again(settings, unbroken, tmp_path: Path) -> None:
    """Each process gets a little further, and no step is computed anew but those after the last checkpoint."""
    wanted, events = unbroken
    root, log = tmp_path / "run", tmp_path / "log"
    kills = 0
    while go(settings, root, events // 4 + 3 * kills, log) != 0:
        kills += 1
        assert kills < 20, "makes no headway"
    assert kills >= 3
    assert outcome(root) == wanted
    done: dict[int, int] = {}
    for line in log.read_text().splitlines():
        kind, number = line.split()
        if kind == "task":
            task = int(number)
        elif kind == "step":
            # save_steps is 2, and a checkpoint may have been killed while it was written
            assert int(number) >= done.get(task, 0) - 3
            done[task] = int(number)
