"""Draw what soak.py measured: memory, seconds a task and the distance from the closed form, over the number of tasks.

Run: ``python bench/soak_plot.py bench/results/soak_{loop,run,merge}.csv`` for docs/images/soak.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import read_csv
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plot import FAINT, GRID, INK

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "soak.png"
COLOUR, SECOND = "#0072B2", "#D55E00"
TITLES = {
    "loop": "a learner in a plain loop",
    "run": "mbf run, one process",
    "merge": "merging adapters alone",
}
TOLERANCE = 1e-5


class Panel(NamedTuple):
    """A row of the picture: column of the CSV, and what its axis says."""

    column: str
    label: str


PANELS = (
    Panel("resident", "the process's memory,\nmapped files aside, MiB"),
    Panel("state", "adapter and state,\nKiB"),
    Panel("seconds", "seconds"),
    Panel("error", "off the closed form,\nof the norm of B"),
)


def picture(files: Sequence[tuple[str, dict[str, str], list[dict[str, str]]]]) -> Figure:
    """A column for each (kind, header, rows), a row for each panel."""
    figure = Figure(figsize=(3.6 * len(files) + 0.6, 8.2), dpi=150, facecolor="white", layout="constrained")
    grid = figure.subplots(len(PANELS), len(files), squeeze=False, sharex="col")
    for column, (kind, _, rows) in enumerate(files):
        for axes, panel in zip(grid[:, column], PANELS, strict=True):
            fill(axes, panel, rows)
            if column == 0:
                axes.set_ylabel(panel.label, fontsize=8.5, color=INK)
        grid[0, column].set_title(TITLES[kind], fontsize=10, color=INK, loc="left")
        grid[-1, column].set_xlabel("adapters merged" if kind == "merge" else "tasks learnt", fontsize=8.5, color=INK)
    header = files[0][1]
    figure.supxlabel(f"{header['cpu']}, torch {header['torch']}, mbf {header['mbf']}", fontsize=7, color=FAINT)
    return figure


def fill(axes: Axes, panel: Panel, rows: Sequence[dict[str, str]]) -> None:
    tasks = [int(row["task"]) for row in rows]
    values = [float(row[panel.column]) / (1024 if panel.column == "state" else 1) for row in rows]
    axes.plot(tasks, values, color=COLOUR, linewidth=1.2, marker="." if len(tasks) < 60 else None, label="all")
    boundary = [float(row["boundary"]) for row in rows]
    if panel.column == "seconds" and any(boundary):
        axes.plot(tasks, boundary, color=SECOND, linewidth=1.2, label="of it begin, end and save")
        axes.legend(frameon=False, fontsize=7.5, loc="upper right")
    if panel.column == "error":
        axes.set_yscale("log")
        axes.axhline(TOLERANCE, color=SECOND, linewidth=1, linestyle="--")
        axes.annotate("bound", (tasks[0], TOLERANCE), (0, 3), textcoords="offset points", fontsize=7.5, color=SECOND)
        axes.set_ylim(1e-9, 1e-4)
    else:
        axes.set_ylim(0, 1.25 * max(values))
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv", nargs="+", help="of soak.py, one a kind")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    files = []
    for source in args.csv:
        header, rows = read_csv(source)
        files.append((header["command"].split()[2], header, rows))
    FigureCanvasAgg(picture(files)).print_png(str(args.out))
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
