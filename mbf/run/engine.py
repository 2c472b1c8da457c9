"""A run: its cells one after another, then the report. ``run`` starts one, ``resume`` goes on with one."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf.run.config import RunConfig
from mbf.run.directory import RunDirectory, RunError, check_free, locked
from mbf.run.progress import LogProgress, Progress
from mbf.run.versions import versions

if TYPE_CHECKING:
    from mbf.report import RunResult
    from mbf.run.workbench import Workbench


def run(config: RunConfig, progress: Progress | None = None) -> list[RunResult]:
    """Every method of ``config`` on every order with every seed, and the report of them all.

    Args:
        config: what to run; ``config.output`` is where, default ``runs/<stream>-<time>``.
        progress: told what happens; default the logger ``mbf.run``.

    Returns:
        One result a cell. ``<output>/report/report.html`` shows them.

    Raises:
        RunError: the directory is not free.
        ConfigError, mbf.streams.StreamError, ValueError: the configuration does not fit the stream or the model; then
            nothing was written.
        mbf.continual.TaskError: a method left a broken adapter; ``resume`` can go on.
    """
    from mbf.run.workbench import Workbench  # late, as it brings transformers, which takes seconds to import

    progress = progress or LogProgress()
    root = config.output or default_output(config)
    check_free(root)
    bench = Workbench(config, progress)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with locked(root):
        facts = {"command": command, "versions": versions(), "data": bench.data_hashes()}
        return _run_cells(RunDirectory.create(root, config, facts), bench, progress)


def default_output(config: RunConfig) -> Path:
    """``runs/<stream>-<time>``."""
    return Path("runs", f"{config.stream_name}-{time.strftime('%Y%m%d-%H%M%S')}")


def resume(directory: str | Path, progress: Progress | None = None) -> list[RunResult]:
    """Go on with the run in ``directory`` from its newest whole checkpoint.

    It ends as it would have without the interruption: the same scores, the same adapters bit for bit. Cells that are
    finished are not run again.

    Raises:
        RunError: no run there, another process is at it, or its configuration or data changed.
    """
    from mbf.run.workbench import Workbench

    progress = progress or LogProgress()
    root = Path(directory)
    found = RunDirectory.open(root)
    with locked(root):
        bench = Workbench(found.config, progress)
        _check_same_data(found, bench.data_hashes())
        for name, now in versions().items():
            if (then := found.facts["versions"].get(name)) != now:
                progress.message(f"{name} was {then} when the run was started and is {now} now: bits may differ")
        return _run_cells(found, bench, progress)


def _run_cells(run: RunDirectory, bench: Workbench, progress: Progress) -> list[RunResult]:
    from mbf.report import write_report
    from mbf.run.cell import Cell, cells_of, finished

    results = []
    keys = cells_of(run.config)
    for number, key in enumerate(keys, 1):
        result = finished(key, run)
        if result is None:
            progress.cell_started(key.name, number, len(keys), bench.stream.orders[key.order])
            result = Cell(key, run, bench).run()
            progress.cell_finished(key.name)
        results.append(result)
    write_report(results, run.report)
    return results


def _check_same_data(run: RunDirectory, hashes: Mapping[str, Any]) -> None:
    then = run.facts["data"]
    changed = [task for task in sorted(then.keys() | hashes.keys()) if then.get(task) != hashes.get(task)]
    if changed:
        raise RunError(
            f"{run.root}: the rows of {', '.join(changed)} are not those that the run was started with; "
            "put the data back to go on, or start a new run"
        )
