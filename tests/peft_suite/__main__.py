"""``python -m tests.peft_suite``: PEFT's own tests on mbf's fused layer, beside stock PEFT."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbf.streams.fetch import FetchError
from tests.peft_suite.run import Result, SuiteError, compare
from tests.peft_suite.sdist import packages, peft_tests
from tests.peft_suite.selections import SELECTIONS

COLUMNS = ("passed", "failed", "stock fails too", "skipped", "xfailed", "hub", "fast", "slow")
console = Console(width=None if os.environ.get("COLUMNS") or os.isatty(1) else 140)


def main(
    peft_version: Annotated[str, typer.Option(help="Version of PEFT; default the installed one.")] = "",
    cache: Annotated[Path | None, typer.Option(help="Default $MBF_CACHE or ~/.cache/mbf.")] = None,
    keyword: Annotated[
        str, typer.Option("-k", help="Of the selected tests only those that match, as pytest's -k.")
    ] = "",
    workers: Annotated[int, typer.Option("-n", min=0, help="Processes.")] = min(os.cpu_count() or 1, 8),
) -> None:
    """Run PEFT's own tests with mbf's FusedLinear in place of lora.Linear; what fails is run again with stock PEFT.

    Exit status 1: a test fails that stock PEFT passes, or no call took the fast path.
    """
    version = peft_version or metadata.version("peft")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    try:
        with bar:
            tasks = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what)
                bar.update(tasks[what], completed=done, total=total or None)

            folder = peft_tests(version, cache=cache, progress=progress)
            beside = packages(version, cache=cache)
            result = compare(folder, SELECTIONS, packages=beside, keyword=keyword, workers=workers, progress=progress)
    except (FetchError, SuiteError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None
    report(version, result)
    if (verdict := result.verdict()) is not None:
        console.print(f"FAILED: {verdict}", style="red", markup=False)
        raise typer.Exit(1)


def report(version: str, result: Result) -> None:
    """The table, and the names of the tests that failed."""
    table = Table("tests", title=f"PEFT {version}'s own tests with lora.Linear computed by mbf")
    for column in COLUMNS:
        table.add_column("need the hub" if column == "hub" else column, justify="right")
    total = result.counts("")
    for selection in SELECTIONS:
        counts = result.counts(selection.name)
        table.add_row(selection.name, *(f"{counts[column]:,}" if counts else "–" for column in COLUMNS))
        total += counts
    table.add_section()
    table.add_row("all", *(f"{total[column]:,}" for column in COLUMNS))
    console.print(table)
    for title, names in (("stock PEFT fails too", sorted(result.stock_fails)), ("fails with mbf only", result.broken)):
        for name in names:
            console.print(
                f"{title}: {name}: {result.tests[name].reason.partition(chr(10))[0]}", markup=False, soft_wrap=True
            )


if __name__ == "__main__":
    typer.run(main)
