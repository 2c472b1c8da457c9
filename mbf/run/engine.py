"""A run: its cells one after another, then the report. ``run`` starts one, ``resume`` goes on with one."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mbf.run.config import OnBadTask, RunConfig
from mbf.run.directory import COMPARISON, RunDirectory, RunError, check_free, locked
from mbf.run.progress import LogProgress, Progress, Silent
from mbf.run.versions import versions

if TYPE_CHECKING:
    from mbf.report import RunResult
    from mbf.run.processes import Processes
    from mbf.run.workbench import Workbench


def run(config: RunConfig, progress: Progress | None = None, *, sharded: bool = False) -> list[RunResult]:
    """Every method of ``config`` on every order with every seed, and the report of them all.

    Under torchrun or ``accelerate launch`` each process calls this; together they compute what one would, and the main
    one writes, to a directory that all can read.

    Args:
        config: what to run; ``config.output`` is where, default ``runs/<stream>-<time>``. Its batch size is that of
            all processes together.
        progress: told what happens, in the main process; default the logger ``mbf.run``.
        sharded: of several processes, each keeps a part of the model (FSDP2), not a replica (DDP).

    Returns:
        One result a cell. ``<output>/report/report.html`` shows them.

    Raises:
        RunError: the directory is not free.
        ConfigError, mbf.streams.StreamError, ValueError: the configuration does not fit the stream or the model; then
            nothing was written.
        mbf.continual.DivergedError: a task diverged, and ``config.on_bad_task`` is ``"stop"``; what was learned before
            it is there, and ``resume`` goes on, without the task if told ``on_bad_task="skip"``.
    """
    # late, as they bring torch and transformers, which take seconds to import
    from mbf.run.workbench import Workbench

    here, progress = _start(sharded, progress)
    root = here.on_main(lambda: config.output or default_output(config))
    here.on_main(lambda: check_free(root))
    bench = here.together(lambda: Workbench(config, progress, here))
    with _locked(root, here):
        facts = {"command": command_line(), "versions": versions(), **bench.facts()}
        return _run_cells(here.on_main(lambda: RunDirectory.create(root, config, facts)), bench, progress)


def _start(sharded: bool, progress: Progress | None) -> tuple[Processes, Progress]:
    """The run's processes, and whom this one tells what happens."""
    from mbf.run.processes import Processes

    here = Processes(sharded)
    if not here.main:
        return here, Silent()
    progress = progress or LogProgress()
    if sharded and not here.sharded:
        progress.message("sharded: there is one process, which holds the whole model; start more of them to split it")
    return here, progress


def command_line() -> str:
    """The command of this process, as a user would write it."""
    program = Path(sys.argv[0])
    return shlex.join([program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]])


@contextmanager
def _locked(root: Path, processes: Processes) -> Iterator[None]:
    with ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(locked(root)))
        yield


def default_output(config: RunConfig) -> Path:
    """``runs/<stream>-<time>``."""
    return Path("runs", f"{config.stream_name}-{time.strftime('%Y%m%d-%H%M%S')}")


def resume(
    directory: str | Path,
    progress: Progress | None = None,
    *,
    sharded: bool = False,
    on_bad_task: OnBadTask | None = None,
) -> list[RunResult]:
    """Go on with the run in ``directory`` from its newest whole checkpoint.

    It ends as it would have without the interruption: the same scores, the same adapters bit for bit. Cells that are
    finished are not run again. The number of processes may be another one, and so may ``sharded``; sums are then
    rounded otherwise, and dropout masks are others. ``on_bad_task`` is for this call; default what the run was started
    with.

    Raises:
        RunError: no run there, another process is at it, or its configuration or data changed.
    """
    from mbf.run.workbench import Workbench

    here, progress = _start(sharded, progress)
    root = Path(directory)
    found = here.on_main(lambda: _open_run(root, on_bad_task))
    with _locked(root, here):
        bench = here.together(lambda: Workbench(found.config, progress, here))
        check_same_data(found, bench)
        note_versions(found, progress)
        return _run_cells(found, bench, progress)


def _open_run(root: Path, on_bad_task: OnBadTask | None) -> RunDirectory:
    if (root / COMPARISON).exists():
        raise RunError(f"{root}: holds a comparison; go on with it by mbf compare --out {shlex.quote(str(root))}")
    found = RunDirectory.open(root)
    if on_bad_task is None:
        return found
    config = found.config.model_copy(update={"on_bad_task": on_bad_task})
    return replace(found, config=config, facts={**found.facts, "config": config.plain()})


def _run_cells(run: RunDirectory, bench: Workbench, progress: Progress) -> list[RunResult]:
    from mbf.report import write_report
    from mbf.run.cell import Cell, cells_of, finished

    results = []
    keys = cells_of(run.config)
    for number, key in enumerate(keys, 1):
        result = bench.processes.on_main(partial(finished, key, run))
        if result is None:
            progress.cell_started(key.name, number, len(keys), bench.stream.orders[key.order])
            result = Cell(key, run, bench).run()
            progress.cell_finished(key.name)
        results.append(result)
    if bench.processes.main:
        write_report(results, run.report)
    return results


def note_versions(run: RunDirectory, progress: Progress) -> None:
    """Tell what is not of the version that the run was started with."""
    for name, now in versions().items():
        if (then := run.facts["versions"].get(name)) != now:
            progress.message(f"{name} was {then} when the run was started and is {now} now: bits may differ")


def check_same_data(run: RunDirectory, bench: Workbench) -> None:
    """Raise RunError where rows of a task, what scores them, or the model are not those that the run was started with.

    Runs of older versions tell of the rows alone.
    """
    facts = bench.facts()
    then, hashes = run.facts["data"], facts["data"]
    changed = [task for task in sorted(then.keys() | hashes.keys()) if then.get(task) != hashes.get(task)]
    if changed:
        raise RunError(
            f"{run.root}: the rows of {', '.join(changed)} are not those that the run was started with; "
            "put the data back to go on, or start a new run"
        )
    then, rules = run.facts.get("rules", {}), facts["rules"]
    changed = [what for what in sorted(then.keys() & rules.keys()) if then[what] != rules[what]]
    if changed:
        raise RunError(
            f"{run.root}: {', '.join(changed)} changed since the run was started, so its scores do not compare with "
            "new ones; put back what it was to go on, or start a new run"
        )
