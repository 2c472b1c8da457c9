"""``mbf run``, ``mbf resume`` and ``mbf report``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mbf.cli import values
from mbf.cli.console import out as console

Nproc = Annotated[
    int,
    typer.Option(
        "--nproc",
        min=1,
        metavar="N",
        help="Processes on this machine; they share every batch.",
    ),
]
Sharded = Annotated[
    bool,
    typer.Option("--sharded", help="Each of the processes keeps a part of the model (FSDP2), not all (DDP)."),
]


def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|STREAM",
            help="A configuration (YAML), a packaged stream (quickstart, real-5, real-14), or a folder or YAML file "
            "with tasks of your own.",
        ),
    ],
    method: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Methods to compare; see mbf methods.", show_default="slao")
    ] = None,
    order: Annotated[
        str | None, typer.Option(metavar="N,...", help="Task orders of the stream, from 1.", show_default="1")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N,...", help="Seeds.", show_default="0")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run.", show_default="runs/<stream>-<time>")
    ] = None,
    train_rows: Annotated[
        int | None, typer.Option(min=1, help="Training rows of each task.", show_default="the stream's")
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option(min=1, help="Test rows of each task.", show_default="the stream's")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs on each task.", show_default="1")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the configuration; repeat for more."),
    ] = None,
    on_bad_task: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(
            help="What to do about a task whose training diverges: skip leaves the LoRA as it is and goes on.",
            show_default="stop",
        ),
    ] = None,
    nproc: Nproc = 1,
    sharded: Sharded = False,
) -> None:
    """Learn a stream of tasks, one after another, with each method, order and seed; write the report.

    What is given here goes before what the configuration says. Under torchrun or accelerate launch, each process is
    one of the run's.
    """
    import mbf.run
    from mbf.run.directory import check_free

    given = {
        "methods": method and values.words("--method", method),
        "orders": order and values.numbers("--order", order),
        "seeds": seed and values.numbers("--seed", seed),
        "output": output and str(output),
        "train.rows": train_rows,
        "eval.rows": test_rows,
        "train.epochs": epochs,
        "on_bad_task": on_bad_task,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    config = mbf.run.load_config(source, chosen | values.settings("--set", settings or []))
    # Named here and not left to the run, so that an interruption can say how to go on.
    directory = config.output or _directory(config)
    if nproc > 1:
        check_free(directory)
        words = ["run", source, *(["--sharded"] if sharded else [])]
        for key, value in {**chosen, "output": str(directory)}.items():
            words += ["--set", f"{key}={json.dumps(value)}"]
        for setting in settings or []:
            words += ["--set", setting]
        _start(words, nproc, directory)
        return
    with watched(directory) as progress:
        results = mbf.run.run(config.model_copy(update={"output": directory}), progress, sharded=sharded)
    _show(results, directory)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that was stopped.")],
    on_bad_task: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(
            help="What to do, from here on, about a task whose training diverges.", show_default="as it was started"
        ),
    ] = None,
    nproc: Nproc = 1,
    sharded: Sharded = False,
) -> None:
    """Go on with a run from its last checkpoint; it ends as if it had never been stopped.

    The number of processes may be another than before.
    """
    import mbf.run
    from mbf.run.directory import RunDirectory

    if nproc > 1:
        RunDirectory.open(run)
        words = ["resume", str(run), *(["--on-bad-task", on_bad_task] if on_bad_task else [])]
        _start([*words, *(["--sharded"] if sharded else [])], nproc, run)
        return
    with watched(run) as progress:
        results = mbf.run.resume(run, progress, sharded=sharded, on_bad_task=on_bad_task)
    _show(results, run)


def report(
    run: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs, or their result.json files.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("report"),
) -> None:
    """Compare finished runs in one report."""
    from mbf.cli import results as tables
    from mbf.report import load_results, write_report

    results = load_results(run)
    page = write_report(results, out)
    tables.show(console(), results)
    console().print(f"report: {page}", markup=False, soft_wrap=True)


def _start(words: list[str], nproc: int, directory: Path) -> None:
    """The command again, in ``nproc`` processes, which report for themselves."""
    from mbf.run.launch import LaunchError, launch, member

    if member():
        raise ValueError(
            f"--nproc {nproc}: a launcher has started this process as one of several already (WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}); leave --nproc out"
        )
    try:
        status = launch(words, nproc)
    except (LaunchError, KeyboardInterrupt) as error:
        _note_resume(error, directory)
        raise
    if status:
        raise typer.Exit(status)


def _directory(config: Any) -> Path:
    """Where a run without --output goes; of several processes, each must take the main one's."""
    import mbf.run
    from mbf.run.launch import member

    if not member():
        return mbf.run.default_output(config)
    from mbf.run.processes import Processes

    return Processes().on_main(lambda: mbf.run.default_output(config))


@contextmanager
def watched(directory: Path, command: str | None = None, screen: Any = None) -> Iterator[Any]:
    """The progress of a run; whatever breaks it off is noted with the command that goes on, by default mbf resume."""
    from mbf.cli.progress import run_progress
    from mbf.run import ConfigError
    from mbf.run.directory import RunError
    from mbf.run.launch import main_process

    try:
        with run_progress(screen or console()) if main_process() else nullcontext() as progress:
            yield progress
    except (ConfigError, RunError):  # it never started
        raise
    except BaseException as error:
        _note_resume(error, directory, command)
        raise


def _note_resume(error: BaseException, directory: Path, command: str | None = None) -> None:
    from mbf.run.launch import main_process

    if (directory / "run.json").exists() and main_process():
        vars(error).setdefault("__notes__", []).append(f"go on with: {command or f'mbf resume {directory}'}")


def _show(results: Any, directory: Path) -> None:
    from mbf.cli import results as tables
    from mbf.run.launch import main_process

    if not main_process():
        return
    tables.show(console(), results)
    console().print(f"report: {directory / 'report' / 'report.html'}", markup=False, soft_wrap=True)
