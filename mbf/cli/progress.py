"""What a run shows while it goes on: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from mbf.run import LogProgress, Progress
from mbf.streams import Progress as FetchProgress


class BarProgress:
    """Two bars, one of the tasks of all cells and one of the steps or rows of what goes on now; scores stay above."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._cells = bars.add_task("", total=None, note="tasks", visible=False)
        self._now = bars.add_task("", total=None, note="", visible=False)
        self._scores: list[str] = []
        self._after: str | None = None
        self._learned = 0  # tasks of the cells before
        self._tasks = 0  # of this one

    def cell_started(self, cell: str, number: int, total: int, tasks: Sequence[str]) -> None:
        self._tasks = len(tasks)
        self._learned = (number - 1) * len(tasks)
        self._bars.update(
            self._cells,
            description=f"{cell} ({number} of {total})",
            total=total * len(tasks),
            completed=self._learned,
            visible=True,
        )

    def task_started(self, cell: str, task: str, number: int, total: int, steps: int) -> None:
        self._print_scores()
        self._bars.update(self._cells, completed=self._learned + number - 1)
        self._bars.reset(self._now, description=f"training {task}", total=steps, visible=True, note="")

    def step(self, step: int, steps: int, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        shown = "–" if loss is None else f"{loss:.3f}"
        left = timedelta(seconds=round(seconds_left))
        note = f"steps  loss {shown}  {tokens_per_second:.0f} tokens/s  {left} left"
        self._bars.update(self._now, completed=step, total=steps, note=note)

    def evaluating(self, cell: str, after: str | None, task: str, done: int, total: int) -> None:
        self._bars.update(
            self._now, description=f"evaluating {task}", completed=done, total=total, visible=True, note="rows"
        )

    def scored(self, cell: str, after: str | None, task: str, score: float) -> None:
        if after != self._after:
            self._print_scores()
        self._after = after
        self._scores.append(f"{task} {score:.1f}")

    def cell_finished(self, cell: str) -> None:
        self._print_scores()
        self._bars.update(self._cells, completed=self._learned + self._tasks)
        self._bars.update(self._now, visible=False)
        self._bars.console.print(f"{cell}: finished", markup=False)

    def message(self, text: str) -> None:
        self._print_scores()
        self._bars.console.print(text, markup=False, soft_wrap=True)

    def _print_scores(self) -> None:
        """One line for one round of evaluation."""
        if self._scores:
            when = "zero-shot" if self._after is None else f"after {self._after}"
            self._bars.console.print(f"{when}: {', '.join(self._scores)}", markup=False, soft_wrap=True)
        self._scores = []


@contextmanager
def run_progress(console: Console) -> Iterator[Progress]:
    """The watcher of a run: bars where ``console`` is a terminal, else log lines on stderr."""
    if not console.is_terminal:
        with _logging_to(logging.StreamHandler(sys.stderr)):
            yield LogProgress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Bars(*columns, console=console) as bars, _logging_to(_above(console)):
        yield BarProgress(bars)


@contextmanager
def fetch_progress(console: Console) -> Iterator[FetchProgress | None]:
    """The watcher of downloads: a bar a file where ``console`` is a terminal, else none; the log lines come anyhow."""
    if not console.is_terminal:
        with _logging_to(logging.StreamHandler(sys.stderr)):
            yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars, _logging_to(_above(console)):
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bars.add_task(what, total=total)
            bars.update(rows[what], completed=done, total=total)

        yield show


def _above(console: Console) -> logging.Handler:
    return RichHandler(
        console=console, show_time=False, show_level=False, show_path=False, markup=False, highlighter=None
    )


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send what mbf logs, INFO and above, to ``handler``."""
    logger = logging.getLogger("mbf")
    level = logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
