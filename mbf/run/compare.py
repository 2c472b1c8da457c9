"""A comparison: many methods over one stream in one directory, which may grow, be stopped at any moment, and go on.

Its directory is that of a run with one file more, and one in every cell that failed::

    compare.json                the cells asked for so far, in the order of asking
    cells/<cell>/failed.json    why a cell failed, until it is run again

A second call adds methods, orders or seeds, and the cells that are there stay as they are. A directory of ``mbf run``
grows into a comparison likewise.
"""

from __future__ import annotations

import shlex
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbf.continual.header import CheckpointError
from mbf.run.cell import Cell, CellKey, cells_of
from mbf.run.config import RunConfig
from mbf.run.directory import CellDirectory, RunDirectory, RunError, check_free, locked, write_json
from mbf.run.engine import check_same_data, command_line, note_versions
from mbf.run.plan import (
    FAILED,
    Comparison,
    check_settings,
    grown,
    is_run,
    output_of,
    planned_cells,
    settings_of,
    state_of,
    write_plan,
)
from mbf.run.progress import LogProgress, Progress
from mbf.run.versions import versions

if TYPE_CHECKING:
    from mbf.run.workbench import Workbench


def compare(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cells: Sequence[CellKey] | None = None,
    budget: float | None = None,
) -> Comparison:
    """Add cells to a comparison, run whatever of it is not finished, and write its report.

    A finished cell is not touched. One that was broken off goes on from its newest whole checkpoint and ends with the
    bits of an unbroken one; one that failed is begun anew, after all others. What a cell raises is kept with its
    traceback in ``failed.json``, and the next cell is begun.

    Args:
        config: settings; its methods x orders x seeds are the cells. ``config.output`` is the directory, default
            ``runs/<stream>-compare``.
        progress: told what happens; default the logger ``mbf.run``.
        cells: other cells than those of ``config``; none go on with what was asked for before.
        budget: minutes after which no cell is begun; the one in training is finished.

    Raises:
        RunError: the directory holds something else, cells made with other settings or data, or a label for another
            method; another process is at it; or this is one of several processes.
        ConfigError, mbf.streams.StreamError, ValueError: the configuration does not fit the stream or the model; then
            nothing was written.
        OSError: a disk that is full, say, which would break every other cell, too.
        mbf.continual.CheckpointError: a cell's learner is damaged; nothing of it was touched.
    """
    deadline = None if budget is None else time.monotonic() + 60 * budget
    progress = progress or LogProgress()
    root = output_of(config)
    asked = cells_of(config) if cells is None else list(cells)
    bench = None
    if not is_run(root):
        check_free(root)
        bench = _workbench(config, asked, progress)
    with locked(root):
        run = _open_or_create(root, config, bench)
        planned = grown(root, [] if bench else planned_cells(run), asked)
        todo = _todo(state_of(root, planned, {}))
        if todo and bench is None:
            bench = _workbench(config, planned, progress)
            check_same_data(run, bench)
            note_versions(run, progress)
        write_plan(root, planned)
        failed = {} if bench is None else _run_cells(planned, todo, run, bench, deadline)
        found = state_of(root, planned, failed)
        _write_reports(found, run)
        return found


def _workbench(config: RunConfig, cells: Sequence[CellKey], progress: Progress) -> Workbench:
    from mbf.run.processes import Processes
    from mbf.run.workbench import Workbench

    here = Processes()
    if here.size > 1:
        raise RunError(
            f"a comparison runs in one process, and this is one of {here.size}; mbf run shares the batches of a cell"
        )
    orders = sorted({key.order for key in cells})
    return Workbench(config.model_copy(update={"orders": orders}), progress, here)


def _open_or_create(root: Path, config: RunConfig, bench: Workbench | None) -> RunDirectory:
    if is_run(root):
        run = RunDirectory.open(root)
        check_settings(run, config)
        return run
    assert bench is not None
    facts = {"command": command_line(), "versions": versions(), **bench.facts()}
    return RunDirectory.create(root, config, facts)


def _todo(comparison: Comparison) -> list[CellKey]:
    """What is not finished; last what failed before, which may fail again."""
    open_ = [one for one in comparison.cells if one.state != "finished"]
    return [one.key for one in sorted(open_, key=lambda one: one.state == "failed")]


def _run_cells(
    planned: Sequence[CellKey], todo: Sequence[CellKey], run: RunDirectory, bench: Workbench, deadline: float | None
) -> dict[str, str]:
    """The cells that failed, with the reason."""
    # A cell is described by its own method, order and seed; and by this call, which may be years after the first.
    facts = {
        **run.facts,
        "config": settings_of(run.facts["config"]) | {"on_bad_task": bench.config.on_bad_task},
        "versions": versions(),
        "command": command_line(),
    }
    run = replace(run, facts=facts)
    numbers = {key.name: number for number, key in enumerate(planned, 1)}
    failed = {}
    for key in todo:
        if deadline is not None and time.monotonic() >= deadline:
            break
        _begin_anew_if_failed(run.cell(key.name))
        bench.progress.cell_started(key.name, numbers[key.name], len(planned), bench.stream.orders[key.order])
        try:
            Cell(key, run, bench).run()
        except (OSError, RunError, CheckpointError):  # a full disk, a broken file: nothing to begin anew for
            raise
        except Exception as error:
            failed[key.name] = reason = " ".join(f"{type(error).__name__}: {error}".split())
            record = {"reason": reason, "command": facts["command"], "traceback": traceback.format_exception(error)}
            write_json(run.cell(key.name).root / FAILED, record)
            bench.progress.message(f"{key.name}: failed: {reason}")
        else:
            bench.progress.cell_finished(key.name)
    return failed


def _begin_anew_if_failed(cell: CellDirectory) -> None:
    """A checkpoint may have what made it fail, NaN say; so nothing of it is kept. The mark goes last: a kill in between
    leaves a cell that failed."""
    if not (cell.root / FAILED).exists():
        return
    for path in sorted(cell.root.iterdir(), key=lambda path: path != cell.progress):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != FAILED:
            path.unlink()
    (cell.root / FAILED).unlink()


def _write_reports(found: Comparison, run: RunDirectory) -> None:
    from mbf.report import write_comparison, write_report

    if found.results:
        write_report(found.results, run.report)
        write_comparison(found.results, run.report, asked=found.asked(), failed=found.reasons())


def go_on(directory: Path, budget: float | None = None) -> str:
    """The command that goes on with the comparison in ``directory``."""
    words = ["mbf", "compare", "--out", str(directory)]
    return shlex.join(words if budget is None else [*words, "--budget", f"{budget:g}"])
