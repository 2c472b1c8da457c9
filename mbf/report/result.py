"""What one run leaves behind for the report: ``result.json`` in its directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mbf.continual.metrics import (
    MALFORMED,
    SCHEMA_VERSION,
    Count,
    ScoreMatrix,
    Seconds,
    Text,
    first_error,
    is_name,
    is_unicode,
)

RESULT_FILE = "result.json"
_DEEPEST = 100
_WAY = (
    "restore it from a copy, give the folder of a run or, if it is a cell's result.json, remove it and `mbf resume` "
    "the run, which writes it again"
)


class ResultError(ValueError):
    """A result that is missing, malformed or at odds with another; the message names it and the way out."""


class TaskMemory(BaseModel):
    """Bytes measured after one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter_bytes: Count
    """The adapter that is shipped."""
    state_bytes: Count
    """What the method keeps beside it for the next task."""


class RunResult(BaseModel):
    """One method on one order of a stream with one seed.

    ``method_options`` and ``config`` hold what JSON does: text in Unicode, finite numbers, at most 100 levels.

    Attributes:
        method: the method's name.
        label: the name in the report, printable as ``method`` and ``stream``, too; runs of a stream that share a label
            and method_options are averaged.
        stream: the stream's name.
        order: the number of the task order, from 1.
        order_tasks: task names in learning order; the same as ``matrix.tasks``.
        seed: the run's seed.
        matrix: scores in percent.
        skipped: why a task was not learned, by task; not written where there are none.
        memory: one entry a task learned or skipped, in learning order; a single entry where all tasks were learned at
            once.
        train_seconds, train_tokens: wall-clock seconds and tokens trained on, entries as for ``memory``.
        method_options: the method's options that differ from its defaults, or all of them.
        versions: version by package name, None where not installed.
        data_hashes: sha256 of the rows by task name.
        config: the run's configuration.
        command: the command line that made the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str
    label: str
    stream: str
    order: int = Field(ge=1, le=2**63)
    order_tasks: tuple[str, ...]
    seed: int = Field(ge=-(2**63), le=2**63)
    matrix: ScoreMatrix
    skipped: dict[Text, Text] = {}
    memory: list[TaskMemory] = []
    train_seconds: list[Seconds] = []
    train_tokens: list[Count] = []
    method_options: dict[str, Any] = {}
    versions: dict[Text, Text | None] = {}
    data_hashes: dict[Text, Text] = {}
    config: dict[str, Any] = {}
    command: Text | None = None

    @field_validator("method", "label", "stream")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not is_name(name):
            raise ValueError(f"found {name!r}, wanted a name that is printable and not empty")
        return name

    @field_validator("method_options", "config")
    @classmethod
    def _check_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        todo: list[tuple[Any, tuple[str, ...]]] = [(values, ())]
        while todo:
            value, path = todo.pop()
            where = repr(".".join(path)[:80])
            if len(path) > _DEEPEST:
                raise ValueError(f"found more than {_DEEPEST} levels at {where}, wanted fewer")
            if isinstance(value, dict):
                todo += [pair for key, one in value.items() for pair in ((key, path), (one, (*path, str(key))))]
            elif isinstance(value, list | tuple):
                todo += [(one, (*path, str(n))) for n, one in enumerate(value)]
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"found {value} at {where}, wanted a finite number")
            elif isinstance(value, str) and not is_unicode(value):
                raise ValueError(f"found half a surrogate pair at {where}, wanted text in Unicode")
        return values

    @model_validator(mode="after")
    def _check(self) -> RunResult:
        if self.order_tasks != self.matrix.tasks:
            raise ValueError(
                f"order_tasks is {', '.join(self.order_tasks)}, but the matrix is of {', '.join(self.matrix.tasks)}"
            )
        if set(self.skipped) != set(self.matrix.skipped):
            raise ValueError(
                f"skipped has {', '.join(self.skipped) or 'no task'}, but the matrix "
                f"{', '.join(self.matrix.skipped) or 'none'}"
            )
        for name in ("memory", "train_seconds", "train_tokens"):
            if (found := len(getattr(self, name))) > len(self.order_tasks):
                raise ValueError(
                    f"{name} has {found} entries for {len(self.order_tasks)} tasks; give one a task learned"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return data if self.skipped else {key: value for key, value in data.items() if key != "skipped"}

    @property
    def cell(self) -> str:
        """Which run of a comparison this is, in words."""
        return f"{self.label}, {self.stream} order {self.order}, seed {self.seed}"

    @property
    def options_key(self) -> str:
        """``method_options`` as text that is equal for equal options."""
        return json.dumps(self.method_options, sort_keys=True, default=str)


def load_results(paths: Iterable[str | Path]) -> list[RunResult]:
    """Read every ``result.json`` at or below ``paths``, sorted by path within each.

    Raises:
        ResultError: a path that does not exist or holds no result, a file that is not a result, or two files that both
            claim to be the same run.
    """
    found: dict[Path, RunResult] = {}
    origin: dict[tuple[str, str], Path] = {}
    for path in paths:
        for file in _result_files(Path(path)):
            if (resolved := file.resolve()) in found:
                continue
            result = found[resolved] = _read(file)
            twin = origin.setdefault((result.cell, result.options_key), file)
            if twin is not file:
                raise ResultError(
                    f"{twin} and {file} are both {result.cell}; "
                    f"leave one out, or give one another label in its {RESULT_FILE}"
                )
    if not found:
        raise ResultError(f"no results to report; name a run directory or a {RESULT_FILE}")
    return list(found.values())


def _result_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ResultError(f"{path} does not exist; name a run directory or a {RESULT_FILE}")
    files = sorted(path.rglob(RESULT_FILE))
    if not files:
        raise ResultError(
            f"no {RESULT_FILE} in or below {path}; it is written when a run ends: finish it with `mbf resume {path}`"
        )
    return files


def _read(file: Path) -> RunResult:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{file} cannot be read as JSON: {error}; {_WAY}") from None
    return parse_result(data, file)


def parse_result(data: Any, file: Path) -> RunResult:
    """The result that ``data``, of ``file``, is.

    Raises:
        ResultError: it is none, or of a newer version.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ResultError(f"{file} has schema_version {version}, this mbf reads {SCHEMA_VERSION}; update mbf")
    try:
        return RunResult.model_validate(data)
    except MALFORMED as error:
        raise ResultError(f"{file} is not a result of a run: {first_error(error)}; {_WAY}") from None
