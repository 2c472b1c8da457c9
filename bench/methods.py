"""Every method on ``real-5`` with a small model, in one table: accuracy, forgetting, memory, seconds.

The methods that the paper compares with, and its ablations, have three orders with two seeds (``methods/real-5.yaml``);
all others one cell, which shows a direction only. It takes hours and goes on where it stopped: ``python
bench/methods.py --budget 110`` is a piece of it, and the same command again the next. When nothing is left, the table,
its numbers and its picture go to ``bench/results/methods`` and into docs/methods.md; adapters and checkpoints stay in
``--out``.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mbf import methods
from mbf.cli import results as tables
from mbf.cli.console import out as console
from mbf.report import write_comparison, write_report
from mbf.run.cell import CellKey
from mbf.run.compare import compare
from mbf.run.config import RunConfig
from mbf.run.plan import Comparison, ask, survey

HERE = Path(__file__).parent
CONFIG = HERE / "methods" / "real-5.yaml"
RESULTS = HERE / "results" / "methods"
PAGE = HERE.parent / "docs" / "methods.md"
PICTURE = Path("images", "compare-real-5.png")  # beside the page
KEPT = ("compare.md", "compare.csv", "compare.png", "results.json")
BEGIN, END = "<!-- begin: bench/methods.py -->\n", "<!-- end: bench/methods.py -->"


def cells_of(config: Path, out: Path) -> tuple[RunConfig, list[CellKey]]:
    """Every method there is at order 1 with seed 0, then the cells that ``config`` names; some are both."""
    settings = {"output": str(out)}
    _, once = ask(config, {**settings, "methods": methods.available(), "orders": [1], "seeds": [0]})
    run, several = ask(config, settings)
    return run, [*once, *several]


def keep(found: Comparison, config: Path, results: Path) -> None:
    """Copy what is small to ``results``, with the configuration."""
    results.mkdir(parents=True, exist_ok=True)
    # Anew: a call that was killed has left the report of the one before it, or none.
    write_report(found.results, found.directory / "report")
    write_comparison(found.results, found.directory / "report", asked=found.asked(), failed=found.reasons())
    for name in KEPT:
        shutil.copyfile(found.directory / "report" / name, results / name)
    shutil.copyfile(config, results / "config.yaml")
    print(f"kept in {results}: {', '.join(KEPT)}, config.yaml")


def show(results: Path, page: Path) -> None:
    """Put the table between the marks of ``page``, and the picture beside it."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no lines {BEGIN.strip()!r} and {END!r}; the table goes between them")
    table = (results / "compare.md").read_text(encoding="utf-8")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    shutil.copyfile(results / "compare.png", page.parent / PICTURE)
    print(f"shown in {page}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no further cell after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="directory of the comparison")
    parser.add_argument("--keep", action="store_true", help="run nothing; copy the results so far")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="which shows the table and the picture")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mbf").setLevel(logging.INFO)
    config, cells = cells_of(args.config, args.out)
    found = survey(config, cells) if args.keep else compare(config, cells=cells, budget=args.budget)
    if found.results:
        tables.comparison(console(), found.results, found.asked())
    if found.results and (args.keep or not (found.left or found.failed)):
        keep(found, args.config, args.results)
        show(args.results, args.page)
    for cell, reason in found.failed.items():
        print(f"{cell} failed: {reason}")
    if found.left:
        print(f"{len(found.left)} of {len(found.cells)} cells are left; the same command goes on")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
