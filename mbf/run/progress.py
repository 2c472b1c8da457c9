"""What a run tells whoever watches it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """A watcher of a run. A cell is one method with one order and one seed; its name is ``<label>-order1-seed0``."""

    def cell_started(self, cell: str, number: int, total: int, tasks: Sequence[str]) -> None:
        """Cell ``number`` (from 1) of ``total`` begins, or goes on, with its tasks in learning order."""
        ...

    def task_started(self, cell: str, task: str, number: int, total: int, steps: int) -> None:
        """Training on task ``number`` (from 1) of ``total`` begins; it takes ``steps`` optimiser steps."""
        ...

    def step(self, step: int, steps: int, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """Optimiser step ``step`` (from 1) of ``steps`` of the task is done; seconds are those left of its training."""
        ...

    def evaluating(self, cell: str, after: str | None, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` test rows of ``task`` were answered after learning ``after`` (None: before any)."""
        ...

    def scored(self, cell: str, after: str | None, task: str, score: float) -> None:
        """``score`` percent on ``task`` after learning ``after`` (None: before any)."""
        ...

    def cell_finished(self, cell: str) -> None:
        """The cell's result is written."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line."""
        ...


class Silent:
    """Says nothing: what the other processes of a run tell."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


class LogProgress:
    """The default: lines of the logger ``mbf.run``, one a task and score and one every ten steps."""

    def cell_started(self, cell: str, number: int, total: int, tasks: Sequence[str]) -> None:
        logger.info("%s (%d of %d): %s", cell, number, total, ", ".join(tasks))

    def task_started(self, cell: str, task: str, number: int, total: int, steps: int) -> None:
        logger.info("%s: task %d of %d, %s, %d steps", cell, number, total, task, steps)

    def step(self, step: int, steps: int, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        if step % 10 == 0 or step == steps:
            shown = "-" if loss is None else f"{loss:.3f}"
            logger.info(
                "step %d/%d, loss %s, %.0f tokens/s, %.0f s left", step, steps, shown, tokens_per_second, seconds_left
            )

    def evaluating(self, cell: str, after: str | None, task: str, done: int, total: int) -> None:
        logger.debug("%s: %s after %s: %d/%d", cell, task, after, done, total)

    def scored(self, cell: str, after: str | None, task: str, score: float) -> None:
        logger.info("%s: %s after %s: %.1f", cell, task, after or "nothing", score)

    def cell_finished(self, cell: str) -> None:
        logger.info("%s: finished", cell)

    def message(self, text: str) -> None:
        logger.info("%s", text)
