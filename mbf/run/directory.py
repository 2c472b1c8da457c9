"""The directory of a run: where things lie, who may write, and what it was started with.

::

    config.yaml                 the configuration, as a reader would write it
    run.json                    the same with its sha256, versions, data hashes and the command; written last
    zero_shot.json              scores of the model before any task, shared by all cells
    cells/<label>-order1-seed0/
        progress.json           tasks learned and scores so far
        train/task-03/          Trainer checkpoints of the task in training
        state/task-02/          the learner after the last task learned
        adapter/                the merged adapter, in plain PEFT format
        result.json             when the cell is finished
    report/                     when all are
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mbf.continual.atomic import write_file
from mbf.run.config import RunConfig, differences, parse_config, read_yaml

FORMAT = 1
COMPARISON = "compare.json"  # in a directory of mbf compare: the cells asked for


class RunError(ValueError):
    """A run cannot start or go on in this directory; the message says why and what to do."""


@dataclass(frozen=True)
class CellDirectory:
    """Where one method with one order and one seed keeps its things."""

    root: Path

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    def train(self, number: int) -> Path:
        """Checkpoints of task ``number``, from 1, in training."""
        return self.root / "train" / f"task-{number:02d}"

    def state(self, learned: int) -> Path:
        """The learner after ``learned`` tasks."""
        return self.root / "state" / f"task-{learned:02d}"

    def tidy(self, learned: int) -> None:
        """Keep the state after ``learned`` tasks and the checkpoints of the next; remove older ones and torsos."""
        wanted = {self.state(learned), self.train(learned + 1)}
        for path in (*(self.root / "state").glob("*"), *(self.root / "train").glob("*")):
            if path not in wanted:
                shutil.rmtree(path)


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory; ``create`` or ``open`` one."""

    root: Path
    config: RunConfig
    facts: dict[str, Any]

    @classmethod
    def create(cls, root: Path, config: RunConfig, facts: Mapping[str, Any]) -> RunDirectory:
        """Begin a run with ``config`` and what was found out about it (versions, data hashes, command).

        Raises:
            RunError: the directory holds a run, or something else.
        """
        check_free(root)
        root.mkdir(parents=True, exist_ok=True)
        write_file(root / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True))
        facts = {"format": FORMAT, "config": config.plain(), "sha256": config.sha256(), **facts}
        write_json(root / "run.json", facts)
        return cls(root, config, facts)

    @classmethod
    def open(cls, root: Path) -> RunDirectory:
        """The run that ``create`` began.

        Raises:
            RunError: no run there, or one whose ``config.yaml`` is no longer what it was started with.
        """
        facts = read_json(root / "run.json")
        if facts is None:
            raise RunError(
                f"{root}: no run was started here (it has no run.json); start one with mbf run --output {root}"
            )
        if facts.get("format") != FORMAT:
            raise RunError(
                f"{root}: run.json has format {facts.get('format')!r}, this mbf reads {FORMAT}; use that mbf"
            )
        config = parse_config(read_yaml(root / "config.yaml"), str(root / "config.yaml"))
        changed = differences(facts["config"], config.plain())
        if changed:
            raise RunError(
                f"{root}: the configuration changed since the run was started: {'; '.join(changed)}. "
                "Put config.yaml back to go on, or start a new run in another directory"
            )
        return cls(root, config, facts)

    @property
    def zero_shot(self) -> Path:
        return self.root / "zero_shot.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def cell(self, name: str) -> CellDirectory:
        """The directory of one cell, made if need be."""
        path = self.root / "cells" / name
        path.mkdir(parents=True, exist_ok=True)
        return CellDirectory(path)


def check_free(root: Path) -> None:
    """Raise RunError unless a run can begin in ``root``."""
    if (root / "run.json").exists():
        raise RunError(f"{root}: holds a run already; mbf resume {root} goes on with it, --output starts one elsewhere")
    if root.exists() and not root.is_dir():
        raise RunError(f"{root}: is a file, wanted a directory; choose another --output")
    foreign = [path.name for path in root.glob("*") if path.name not in ("config.yaml", ".lock")]
    if foreign:
        raise RunError(f"{root}: is not empty (it has {foreign[0]}); choose another --output")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Nobody else runs in ``root`` for the while; the lock falls with the process, however it ends.

    Raises:
        RunError: somebody else does.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunError(f"{root}: another process is running here; wait for it or stop it first") from None


def write_json(path: Path, data: Any) -> None:
    """Replace the file in one step."""
    write_file(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote; None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
