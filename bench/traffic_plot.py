"""Draw what traffic.py counted: bytes per activation element beside the base product.

Run: ``python bench/traffic_plot.py bench/results/traffic.csv`` for docs/images/traffic.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import read_csv
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from plot import FAINT, GRID, INK, LOOKS

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "traffic.png"
PARTS = ("forward", "backward")
LAYERS = {
    "4096x4096": "q, o",
    "4096x1024": "k, v",
    "4096x14336": "gate, up",
    "14336x4096": "down",
    "4096x4096+1024+1024": "q + k + v",
    "4096x14336+14336": "gate + up",
}  # of Llama-3-8B
BARS = {
    "peft": (LOOKS["peft"][0], "PEFT (A, B fp32)"),
    "peft-nocast": (LOOKS["peft-nocast"][0], "PEFT, no cast (A, B bf16)"),
    "mbf": (LOOKS["mbf"][0], "mbf"),
    "ideal": ("#b4bac2", "ideal (computed)"),
}
BAR, SPACE, TOP, BOTTOM, LEFT, RIGHT, BETWEEN, WIDTH = 0.15, 0.22, 1.12, 0.6, 1.75, 0.45, 0.55, 10.0  # inches


def picture(rows: Sequence[Mapping[str, str]], caption: str) -> Figure:
    """Bars of bytes per element: a column for each part, a group of bars for each case with A and B in bf16."""
    shown = [row for row in rows if row["variant"] in BARS and (row["variant"] != "mbf" or row["factors"] == "bf16")]
    cases = list(dict.fromkeys(label(row) for row in shown))
    group = BAR * len(BARS) + SPACE
    height = TOP + group * len(cases) + BOTTOM
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    each = (WIDTH - LEFT - RIGHT - BETWEEN) / 2
    most = max(float(row["per_element"]) for row in shown) * 1.1
    for column, part in enumerate(PARTS):
        left = LEFT + column * (each + BETWEEN)
        axes = figure.add_axes((left / WIDTH, BOTTOM / height, each / WIDTH, group * len(cases) / height))
        fill(axes, [row for row in shown if row["part"] == part], cases, most, named=column == 0)
        head = (left + each / 2) / WIDTH, 1 - (TOP - 0.1) / height
        figure.text(*head, part, fontsize=9.5, ha="center", color=INK)
    figure.text(
        (LEFT + WIDTH - RIGHT) / 2 / WIDTH,
        0.16 / height,
        "bytes per activation element beside the base product, counted (less is better)",
        fontsize=8.5,
        ha="center",
        color=FAINT,
    )
    figure.legend(
        handles=[Patch(color=colour, label=name) for colour, name in BARS.values()],
        loc="upper left",
        bbox_to_anchor=(0.05 / WIDTH, 1 - 0.05 / height),
        ncols=len(BARS),
        frameon=False,
        fontsize=9.5,
        handlelength=1.0,
        columnspacing=1.6,
        borderaxespad=0.3,
    )
    figure.text(0.15 / WIDTH, 1 - 0.6 / height, caption, fontsize=7.5, color=FAINT, va="center")
    return figure


def label(row: Mapping[str, str]) -> str:
    name, shape = LAYERS.get(row["shape"], ""), row["shape"].replace("x", "×")
    return f"{name}\n{shape}\nr {row['rank']}  p {float(row['p']):g}  T {row['tokens']}".lstrip()


def fill(axes: Axes, rows: Sequence[Mapping[str, str]], cases: Sequence[str], most: float, named: bool) -> None:
    group = BAR * len(BARS) + SPACE
    axes.set_xlim(0, most)
    axes.set_ylim(group * len(cases), 0)
    for row in rows:
        n = list(BARS).index(row["variant"])
        y, value = group * cases.index(label(row)) + SPACE / 2 + BAR * (n + 0.5), float(row["per_element"])
        colour = BARS[row["variant"]][0]
        axes.barh(y, value, BAR * 0.86, color=colour, zorder=2)
        ink = colour if row["variant"] == "mbf" else FAINT
        axes.text(value + most * 0.01, y, f"{value:.1f}", fontsize=7, va="center", color=ink)
    axes.grid(axis="x", color=GRID, linewidth=0.7, zorder=0)
    axes.set_yticks([group * (n + 0.5) for n in range(len(cases))], cases if named else [""] * len(cases))
    axes.tick_params(length=0, colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)


def draw_csv(source: str, out: Path) -> None:
    header, rows = read_csv(source)
    keys = ("mbf", "peft", "torch", "commit")
    facts = " · ".join(f"{key} {header[key]}" for key in keys if key in header)
    FigureCanvasAgg(picture(rows, f"layers of Llama-3-8B, x bf16 · {facts}")).print_png(
        out, metadata={"Software": "mbf"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv", help="what traffic.py wrote")
    parser.add_argument("--out", type=Path, default=OUT, help="default: docs/images/traffic.png")
    args = parser.parse_args(argv)
    draw_csv(args.csv, args.out)


if __name__ == "__main__":
    main()
