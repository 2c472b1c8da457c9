"""``mbf run``, ``mbf resume`` and ``mbf report``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mbf.cli import values
from mbf.cli.console import out as console


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
) -> None:
    """Learn a stream of tasks, one after another, with each method, order and seed; write the report.

    What is given here goes before what the configuration says.
    """
    import mbf.run

    given = {
        "methods": method and values.words("--method", method),
        "orders": order and values.numbers("--order", order),
        "seeds": seed and values.numbers("--seed", seed),
        "output": output and str(output),
        "train.rows": train_rows,
        "eval.rows": test_rows,
        "train.epochs": epochs,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    config = mbf.run.load_config(source, chosen | values.settings("--set", settings or []))
    # Named here and not left to the run, so that an interruption can say how to go on.
    directory = config.output or mbf.run.default_output(config)
    with _watched(directory) as progress:
        results = mbf.run.run(config.model_copy(update={"output": directory}), progress)
    _show(results, directory)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that was stopped.")],
) -> None:
    """Go on with a run from its last checkpoint; it ends as if it had never been stopped."""
    import mbf.run

    with _watched(run) as progress:
        results = mbf.run.resume(run, progress)
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


@contextmanager
def _watched(directory: Path) -> Iterator[Any]:
    """The progress of a run; whatever breaks it off is noted with how to go on."""
    from mbf.cli.progress import run_progress
    from mbf.run import ConfigError
    from mbf.run.directory import RunError

    try:
        with run_progress(console()) as progress:
            yield progress
    except (ConfigError, RunError):  # it never started
        raise
    except BaseException as error:
        if (directory / "run.json").exists():
            vars(error).setdefault("__notes__", []).append(f"go on with: mbf resume {directory}")
        raise


def _show(results: Any, directory: Path) -> None:
    from mbf.cli import results as tables

    tables.show(console(), results)
    console().print(f"report: {directory / 'report' / 'report.html'}", markup=False, soft_wrap=True)
