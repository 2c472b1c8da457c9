"""``mbf bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mbf.cli.console import err
from mbf.cli.console import out as console
from mbf.cli.errors import FAILURE
from mbf.cli.show import STYLE

if TYPE_CHECKING:
    from mbf.run.bench import Row


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DINxDOUT",
            help="Shape of the layer; repeat for more.",
            show_default="576x576, 576x1536 (SmolLM2-135M), 2048x2048 (Llama-3.2-1B)",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Rank of A and B.", show_default="8 for 576x576, else 16")
    ] = None,
    p: Annotated[
        list[float] | None,
        typer.Option("--p", metavar="P", help="Dropout probability; repeat for more.", show_default="0, 0.1"),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Rows of x.")] = 512,
    dtype: Annotated[
        str, typer.Option(metavar="fp32|bf16|fp16", help="Of W and x; A and B are fp32, as PEFT makes them.")
    ] = "fp32",
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Samples of each variant at most; a slow row has fewer, but three.")
    ] = 10,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of torch.", show_default="torch's")] = None,
) -> None:
    """Time one LoRA layer on this CPU: the frozen layer alone, PEFT's, and PEFT's fused by mbf.

    Medians of forward and backward together. A row is timed only if it is right, else the exit code is 1.
    """
    from mbf.run import bench

    report = bench.bench(
        shapes=shape or (),
        ps=p or (),
        rank=rank,
        tokens=tokens,
        dtype=dtype,
        rounds=rounds,
        threads=threads,
        started=lambda case: err(f"timing {case}"),
    )
    screen = console()
    for name, fact in report.facts.items():
        screen.print(Text(f"{name}: {fact}"), soft_wrap=True)
    screen.print(_table(report.rows))
    screen.print(Text("over frozen: 1 is the frozen layer alone; vs PEFT: above 1 is faster", style="dim"))
    for row in report.rows:
        for problem in row.problems:
            err(f"mbf: {row.case}: not timed: {problem}")
    if not report.correct:
        raise typer.Exit(FAILURE)


def _table(rows: tuple[Row, ...]) -> Table:
    table = Table(**STYLE)
    table.add_column("layer", no_wrap=True)
    for column in ("frozen ms", "PEFT ms", "over frozen", "mbf ms", "over frozen", "vs PEFT", "rounds"):
        table.add_column(column, justify="right")
    for row in rows:
        name = Text(str(row.case))
        if row.problems:
            table.add_row(name, Text("wrong", style="bold red"))
            continue
        ms = {variant: _digits(time) for variant, time in row.milliseconds.items()}
        over = {variant: f"{row.over_frozen(variant):.2f}" for variant in ("peft", "mbf")}
        against = Text(f"{row.against_peft():.2f}", style="bold")
        table.add_row(name, ms["frozen"], ms["peft"], over["peft"], ms["mbf"], over["mbf"], against, str(row.rounds))
    return table


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
