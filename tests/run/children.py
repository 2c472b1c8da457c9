"""Processes of their own for runs that are killed or run out of space, and what such a run leaves."""

from __future__ import annotations

import functools
import json
import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbf.run import LogProgress

# A server that imported everything forks the children: no child pays for the imports again, and none inherits threads.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["mbf.run.workbench", "mbf.run.cell", "datasets", "tests.run.test_kill", "tests.run.test_disk"]
)


EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
KINDS = ("start", "boundary", "training", "checkpoint", "save", "bookkeeping", "evaluation")


class Bomb(LogProgress):
    """Counts events, writes down the steps, and kills the process at event number ``at``.

    What the process is at, by number in ``KINDS``, is a byte of a mapped file, which outlives any kill.
    """

    def __init__(self, root: Path, at: int | None, log: Path) -> None:
        self.root, self.at, self.log = str(root), at, log
        self.kinds: list[int] = []
        with mark(log).open("w+b") as file:
            file.write(b"\0")
            file.flush()
            self.kind = mmap.mmap(file.fileno(), 1)
        sys.addaudithook(self.audit)

    @property
    def count(self) -> int:
        return len(self.kinds)

    def event(self) -> None:
        self.kinds.append(self.kind[0])
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in EVENTS and str(arguments[0]).startswith(self.root):
            self.event()

    @contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        before, self.kind[0] = self.kind[0], KINDS.index(kind)
        self.event()
        yield
        self.event()
        self.kind[0] = before

    def watch(self, owner: Any, name: str, kind: str) -> None:
        """Whatever happens in ``owner.name`` is of ``kind``."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def watched(*arguments: Any, **named: Any) -> Any:
            with self.inside(kind):
                return inner(*arguments, **named)

        setattr(owner, name, watched)

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


def mark(log: Path) -> Path:
    return log.with_suffix(".kind")


def outcome(root: Path) -> dict[str, Any]:
    """What must be the same: which files there are, every adapter, the state of every learner, all scores and counts of
    tokens."""
    found: dict[str, Any] = {str(f.relative_to(root)): None for f in root.rglob("*")}
    found |= {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*.safetensors")}
    for file in root.rglob("result.json"):
        result = json.loads(file.read_text())
        found[str(file.relative_to(root))] = (result["matrix"], result["train_tokens"], result["memory"])
    return found
