"""What a run shows: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from mbf.cli.progress import fetch_progress, run_progress


def a_run(progress) -> None:
    """One cell of two tasks as the engine tells it."""
    progress.cell_started("slao-order1-seed0", 1, 1, ["news", "mail"])
    progress.scored("slao-order1-seed0", None, "news", 10.0)
    progress.scored("slao-order1-seed0", None, "mail", 20.0)
    for number, task in enumerate(["news", "mail"], 1):
        progress.task_started("slao-order1-seed0", task, number, 2, 30)
        progress.step(30, 30, 0.625, 190.4, 61.0)
        progress.evaluating("slao-order1-seed0", task, "news", 5, 12)
        progress.scored("slao-order1-seed0", task, "news", 80.0)
        progress.scored("slao-order1-seed0", task, "mail", 40.0)
    progress.message("checkpoint [3] kept")
    progress.cell_finished("slao-order1-seed0")


def test_a_terminal_gets_bars_and_scores() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150, color_system=None)
    with run_progress(console) as progress:
        bars = progress._bars
        bars.live.auto_refresh = False  # no second thread: what is seen must be drawn by the lines below
        a_run(progress)
        bars.refresh()
        for line in ("zero-shot: news 10.0, mail 20.0", "after news: news 80.0, mail 40.0", "checkpoint [3] kept"):
            assert line in screen.getvalue()
        assert "2/2" in screen.getvalue()
        screen.truncate(0)
        progress.task_started("slao-order1-seed0", "mail", 2, 2, 30)
        progress.step(7, 30, 0.625, 190.4, 61.0)
        bars.refresh()
        for part in (
            "training mail",
            "7/30",
            "loss 0.625",
            "190 tokens/s",
            "0:01:01 left",
            "slao-order1-seed0 (1 of 1)",
        ):
            assert part in screen.getvalue()


def test_a_loss_that_is_not_known_yet() -> None:
    screen = io.StringIO()
    with run_progress(Console(file=screen, force_terminal=True, width=150)) as progress:
        progress.task_started("c", "news", 1, 1, 30)
        progress.step(1, 30, None, 0.0, 0.0)
        progress._bars.refresh()
    assert "loss –" in screen.getvalue()


def test_elsewhere_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with run_progress(Console(file=io.StringIO())) as progress:
        a_run(progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 30/30, loss 0.625, 190 tokens/s, 61 s left" in err
    assert "\x1b" not in err


def test_logging_is_left_as_it_was() -> None:
    logger = logging.getLogger("mbf")
    before = logger.level, list(logger.handlers)
    with run_progress(Console(file=io.StringIO())):
        assert logger.isEnabledFor(logging.INFO)
    assert (logger.level, logger.handlers) == before


def test_downloads_have_a_bar_each() -> None:
    screen = io.StringIO()
    with fetch_progress(Console(file=screen, force_terminal=True, width=150, color_system=None)) as progress:
        progress("a.whl", 1_000_000, 4_000_000)
        progress("b.whl", 1, 2)
        progress("a.whl", 4_000_000, 4_000_000)
    assert "4.0/4.0 MB" in screen.getvalue()
    assert "b.whl" in screen.getvalue()
