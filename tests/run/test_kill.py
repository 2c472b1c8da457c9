"""SIGKILL, at any moment: the run goes on from its last whole checkpoint and ends with the same bits.

Moments are of two sorts. Some are counted in events: of Python's audit hooks (opening, renaming and removing of files
in the run's directory), steps and batches told to the progress, and the calls and writes of layers at a task's
boundary. A first run counts them all and notes what each is part of; others are killed at chosen ones. Other moments
are of the clock: the parent kills after a random time.

``MBF_KILLS=100 pytest -s tests/run/test_kill.py`` is the long form: so many runs killed at random moments, half of each
sort, resumed, compared, and a table of what they were killed in.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mbf.report.writer
from mbf.continual.atomic import is_torso
from mbf.run import resume, run
from mbf.run.config import parse_config
from tests.run.children import CHILDREN, KINDS, Bomb, mark, outcome
from tests.run.tiny import tiny_settings, write_stream

KILLS = int(os.environ.get("MBF_KILLS", "2"))


def child(settings: dict[str, Any], root: Path, at: int | None, log: Path) -> None:
    import torch

    import mbf.run.cell as cell
    import mbf.run.train as training
    from mbf.continual import ContinualLora
    from mbf.peft import AdapterLayer
    from mbf.run.ledger import Ledger

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    bomb = Bomb(root, at, log)
    for owner, name, kind in (
        (cell, "train_task", "training"),
        (cell.Cell, "_evaluate", "evaluation"),
        (cell.Cell, "_tidy", "bookkeeping"),
        (Ledger, "write", "bookkeeping"),
        (ContinualLora, "begin_task", "boundary"),
        (ContinualLora, "end_task", "boundary"),
        (AdapterLayer, "write", "boundary"),
        (ContinualLora, "save", "save"),
        (ContinualLora, "export", "save"),
        (training.RunTrainer, "_save_checkpoint", "checkpoint"),
        (training, "seal", "checkpoint"),
        (mbf.report, "write_report", "save"),
    ):
        bomb.watch(owner, name, kind)
    write_report = mbf.report.write_report

    def told(*arguments: Any) -> Path:
        first = bomb.count + 1
        page = write_report(*arguments)
        bomb.write("report", first, bomb.count)
        return page

    mbf.report.write_report = told
    if (root / "run.json").exists():
        resume(root, bomb)
    else:
        run(parse_config(settings | {"output": root}), bomb)
    bomb.at = None
    bomb.write("events", json.dumps(bomb.kinds))


def go(settings: dict[str, Any], root: Path, at: int | None, log: Path, seconds: float | None = None) -> int:
    """Run or resume in a child, which is killed at event ``at`` or after ``seconds``; its exit code."""
    process = CHILDREN.Process(target=child, args=(settings, root, at, log))
    process.start()
    process.join(seconds)
    if process.is_alive() and seconds is not None:
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


class Unbroken(NamedTuple):
    """How a run ends, what each of its events is part of, which are the report's, and how long it takes."""

    outcome: dict[str, Any]
    events: list[str]
    report: tuple[int, int]
    seconds: float


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_settings(write_stream(tmp_path_factory.mktemp("stream") / "tiny", train=20, test=5))


@pytest.fixture(scope="module")
def unbroken(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    root = tmp_path_factory.mktemp("unbroken")
    first = CHILDREN.Process(target=int)  # has the server started
    first.start()
    first.join()
    began = time.perf_counter()
    assert go(settings, root / "run", None, root / "log") == 0
    seconds = time.perf_counter() - began
    events = json.loads((root / "log").read_text().splitlines()[-1].removeprefix("events "))
    return Unbroken(outcome(root / "run"), [KINDS[kind] for kind in events], report_of(root / "log"), seconds)


def report_of(log: Path) -> tuple[int, int]:
    """The first and last event of the report that was written last."""
    lines = [line.split() for line in log.read_text().splitlines() if line.startswith("report ")]
    return int(lines[-1][1]), int(lines[-1][2])


def killed_in(log: Path) -> str:
    return KINDS[mark(log).read_bytes()[0]]


def event_of(kind: str, events: list[str], draw: random.Random) -> int:
    return draw.choice([number for number, one in enumerate(events, 1) if one == kind])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_once(settings, unbroken, tmp_path: Path, kind: str) -> None:
    wanted, events, *_ = unbroken
    at = event_of(kind, events, random.Random(kind))
    root, log = tmp_path / "run", tmp_path / "log"
    assert go(settings, root, at, log) == -signal.SIGKILL
    assert killed_in(log) == kind
    assert go(settings, root, None, log) == 0
    assert outcome(root) == wanted, f"killed at event {at} of {len(events)}, in {kind}"


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_killed_in_the_report(settings, unbroken, tmp_path: Path, share: float) -> None:
    """In the first one, and in one that takes the place of an older one: what is there is whole."""
    root, log = tmp_path / "run", tmp_path / "log"
    first, last = unbroken.report
    assert last - first > 20
    for older in (False, True):
        assert go(settings, root, first + round(share * (last - first)), log) == -signal.SIGKILL
        assert killed_in(log) == "save"
        there = {path.name for path in (root / "report").glob("*") if not is_torso(path.name)}
        assert there in (set(), {Path(name).name for name in unbroken.outcome if name.startswith("report/")})
        assert go(settings, root, None, log) == 0
        assert outcome(root) == unbroken.outcome
        if not older and not there:
            assert go(settings, root, None, log) == 0  # has the events of a report over an older one
        first, last = report_of(log)


@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_at_random(settings, unbroken, tmp_path: Path) -> None:
    wanted, events, _, whole = unbroken
    draw, hit = random.Random(), Counter()
    while hit.total() < KILLS:
        number = hit.total()
        root, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        if number % 2:
            at, seconds = event_of(draw.choice(KINDS), events, draw), None
        else:
            at, seconds = None, draw.uniform(0, whole)
        if go(settings, root, at, log, seconds) != 0:
            kind = killed_in(log) if mark(log).exists() and mark(log).stat().st_size else "start"
            hit[f"{kind}, {'by event' if at else 'by clock'}"] += 1
            assert go(settings, root, None, log) == 0
            assert outcome(root) == wanted, f"killed at event {at} of {len(events)} or after {seconds} s, in {kind}"
            if KILLS > 2:
                print(f"{hit.total():4} of {KILLS}: {kind}, {f'event {at}' if at else f'{seconds:.2f} s'}", flush=True)
        shutil.rmtree(root, ignore_errors=True)
    print(*(f"{count:4} in {kind}" for kind, count in sorted(hit.items())), sep="\n")


def test_killed_again_and_again(settings, unbroken, tmp_path: Path) -> None:
    """Each process gets a little further, and no step is computed anew but those after the last checkpoint."""
    wanted, events, *_ = unbroken
    root, log = tmp_path / "run", tmp_path / "log"
    kills = 0
    while go(settings, root, len(events) // 4 + 3 * kills, log) != 0:
        kills += 1
        assert kills < 20, "makes no headway"
    assert kills >= 3
    assert outcome(root) == wanted
    done: dict[int, int] = {}
    for line in log.read_text().splitlines():
        kind, number = line.split(maxsplit=1)
        if kind == "task":
            task = int(number)
        elif kind == "step":
            # save_steps is 2, and a checkpoint may have been killed while it was written
            assert int(number) >= done.get(task, 0) - 3
            done[task] = int(number)
