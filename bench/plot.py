"""The picture of the README: time over the frozen layer and over the frozen model's step, by variant.

Run: ``python bench/plot.py bench/results/{lora_linear,llama_step,llama_step_30}.csv``, on what ``lora_linear.py`` and
``llama_step.py`` wrote with ``--csv``. Every row of the files is drawn, those that mbf loses included; a point is a
ratio of medians (forward and backward together), a line around it the quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common import read_csv
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "lora_linear.png"
INK, FAINT, GRID, BAND = "#1c232b", "#6b7280", "#e3e5e8", "#f5f6f7"
LOOKS = {
    "peft": ("#D55E00", "s", "PEFT"),
    "peft-nocast": ("#E69F00", "D", "PEFT, no cast"),
    "peft-compiled": ("#CC79A7", "v", "PEFT, compiled"),
    "in-place": ("#7d8590", "^", "in-place torch"),
    "mbf": ("#0072B2", "o", "mbf"),
    "mbf-fp32": ("#009E73", "X", "mbf in fp32"),
    "mbf-low": ("#56B4E9", "P", "mbf, low memory"),
}
TICKS = (0.5, 0.75, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30)
ROW, TOP, GAP, BOTTOM, LEFT, RIGHT, BETWEEN, WIDTH = 0.34, 1.16, 0.5, 0.62, 2.6, 0.55, 0.7, 10.0  # inches


class Point(NamedTuple):
    """Time over the frozen one: first quartile, median, third quartile."""

    panel: str
    label: str
    p: float
    variant: str
    low: float
    middle: float
    high: float


def points(panel: str, rows: Iterable[dict[str, str]]) -> list[Point]:
    """The rows of one CSV, each over the median of its own frozen variant."""
    kept = [row for row in rows if row.get("part", "both") == "both"]
    unit = "us" if kept and "median_us" in kept[0] else "ms"
    label = layer_label if unit == "us" else step_label
    frozen = {(label(row), row["p"]): float(row[f"median_{unit}"]) for row in kept if row["variant"] == "frozen"}
    found = []
    for row in kept:
        if row["variant"] != "frozen":
            floor = frozen[label(row), row["p"]]
            ratios = [float(row[f"{name}_{unit}"]) / floor for name in ("q1", "median", "q3")]
            found.append(Point(panel, label(row), float(row["p"]), row["variant"], *ratios))
    return found


def layer_label(row: dict[str, str]) -> str:
    dtype = "" if row["dtype"] == "fp32" else f"  {row['dtype']}"
    return f"{row['shape'].replace('x', '×')}  r {row['rank']}  T {row['tokens']}{dtype}"


def step_label(row: dict[str, str]) -> str:
    dtype = "" if row["dtype"] == "fp32" else f"  {row['dtype']}"
    tokens = row["tokens"].replace("x", "×")
    return f"{row['layers']} layers  vocab {row['vocab']}  {tokens} tokens{dtype}"


def draw(found: Sequence[Point], caption: str) -> Figure:
    """One column, of one scale, for each dropout probability; layers above, steps below."""
    panels, ps = list(dict.fromkeys(point.panel for point in found)), sorted({point.p for point in found})
    labels = {panel: list(dict.fromkeys(point.label for point in found if point.panel == panel)) for panel in panels}
    rows = sum(map(len, labels.values()))
    height = TOP + ROW * rows + GAP * (len(panels) - 1) + BOTTOM
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    each = (WIDTH - LEFT - RIGHT - BETWEEN * (len(ps) - 1)) / len(ps)
    for column, p in enumerate(ps):
        left, top = LEFT + column * (each + BETWEEN), TOP
        mine = [point for point in found if point.p == p]
        limits = min(1.0, *(point.low for point in mine)) / 1.02, max(point.high for point in mine) * 1.04
        for panel in panels:
            deep = ROW * len(labels[panel])
            axes = figure.add_axes((left / WIDTH, 1 - (top + deep) / height, each / WIDTH, deep / height))
            here = [point for point in mine if point.panel == panel]
            fill(axes, here, labels[panel], limits, named=column == 0, ticks=panel == panels[-1])
            if column == 0:
                figure.text(0.15 / WIDTH, 1 - (top - 0.1) / height, panel, fontsize=9, color=INK, weight="bold")
            top += deep + GAP
        head = "no dropout" if p == 0 else f"dropout {p:g}"
        y = 1 - (TOP - 0.1) / height
        figure.text((left + each / 2) / WIDTH, y, head, fontsize=9.5, ha="center", color=INK)
        figure.text((left + each + 0.08) / WIDTH, y, "mbf", fontsize=8.5, color=LOOKS["mbf"][0])
    figure.text(
        (LEFT + WIDTH - RIGHT) / 2 / WIDTH,
        0.18 / height,
        "time over the frozen layer or model, forward and backward (1 = the adapter is free; less is faster)",
        fontsize=8.5,
        ha="center",
        color=FAINT,
    )
    legend(figure, found, height)
    figure.text(0.15 / WIDTH, 1 - 0.6 / height, caption, fontsize=7.5, color=FAINT, va="center")
    return figure


def fill(
    axes: Axes, found: Sequence[Point], labels: Sequence[str], limits: tuple[float, float], named: bool, ticks: bool
) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    for n in range(0, len(labels), 2):
        axes.axhspan(n - 0.5, n + 0.5, color=BAND, zorder=0)
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    for point in found:
        colour, marker, _ = LOOKS[point.variant]
        y, front = labels.index(point.label), 4 if point.variant == "mbf" else 3
        axes.plot([point.low, point.high], [y, y], color=colour, linewidth=1.6, alpha=0.45, zorder=2)
        if point.variant == "mbf":
            text = f"  {point.middle:.2f}×"
            axes.text(1, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=colour)
        axes.plot(point.middle, y, marker, color=colour, markersize=6, markeredgecolor="white", mew=0.6, zorder=front)
    axes.xaxis.set_major_locator(FixedLocator(spread(limits)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=1)
    axes.set_yticks(range(len(labels)), labels if named else [""] * len(labels), fontsize=8)
    axes.tick_params(length=0, colors=INK, labelsize=8, labelbottom=ticks)
    axes.spines[:].set_visible(False)


def spread(limits: tuple[float, float]) -> list[float]:
    """1 and, to both sides of it, the ticks within the limits that are far enough apart for their labels."""
    low, high = limits
    apart = (high / low) ** 0.11
    chosen = [1.0]
    for tick in (t for t in TICKS if 1 < t <= high):
        if tick / chosen[-1] > apart:
            chosen.append(tick)
    for tick in (t for t in reversed(TICKS) if low <= t < 1):
        if chosen[0] / tick > apart:
            chosen.insert(0, tick)
    return chosen


def legend(figure: Figure, found: Sequence[Point], height: float) -> None:
    present = [name for name in LOOKS if any(point.variant == name for point in found)]
    handles = [
        Line2D([], [], color=LOOKS[name][0], marker=LOOKS[name][1], linestyle="", markersize=6.5, label=LOOKS[name][2])
        for name in present
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.05 / WIDTH, 1 - 0.05 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        handletextpad=0.1,
        columnspacing=1.6,
        borderaxespad=0.3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found: list[Point] = []
    caption = ""
    for source in args.csv:
        header, rows = read_csv(source)
        found += points("one layer, d_in×d_out" if "shape" in rows[0] else "training step, Llama", rows)
        keys = ("cpu", "kernels", "threads", "torch", "peft", "mbf", "commit")
        caption = " · ".join(f"{key} {header[key]}" if key != "cpu" else header[key] for key in keys if key in header)
    FigureCanvasAgg(draw(found, caption)).print_png(args.out, metadata={"Software": "mbf"})


if __name__ == "__main__":
    main()
