"""What a cell has done so far, on disk after every task and every score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from mbf.continual import ScoreMatrix
from mbf.continual.metrics import MALFORMED, Count, Percent, Seconds, Text, first_error
from mbf.run.directory import WAY, RunError, read_json, write_json

AT_ONCE = "all tasks"
"""The name of the one training of all tasks."""
_SCORES = TypeAdapter(dict[str, Percent], config=ConfigDict(allow_inf_nan=False))


class Learned(BaseModel):
    """One training: of one task, or of all at once. Seconds of wall clock, bytes as they were afterwards.

    One that was refused, and ``skipped`` for that reason, took no seconds and tokens: what is there is what was before.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    seconds: Seconds
    tokens: Count
    adapter_bytes: Count
    state_bytes: Count
    skipped: Text | None = None
    scores: dict[str, Percent] = {}
    """Percent by task, after it."""


class Ledger(BaseModel):
    """The tasks in learning order, and what was learned of them."""

    model_config = ConfigDict(extra="forbid")

    tasks: tuple[str, ...]
    learned: list[Learned] = []

    @classmethod
    def read(cls, path: Path, tasks: tuple[str, ...], joint: bool) -> Ledger:
        """The ledger at ``path``, or an empty one, of a method that learns all tasks at once (``joint``) or not.

        Raises:
            RunError: it is damaged, of other tasks, or of a method that learns otherwise.
        """
        data = read_json(path)
        if data is None:
            return cls(tasks=tasks)
        ledger = cls.parse(data, path)
        if ledger.tasks != tasks:
            raise RunError(f"{path}: found the tasks {', '.join(ledger.tasks)}, wanted {', '.join(tasks)}; {WAY}")
        names = [one.name for one in ledger.learned]
        wanted = [AT_ONCE] if joint else list(tasks[: len(names)])
        if names and names != wanted:
            raise RunError(f"{path}: found {', '.join(names)} learned, wanted {', '.join(wanted)}; {WAY}")
        return ledger

    @classmethod
    def parse(cls, data: Any, path: Path) -> Ledger:
        """The ledger that ``data``, of the file ``path``, is.

        Raises:
            RunError: it is none.
        """
        try:
            ledger = cls.model_validate(data)
        except MALFORMED as error:
            raise RunError(f"{path}: found {first_error(error)}, wanted what mbf wrote there; {WAY}") from None
        if len(ledger.learned) > len(ledger.tasks):
            raise RunError(f"{path}: found {len(ledger.learned)} tasks learned of {len(ledger.tasks)}; {WAY}")
        for one in ledger.learned:
            if foreign := one.scores.keys() - set(ledger.tasks):
                raise RunError(f"{path}: found a score on {min(foreign)}, which is none of the tasks; {WAY}")
        names = [one.name for one in ledger.learned]
        if names not in ([AT_ONCE], list(ledger.tasks[: len(names)])):
            wanted = ", ".join(ledger.tasks[: len(names)])
            raise RunError(f"{path}: found {', '.join(names)} learned, wanted {wanted}, or {AT_ONCE} at once; {WAY}")
        return ledger

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    def skipped(self, joint: bool) -> dict[str, str]:
        """Why a task was not learned, by task."""
        return {
            task: one.skipped
            for one in self.learned
            if one.skipped is not None
            for task in (self.tasks if joint else (one.name,))
        }

    def matrix(self, zero_shot: dict[str, float], joint: bool) -> ScoreMatrix:
        """a[i,t] as far as it was measured. Learning all tasks at once (``joint``) fills the last column."""
        columns: list[dict[str, float]] = [{} for _ in self.tasks]
        for number, learned in enumerate(self.learned):
            columns[-1 if joint else number] = learned.scores
        return ScoreMatrix(
            tasks=self.tasks,
            scores=[[column.get(task) for column in columns] for task in self.tasks],
            zero_shot=[zero_shot.get(task) for task in self.tasks],
            skipped=tuple(self.skipped(joint)),
        )


def check_scores(data: Any, path: Path) -> dict[str, float]:
    """Percent by task, as the file ``path`` has it.

    Raises:
        RunError: ``data`` is something else.
    """
    try:
        return _SCORES.validate_python(data)
    except MALFORMED as error:
        raise RunError(f"{path}: found {first_error(error)}, wanted scores by task; {WAY}") from None
