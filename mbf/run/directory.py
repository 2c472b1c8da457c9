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
from pydantic import BaseModel, ConfigDict

from mbf.continual.atomic import is_torso, sweep, write_file, writing
from mbf.continual.metrics import MALFORMED, first_error
from mbf.run.config import RunConfig, differences, parse_config, read_yaml

FORMAT = 1
WAY = "restore it from a copy, or remove it and let what it told be computed anew"
FACTS_WAY = "restore it from a copy, or start a new run in another directory"
COMPARISON = "compare.json"  # in a directory of mbf compare: the cells asked for


class RunError(ValueError):
    """A run cannot start or go on in this directory; the message says why and what to do."""


class _Facts(BaseModel):
    """``run.json``."""

    model_config = ConfigDict(strict=True, extra="allow")

    config: dict[str, Any]
    sha256: str
    versions: dict[str, str | None]
    data: dict[str, str]
    rules: dict[str, str] = {}
    command: str


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
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
        write_file(root / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True))
        facts = {"format": FORMAT, "config": config.plain(), "sha256": config.sha256(), **facts}
        write_json(root / "run.json", facts)
        return cls(root, config, facts)

    @classmethod
    def open(cls, root: Path) -> RunDirectory:
        """The run that ``create`` began.

        Raises:
            RunError: no run there, one that is damaged, or one whose ``config.yaml`` is no longer what it was started
                with.

        Returns:
            ``facts["config"]`` is ``config``, in which ``on_bad_task`` may have changed since.
        """
        if not (root / "run.json").exists():
            raise RunError(
                f"{root}: no run was started here (it has no run.json); start one with mbf run --output {root}"
            )
        facts = check_facts(read_json(root / "run.json", FACTS_WAY), root / "run.json")
        config = parse_config(read_yaml(root / "config.yaml"), str(root / "config.yaml"))
        changed = differences(facts["config"], config.plain())
        if changed:
            raise RunError(
                f"{root}: the configuration changed since the run was started: {'; '.join(changed)}. "
                "Put config.yaml back to go on, or start a new run in another directory"
            )
        return cls(root, config, {**facts, "config": config.plain()})

    @property
    def zero_shot(self) -> Path:
        return self.root / "zero_shot.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def cell(self, name: str) -> CellDirectory:
        """The directory of one cell, made if need be."""
        path = self.root / "cells" / name
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return CellDirectory(path)


def check_facts(data: Any, path: Path) -> dict[str, Any]:
    """What ``run.json``, at ``path``, holds.

    Raises:
        RunError: another format, or facts that are missing or of a wrong type.
    """
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise RunError(
            f"{path.parent}: {path.name} has format {data.get('format')!r}, this mbf reads {FORMAT}; use that mbf"
        )
    try:
        _Facts.model_validate(data)
    except MALFORMED as error:
        raise RunError(f"{path}: found {first_error(error)}; {FACTS_WAY}") from None
    facts: dict[str, Any] = data
    return facts


def check_free(root: Path) -> None:
    """Raise RunError unless a run can begin in ``root``."""
    if (root / "run.json").exists():
        raise RunError(f"{root}: holds a run already; mbf resume {root} goes on with it, --output starts one elsewhere")
    if root.exists() and not root.is_dir():
        raise RunError(f"{root}: is a file, wanted a directory; choose another --output")
    foreign = [p.name for p in root.glob("*") if p.name not in ("config.yaml", ".lock") and not is_torso(p.name)]
    if foreign:
        raise RunError(f"{root}: is not empty (it has {foreign[0]}); choose another --output")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Nobody else runs in ``root`` for the while; the lock falls with the process, however it ends.

    What processes that were killed here left half written is removed.

    Raises:
        RunError: somebody else does.
        OSError: nothing can be written there.
    """
    lock = FileLock(root / ".lock")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{root}: another process is running here; wait for it or stop it first") from None
    try:
        with writing(root):
            sweep(root)
        yield
    finally:
        lock.release()


def write_json(path: Path, data: Any) -> None:
    """Replace the file in one step."""
    write_file(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def read_json(path: Path, way: str = WAY) -> Any:
    """What ``write_json`` wrote; None where there is no file.

    Raises:
        RunError: it is no JSON, or cannot be read; ends with ``way``, the way out.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
        if data is None:
            raise ValueError("null")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: found {_words(error)}, wanted what mbf wrote there; {way}") from None
    return data


def _words(error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return "a directory"
    if isinstance(error, OSError):
        return f"a file that cannot be read ({error.strerror})"
    if isinstance(error, RecursionError):
        return "JSON nested without end"
    return f"broken JSON ({error})"
