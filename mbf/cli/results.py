"""The results of a run as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mbf.cli.show import STYLE
from mbf.continual.metrics import FORMULAS
from mbf.report import RunResult, SummaryRow, summary_rows
from mbf.report.table import CAPTION, compared, skipped, table


def show(console: Console, runs: Sequence[RunResult]) -> None:
    """The matrix of each run, the measures of each method, and the formulas of the measures shown."""
    for run in runs:
        _print(console, f"{run.cell}: score in % on each task (row) after learning task … (column)", matrix(run))
    _print_skipped(console, runs)
    rows = summary_rows(runs)
    several_orders = any(row.disparity and row.disparity.orders > 1 for row in rows)
    _print(console, "measures in %, mean ± standard deviation over orders and seeds", measures(rows, several_orders))
    for name in ["AA", "BWT", "FWT", "Forgetting", *(["OPD", "MOPD", "AOPD"] if several_orders else [])]:
        console.print(Text(f"{name}: {FORMULAS[name]}", style="dim"), soft_wrap=True)


def comparison(console: Console, results: Sequence[RunResult], asked: Mapping[str, int]) -> None:
    """One row a label, and what its numbers are."""
    shown = table(compared(results, asked))
    grid = _table(*shown.columns)
    for label, *numbers in shown.rows:
        grid.add_row(Text(label, style="bold"), *numbers)
    _print(console, "comparison", grid)
    console.print(Text(CAPTION, style="dim"), soft_wrap=True)
    _print_skipped(console, results)


def matrix(run: RunResult) -> Table:
    """Rows: tasks in learning order; columns: after learning each of them; what was just learned in bold."""
    names = run.matrix.tasks
    columns = [f"{t} {name}" if len(names) <= 6 else str(t) for t, name in enumerate(names, 1)]
    table = _table("task", "zero-shot", *columns)
    for i, (name, zero, row) in enumerate(zip(names, run.matrix.zero_shot, run.matrix.scores, strict=True), 1):
        learned = name not in run.matrix.skipped
        cells = [Text(_percent(a), style="bold" if t == i and learned else "") for t, a in enumerate(row, 1)]
        table.add_row(Text(f"{i} {name}" + ("" if learned else ", skipped")), _percent(zero), *cells)
    return table


def measures(rows: Iterable[SummaryRow], several_orders: bool) -> Table:
    """One row a method of a stream."""
    disparities = ["MOPD", "AOPD"] if several_orders else []
    table = _table("method", "stream", "AA", "BWT", "FWT", "Forgetting", *disparities, "runs")
    for row in rows:
        stats = [
            _percent(stat.mean) + ("" if stat.sd is None else f" ± {stat.sd:.1f}")
            for stat in (row.aa, row.bwt, row.fwt, row.forgetting)
        ]
        of_orders = (row.disparity.mopd, row.disparity.aopd) if row.disparity else (None, None)
        spread = [_percent(value) for value in of_orders] if several_orders else []
        table.add_row(Text(row.label), Text(row.stream), *stats, *spread, str(row.runs))
    return table


def _print_skipped(console: Console, runs: Sequence[RunResult]) -> None:
    for line in skipped(runs):
        console.print(Text(f"skipped: {line}"), soft_wrap=True)


def _table(key: str, *columns: str) -> Table:
    table = Table(**STYLE)
    table.add_column(key, no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def _print(console: Console, title: str, table: Table) -> None:
    """A table wider than the terminal is left to the terminal to wrap: nothing is cut."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    whole = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    terminal, console.width = console.width, max(whole, console.width)
    console.print(table)
    console.width = terminal


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
