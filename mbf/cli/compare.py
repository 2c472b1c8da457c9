"""``mbf compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mbf.cli import values
from mbf.cli.console import err
from mbf.cli.console import out as console
from mbf.cli.runs import watched
from mbf.cli.show import STYLE

if TYPE_CHECKING:
    from mbf.run.plan import Comparison


def compare(
    stream: Annotated[
        str | None,
        typer.Argument(
            metavar="STREAM",
            help="A packaged stream (quickstart, real-5, real-14), a folder or YAML file with tasks of your own, or a "
            "configuration. May be left out where --config or a comparison in --out has it.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Methods; with options under a label of their own as 'label={name: slao, start: last_merge}'.",
        ),
    ] = None,
    orders: Annotated[
        str | None, typer.Option(metavar="N,...", help="Task orders of the stream, from 1.", show_default="1")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,...", help="Seeds.", show_default="0")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the configuration; repeat for more."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A configuration (YAML), as mbf run takes it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the comparison.", show_default="runs/<stream>-compare")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="MINUTES", min=0, help="Begin no further cell after so many minutes.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show how far every cell is; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Run many methods side by side, a cell a method, order and seed; one table and one picture of them all.

    What is finished is not run again. A second call may add methods, orders or seeds to the directory; all else must be
    as it is there, and need not be said again. A cell that fails leaves the others running, and is run again by the
    next call. Killed or out of budget, the same command goes on.
    """
    from mbf.run.compare import compare as run_comparison
    from mbf.run.compare import go_on
    from mbf.run.plan import ask, survey

    if config is not None and config.suffix not in (".yaml", ".yml"):
        raise typer.BadParameter(f"found {str(config)!r}, wanted a YAML file", param_hint="--config")
    given = {
        "stream": stream if config else None,
        "methods": methods and values.methods("--methods", methods),
        "orders": orders and values.numbers("--orders", orders),
        "seeds": seeds and values.numbers("--seeds", seeds),
        "output": out and str(out),
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    asked, cells = ask(config or stream, chosen | values.settings("--set", settings or []))
    if listing:
        _list(survey(asked, cells), as_json)
        return
    directory = asked.output
    assert directory is not None
    command = go_on(directory, budget)
    # The bars would stand between the braces.
    with watched(directory, command, Console(stderr=True) if as_json else console()) as progress:
        found = run_comparison(asked, progress, cells=cells, budget=budget)
    _show(found, as_json)
    if found.left:
        still = f"{len(found.left)} of {len(found.cells)} cells are left; go on with: {command}"
        err(still) if as_json else console().print(still, markup=False, soft_wrap=True)
    for cell, reason in found.failed.items():
        err(f"mbf: {cell} failed: {reason}")
    if found.failed:
        err(f"mbf: {_cells(len(found.failed))} failed; run again with: {command}")
        raise typer.Exit(1)


def _show(found: Comparison, as_json: bool) -> None:
    from mbf.cli import results as tables
    from mbf.report.table import compared, flat

    report = found.directory / "report" / "report.html"
    if as_json:
        data = {
            "directory": str(found.directory),
            "rows": flat(compared(found.results, found.asked())),
            "failed": found.reasons(),
            "left": found.left,
            "report": str(report) if found.results else None,
        }
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    if found.results:
        tables.comparison(console(), found.results, found.asked())
        console().print(f"report: {report}", markup=False, soft_wrap=True)


def _list(found: Comparison, as_json: bool) -> None:
    cells: list[dict[str, Any]] = [
        {
            "cell": one.key.name,
            "label": one.key.method.label,
            "method": one.key.method.name,
            "options": one.key.method.options,
            "order": one.key.order,
            "seed": one.key.seed,
            "state": one.state,
            "detail": one.detail,
        }
        for one in found.cells
    ]
    if as_json:
        print(json.dumps({"directory": str(found.directory), "cells": cells}, indent=2, ensure_ascii=False))
        return
    grid = Table(**STYLE)
    grid.add_column("cell", overflow="fold")
    grid.add_column("state", no_wrap=True)
    grid.add_column("", overflow="fold")
    for cell in cells:
        grid.add_row(Text(cell["cell"]), cell["state"], Text(cell["detail"]))
    console().print(grid)
    done = sum(cell["state"] == "finished" for cell in cells)
    console().print(f"{done} of {_cells(len(cells))} finished in {found.directory}", markup=False, soft_wrap=True)


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
