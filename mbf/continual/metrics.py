"""The score matrix of a continual run and the measures that are read off it, all in percent.

``a[i,t]`` is the score on task i after learning task t, both counted from 1; T is the number of tasks. Code bases
divide differently, so every measure has its formula in ``FORMULAS``, to be printed beside the number, and the whole
matrix is stored. A measure that lacks an entry it needs is None, never a number made from what happens to be there.

A task that was skipped (its training diverged, say) has a column, of what was learned before, and a row, as it is a
task that the one adapter is asked to do. So it counts in AA like any other. It has no score of the moment when it was
learned: BWT and forgetting are means over the tasks learned, but for the last of them. FWT is the mean over all tasks
after the first that was learned.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

FORMULAS: dict[str, str] = {
    "AA": "average accuracy = mean over i of a[i,T]",
    "AA_t": "average accuracy so far = mean over i ≤ t of a[i,t]",
    "BWT": "backward transfer = mean over i < T of (a[i,T] − a[i,i])",
    "FWT": "forward transfer = mean over i > 1 of (a[i,i−1] − zero-shot_i)",
    "Forgetting": "forgetting_i = (max over the evaluated t of a[i,t]) − a[i,T]; its mean is over i < T",
    "OPD": "order performance disparity: OPD_i = max over orders r of P_i^r − min over r of P_i^r, "
    "with P_i^r = a[i,T] in order r, averaged over its seeds",
    "MOPD": "maximum disparity = max over i of OPD_i",
    "AOPD": "average disparity = mean over i of OPD_i",
}

SCHEMA_VERSION: Literal[1] = 1

Percent = Annotated[float, Field(strict=True, ge=0, le=100)]
Count = Annotated[int, Field(ge=0, le=2**63)]
"""Bytes, tokens: of a size that can be added up and drawn."""
Seconds = Annotated[float, Field(ge=0, le=2**63, allow_inf_nan=False)]


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written to a file; JSON can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_text(text: str) -> str:
    if not is_unicode(text):
        raise ValueError(f"found {text[:80]!r}, wanted text in Unicode")
    return text


Text = Annotated[str, AfterValidator(_check_text)]


def is_name(text: str) -> bool:
    """Whether ``text`` can name something in a table, a file and a line of a message: printable and not empty."""
    return bool(text) and text.isprintable()


class ScoreMatrix(BaseModel):
    """Scores of T tasks after each of T tasks.

    Attributes:
        tasks: names in learning order, distinct and printable.
        scores: T lists of T: ``scores[i][t]`` is a[i+1,t+1] in percent, 0 to 100; None (or NaN on input) where not
            evaluated. Learning all tasks at once fills the last column only.
        zero_shot: T scores of the model before the first task; all None by default.
        skipped: those of ``tasks`` that were not learned; not written where there are none.

    Raises:
        pydantic.ValidationError (a ValueError): names not distinct, shapes that do not fit, scores out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    tasks: tuple[str, ...]
    scores: list[list[Percent | None]]
    zero_shot: list[Percent | None] = []
    skipped: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return data if self.skipped else {key: value for key, value in data.items() if key != "skipped"}

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, data: Any) -> Any:
        if isinstance(data, dict) and (found := data.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise ValueError(
                f"score matrix has schema_version {found!r}, this mbf reads {SCHEMA_VERSION}; "
                "read it with the version of mbf that wrote it"
            )
        return data

    @field_validator("scores", "zero_shot", mode="before")
    @classmethod
    def _nan_is_missing(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [cls._nan_is_missing(v) for v in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    @model_validator(mode="after")
    def _check_shape(self) -> ScoreMatrix:
        count = len(self.tasks)
        if count == 0:
            raise ValueError("score matrix has no tasks; give at least one")
        for n, name in enumerate(self.tasks):
            if not is_name(name):
                raise ValueError(f"task {n + 1} is named {name!r}; names must be printable and not empty")
            if name in self.tasks[:n]:
                raise ValueError(f"task {name!r} occurs twice; give each task its own name")
        if len(self.scores) != count:
            raise ValueError(f"scores has {len(self.scores)} rows, wanted {count}, one a task")
        for name, row in zip(self.tasks, self.scores, strict=True):
            if len(row) != count:
                raise ValueError(f"row {name!r} of scores has {len(row)} entries, wanted {count}; use None for missing")
        if not self.zero_shot:
            self.zero_shot.extend([None] * count)
        if len(self.zero_shot) != count:
            raise ValueError(f"zero_shot has {len(self.zero_shot)} entries, wanted {count}, one a task")
        if unknown := [name for name in self.skipped if name not in self.tasks]:
            raise ValueError(f"skipped has {unknown[0]!r}, wanted names of tasks: {', '.join(self.tasks)}")
        return self

    @classmethod
    def empty(cls, tasks: Iterable[str]) -> ScoreMatrix:
        """A matrix with nothing evaluated yet, to be filled by ``record``."""
        names = tuple(tasks)
        return cls(tasks=names, scores=[[None] * len(names) for _ in names])

    def record(self, task: str, after: int, score: float) -> None:
        """Enter the percent ``score`` on ``task`` after learning ``after`` tasks; 0 stands for zero-shot.

        Raises:
            ValueError: unknown task, ``after`` outside 0..T, or a score that is not a number from 0 to 100.
        """
        if task not in self.tasks:
            raise ValueError(f"no task {task!r} in the score matrix; it has {', '.join(self.tasks)}")
        if not 0 <= after <= len(self.tasks):
            raise ValueError(f"after = {after}, wanted 0 (zero-shot) to {len(self.tasks)}")
        if not 0 <= score <= 100:
            raise ValueError(f"score on {task!r} after {after} tasks is {score}, wanted a percentage from 0 to 100")
        i = self.tasks.index(task)
        if after == 0:
            self.zero_shot[i] = float(score)
        else:
            self.scores[i][after - 1] = float(score)

    # -- measures; indices here count from 0 -------------------------------------------------------------------------

    @property
    def learned(self) -> list[int]:
        """Indices of the tasks that were not skipped."""
        return [i for i, name in enumerate(self.tasks) if name not in self.skipped]

    @property
    def final(self) -> dict[str, float | None]:
        """a[i,T] by task name."""
        return {name: row[-1] for name, row in zip(self.tasks, self.scores, strict=True)}

    @property
    def joint(self) -> bool:
        """Whether only the last column was evaluated: all tasks were learned at once."""
        before = [score for row in self.scores for score in row[:-1]]
        return bool(before) and all(s is None for s in before) and any(row[-1] is not None for row in self.scores)

    @property
    def aa(self) -> float | None:
        """AA = mean_i a[i,T]."""
        return self.average_accuracy_after(len(self.tasks))

    def average_accuracy_after(self, t: int) -> float | None:
        """mean_{i≤t} a[i,t], over the tasks seen after learning t of them, 1 ≤ t ≤ T."""
        if not 1 <= t <= len(self.tasks):
            raise ValueError(f"t = {t}, wanted 1 to {len(self.tasks)}")
        return _mean(self.scores[i][t - 1] for i in range(t))

    @property
    def bwt(self) -> float | None:
        """BWT = mean_{i<T} (a[i,T] − a[i,i]), over the tasks learned, T the last of them."""
        return _mean(_minus(self.scores[i][-1], self.scores[i][i]) for i in self.learned[:-1])

    @property
    def fwt(self) -> float | None:
        """FWT = mean_{i>1} (a[i,i−1] − zero-shot_i), 1 the first task learned; what was skipped after it counts."""
        after_first = range(self.learned[0] + 1, len(self.tasks)) if self.learned else ()
        return _mean(_minus(self.scores[i][i - 1], self.zero_shot[i]) for i in after_first)

    @property
    def forgetting_by_task(self) -> dict[str, float | None]:
        """Forgetting_i = max_t a[i,t] − a[i,T] by task name.

        The maximum is over every evaluated t; it is undefined unless all t ≥ i were evaluated, where all tasks were
        learned at once, and for a task that was skipped.
        """
        return {name: self._forgetting(i) for i, name in enumerate(self.tasks)}

    @property
    def forgetting(self) -> float | None:
        """mean_{i<T} Forgetting_i, over the tasks learned, T the last of them."""
        return _mean(self._forgetting(i) for i in self.learned[:-1])

    def _forgetting(self, i: int) -> float | None:
        row = self.scores[i]
        if self.joint or self.tasks[i] in self.skipped or any(score is None for score in row[i:]):
            return None
        return _minus(max(score for score in row if score is not None), row[-1])

    # -- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ScoreMatrix:
        """The inverse of ``to_json``.

        Raises:
            ValueError: one line that says what is wrong and where.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(f"not a score matrix in JSON: {first_error(error)}; give what to_json wrote") from None

    def to_csv(self) -> str:
        """One row a task in learning order, one column "after <task>" a task, "skipped <task>" where it was not
        learned; missing entries are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["task", "zero-shot", *(_column(name, name in self.skipped) for name in self.tasks)])
        for name, zero, row in zip(self.tasks, self.zero_shot, self.scores, strict=True):
            writer.writerow([name, *("" if score is None else repr(score) for score in (zero, *row))])
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> ScoreMatrix:
        """The inverse of ``to_csv``.

        Raises:
            ValueError: one line that names the row and column.
        """
        try:
            header, *rows = [row for row in csv.reader(io.StringIO(text.removeprefix("\ufeff"))) if row] or [[]]
        except csv.Error as error:
            raise ValueError(f"not a score matrix in CSV: {error}; give what to_csv wrote") from None
        skipped = tuple(row[0] for row in rows if _column(row[0], True) in header[2:])
        wanted = ["task", "zero-shot", *(_column(row[0], row[0] in skipped) for row in rows)]
        if header != wanted:
            raise ValueError(
                f"not a score matrix in CSV: the header is {','.join(header)!r}; wanted is {','.join(wanted)!r}, "
                "a column for each row's task, in the same order"
            )
        for row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"not a score matrix in CSV: row {row[0]!r} has {len(row)} cells, wanted {len(header)}"
                )
        values = [[_score(row, n, header[n]) for n in range(1, len(header))] for row in rows]
        try:
            return cls(
                tasks=tuple(row[0] for row in rows),
                zero_shot=[row[0] for row in values],
                scores=[row[1:] for row in values],
                skipped=skipped,
            )
        except ValidationError as error:
            raise ValueError(f"not a score matrix in CSV: {first_error(error)}; give what to_csv wrote") from None


@dataclass(frozen=True)
class OrderDisparity:
    """How much the final scores depend on the order of the tasks, in percent.

    Attributes:
        opd: OPD_i = max_r P_i^r − min_r P_i^r by task name; None where a final score is missing.
        orders: how many orders R were compared.
    """

    opd: dict[str, float | None]
    orders: int

    @property
    def mopd(self) -> float | None:
        """max_i OPD_i."""
        values = [value for value in self.opd.values() if value is not None]
        return max(values) if len(values) == len(self.opd) else None

    @property
    def aopd(self) -> float | None:
        """mean_i OPD_i."""
        return _mean(self.opd.values())


def order_disparity(matrices: Iterable[ScoreMatrix]) -> OrderDisparity:
    """OPD, MOPD and AOPD of one method over R orders of the same tasks.

    Args:
        matrices: one or more a task order; those of the same order are seeds, whose final scores are averaged to P_i^r.

    Returns:
        Everything None when there are fewer than two orders.

    Raises:
        ValueError: no matrix, or matrices of different tasks.
    """
    orders: dict[tuple[str, ...], list[ScoreMatrix]] = {}
    for matrix in matrices:
        orders.setdefault(matrix.tasks, []).append(matrix)
    if not orders:
        raise ValueError("order disparity of no matrices; give at least two orders")
    names = next(iter(orders))
    for other in orders:
        if set(other) != set(names):
            raise ValueError(
                f"order disparity compares orders of the same tasks; only one of two has "
                f"{', '.join(sorted(set(other) ^ set(names)))}"
            )
    return OrderDisparity({name: _spread(name, list(orders.values())) for name in names}, len(orders))


def _spread(task: str, orders: Sequence[Sequence[ScoreMatrix]]) -> float | None:
    final = [_mean(matrix.final[task] for matrix in seeds) for seeds in orders]
    known = [score for score in final if score is not None]
    return max(known) - min(known) if len(known) == len(orders) > 1 else None


MALFORMED = (ValidationError, UnicodeEncodeError)
"""What pydantic raises for values that came from JSON: the second for half a surrogate pair, in some places."""


def first_error(error: ValidationError | UnicodeEncodeError) -> str:
    """The first complaint of pydantic as one line: where, what, and the value found."""
    if isinstance(error, UnicodeEncodeError):
        return f"text that is no Unicode: {error}"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("value_error", "json_invalid", "missing"):
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    found = repr(first["input"])
    return f"{f'{where}: ' if where else ''}{first['msg']}, found {found if len(found) <= 80 else found[:77] + '...'}"


def _column(task: str, skipped: bool) -> str:
    return f"{'skipped' if skipped else 'after'} {task}"


def _score(row: Sequence[str], n: int, column: str) -> float | None:
    try:
        return float(row[n]) if row[n] else None
    except ValueError:
        raise ValueError(
            f"not a score matrix in CSV: row {row[0]!r}, column {column!r} is {row[n]!r}, wanted a number or nothing"
        ) from None


def _minus(x: float | None, y: float | None) -> float | None:
    return None if x is None or y is None else x - y


def _mean(values: Iterable[float | None]) -> float | None:
    """None of nothing, and None when any value is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return math.fsum(known) / len(known) if known else None
