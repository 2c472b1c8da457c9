"""What a cell has done so far, on disk after every task and every score."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mbf.continual import ScoreMatrix
from mbf.run.directory import read_json, write_json


class Learned(BaseModel):
    """One training: of one task, or of all at once. Seconds of wall clock, bytes as they were afterwards."""

    model_config = ConfigDict(extra="forbid")

    name: str
    seconds: float
    tokens: int
    adapter_bytes: int
    state_bytes: int
    scores: dict[str, float] = {}
    """Percent by task, after it."""


class Ledger(BaseModel):
    """The tasks in learning order, and what was learned of them."""

    model_config = ConfigDict(extra="forbid")

    tasks: tuple[str, ...]
    learned: list[Learned] = []

    @classmethod
    def read(cls, path: Path, tasks: tuple[str, ...]) -> Ledger:
        """The ledger at ``path``, or an empty one."""
        data = read_json(path)
        return cls(tasks=tasks) if data is None else cls.model_validate(data)

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    def matrix(self, zero_shot: dict[str, float], joint: bool) -> ScoreMatrix:
        """a[i,t] as far as it was measured. Learning all tasks at once (``joint``) fills the last column."""
        columns: list[dict[str, float]] = [{} for _ in self.tasks]
        for number, learned in enumerate(self.learned):
            columns[-1 if joint else number] = learned.scores
        return ScoreMatrix(
            tasks=self.tasks,
            scores=[[column.get(task) for column in columns] for task in self.tasks],
            zero_shot=[zero_shot.get(task) for task in self.tasks],
        )
