"""The pictures of a report, as matplotlib figures on the Agg canvas, without pyplot's global state.

Each function returns a figure of its own; ``to_png`` writes it. Scores are in percent.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mbf.continual.metrics import ScoreMatrix
from mbf.report.result import RunResult
from mbf.report.style import HEAT_STOPS, MISSING, MISSING_TEXT, OUTLINE, Look, heat, number, shorten, size, size_unit
from mbf.report.summary import Stat, SummaryRow

_INK, _FAINT, _GRID = "#1c232b", "#6b7280", "#e3e5e8"
_HEAT = LinearSegmentedColormap.from_list("scores", HEAT_STOPS)
_BANDS_UP_TO = 4  # labels; more bands than this hide the lines

ByLabel = Mapping[str, Sequence[RunResult]]


def to_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": "mbf"})
    return out.getvalue()


def heat_map(result: RunResult) -> Figure:
    """The score matrix of one run: row task, column after which task; the outlined cells are the tasks just learned."""
    matrix, count = result.matrix, len(result.order_tasks)
    with_zero = any(score is not None for score in matrix.zero_shot)
    columns = [[zero, *row] if with_zero else row for zero, row in zip(matrix.zero_shot, matrix.scores, strict=True)]
    offset = int(with_zero)
    names = [_plain(shorten(name, 22)) + " (skipped)" * (name in matrix.skipped) for name in matrix.tasks]
    # Laid out by hand: a report can have a hundred of these, and automatic layout takes longer than drawing.
    left, right, top, bottom = 0.6 + 0.075 * max(len(name) for name in names), 0.95, 0.66, 0.72
    wide, high = max(0.58 * (count + offset), 2.6), 0.42 * count
    width, height = left + wide + right, top + high + bottom
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    values = [[math.nan if score is None else score for score in row] for row in columns]
    scale = _HEAT.with_extremes(bad=MISSING)
    image = axes.pcolormesh(values, cmap=scale, vmin=0, vmax=100, edgecolors="white", linewidth=1.2)
    axes.set_facecolor(MISSING)
    axes.invert_yaxis()
    for i, row in enumerate(columns):
        for t, score in enumerate(row):
            text = MISSING_TEXT if score is None else number(score)
            axes.text(t + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, color=heat(score)[1])
        if not matrix.joint and i in matrix.learned:
            axes.add_patch(_outline(i + offset, i))
    axes.set_yticks([i + 0.5 for i in range(count)], [f"{name}  {n}" for n, name in enumerate(names, 1)], fontsize=8.5)
    named = count <= 5 and all(len(name) <= 9 for name in names)  # the rows say the names in any case
    heads = [f"{n}\n{name}" if named else str(n) for n, name in enumerate(names, 1)]
    axes.set_xticks([t + 0.5 for t in range(count + offset)], ["zero-\nshot"] * offset + heads, fontsize=8.5)
    axes.set_xlabel("after learning task", fontsize=9, color=_FAINT)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    beside = figure.add_axes(((left + wide + 0.14) / width, bottom / height, 0.14 / width, high / height))
    bar = figure.colorbar(image, cax=beside)
    bar.set_label("score, %", fontsize=8.5, color=_FAINT)
    bar.ax.tick_params(labelsize=8, length=0, colors=_FAINT)
    beside.spines[:].set_visible(False)
    measures = f"AA {number(matrix.aa)}   BWT {number(matrix.bwt, sign=True)}"
    title = f"{shorten(result.label, 40)} · {shorten(result.stream, 24)} order {result.order} · seed {result.seed}"
    text = f"{_plain(title)}\n{measures}"
    figure.text(0.12 / width, 1 - 0.1 / height, text, va="top", fontsize=9.5, color=_INK, linespacing=1.5)
    return figure


def accuracy_over_time(runs: ByLabel, look: Mapping[str, Look]) -> Figure:
    """One panel for the average of the tasks so far and one a task, on one order of tasks; lines are means over seeds.

    Left of a panel's dotted line the task is not learned yet; 0 is zero-shot. Methods that learn all tasks at once are
    a level line.
    """
    tasks = next(iter(runs.values()))[0].order_tasks
    panels = len(tasks) + 1
    columns = panels if panels <= 4 else min(4, math.ceil(math.sqrt(panels)))
    rows = math.ceil(panels / columns)
    figure = _figure(max(3.1 * columns, 6.4), 2.05 * rows + 0.75)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    _draw_lines(grid[0], {label: _average_so_far(of) for label, of in runs.items()}, look)
    _panel_title(grid[0], "average of tasks so far", bold=True)
    for i, name in enumerate(tasks):
        axes = grid[i + 1]
        learned = any(name not in run.matrix.skipped for of in runs.values() for run in of)
        axes.axvspan(-0.4, i + 1 if learned else len(tasks) + 0.4, color="#f5f5f3", zorder=0, linewidth=0)
        if learned:
            axes.axvline(i + 1, color=_FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        _draw_lines(axes, {label: _task_scores(of, i) for label, of in runs.items()}, look)
        _panel_title(axes, f"{i + 1} · {_plain(shorten(name, 26))}" + ("" if learned else " · skipped"))
    for n, axes in enumerate(grid):
        axes.set_visible(n < panels)
        axes.set_xlim(-0.4, len(tasks) + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(len(tasks) + 1, 8)))
        if n + columns >= panels:
            axes.set_xlabel("tasks learned", fontsize=8.5, color=_FAINT)
        if n % columns == 0:
            axes.set_ylabel("score, %", fontsize=8.5, color=_FAINT)
    low, high = grid[0].get_ylim()
    grid[0].set_ylim(max(-2.0, 10 * math.floor(low / 10)), min(102.0, 10 * math.ceil(high / 10)))
    _legend(figure, list(runs), look)
    return figure


def method_comparison(rows: Sequence[SummaryRow], look: Mapping[str, Look], runs: ByLabel) -> Figure:
    """AA and BWT of every label: bar the mean, whisker the standard deviation, dots the single runs."""
    figure = _figure(9.6, 1.15 + 0.42 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    single = [[run.matrix for run in runs[row.label]] for row in rows]
    _bars(left, [row.aa for row in rows], [[matrix.aa for matrix in of] for of in single], rows, look)
    _bars(right, [row.bwt for row in rows], [[matrix.bwt for matrix in of] for of in single], rows, look, sign=True)
    left.set_yticks(range(len(rows)), [_plain(shorten(row.label, 34)) for row in rows], fontsize=9.5, color=_INK)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(0, max(left.get_xlim()[1], 1.0))
    _panel_title(left, "AA: average accuracy, %")
    _panel_title(right, "BWT: backward transfer, points (0: nothing forgotten)")
    return figure


def memory_over_tasks(runs: ByLabel, look: Mapping[str, Look]) -> Figure:
    """Measured bytes of the shipped adapter and what the method keeps beside it, against tasks learned."""
    totals = {label: points for label, of in runs.items() if (points := _memory(of))}
    figure = _figure(9.6, 3.2)
    axes = figure.add_subplot()
    factor, unit = size_unit(max((y for points in totals.values() for y in points.values()), default=0))
    ends: dict[float, list[str]] = {}
    for label, points in totals.items():
        one = look[label]
        xs, ys = list(points), [y / factor for y in points.values()]
        axes.plot(xs, ys, color=one.colour, marker=one.marker, linestyle=one.dash, markersize=5, linewidth=1.8)
        ends.setdefault(ys[-1], []).append(label)
    tasks = max(len(run.order_tasks) for of in runs.values() for run in of)
    _style(axes)
    axes.set_xlim(0.7, tasks + 0.3)
    axes.set_ylim(0, max(axes.get_ylim()[1], max(ends, default=1) * 1.12))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(tasks, 16)))
    axes.set_xlabel("tasks learned", fontsize=9, color=_FAINT)
    axes.set_ylabel(f"adapter + state, {unit}", fontsize=9, color=_FAINT)
    _end_labels(axes, ends, factor)
    return figure


# -- the parts --------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign starts no formula."""
    return text.replace("$", r"\$")


def _outline(t: float, i: float) -> Rectangle:
    return Rectangle((t + 0.04, i + 0.05), 0.92, 0.9, fill=False, edgecolor=OUTLINE, linewidth=1.6)


def _panel_title(axes: Axes, text: str, *, bold: bool = False) -> None:
    axes.set_title(text, fontsize=9, color=_INK, loc="left", fontweight="bold" if bold else "normal")


def _style(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0, colors=_FAINT)
    axes.spines[:].set_visible(False)


def _draw_lines(axes: Axes, lines: Mapping[str, Mapping[int, Stat]], look: Mapping[str, Look]) -> None:
    _style(axes)
    for label, points in lines.items():
        one = look[label]
        if one.joint:
            level = list(points.values())[-1].mean
            if level is not None:
                axes.axhline(level, color=one.colour, linestyle=one.dash, linewidth=1.3, zorder=1.5)
            continue
        means = [math.nan if stat.mean is None else stat.mean for stat in points.values()]
        size = 3.6 if len(points) <= 8 else 2.4
        axes.plot(list(points), means, color=one.colour, marker=one.marker, linestyle=one.dash, ms=size, lw=1.5)
        if len(lines) <= _BANDS_UP_TO:
            low = [math.nan if s.mean is None else s.mean - (s.sd or 0) for s in points.values()]
            high = [math.nan if s.mean is None else s.mean + (s.sd or 0) for s in points.values()]
            axes.fill_between(list(points), low, high, color=one.colour, alpha=0.15, linewidth=0)


def _average_so_far(runs: Sequence[RunResult]) -> dict[int, Stat]:
    matrices = [run.matrix for run in runs]
    return {t: Stat.of(m.average_accuracy_after(t) for m in matrices) for t in range(1, len(matrices[0].tasks) + 1)}


def _task_scores(runs: Sequence[RunResult], i: int) -> dict[int, Stat]:
    def score(matrix: ScoreMatrix, t: int) -> float | None:
        return matrix.scores[i][t - 1] if t else matrix.zero_shot[i]

    matrices = [run.matrix for run in runs]
    return {t: Stat.of(score(m, t) for m in matrices) for t in range(len(matrices[0].tasks) + 1)}


def _memory(runs: Sequence[RunResult]) -> dict[int, float]:
    """The largest measured total after each number of tasks; what learned all at once is measured at the end only."""
    totals: dict[int, float] = {}
    for run in runs:
        for t, memory in enumerate(run.memory, len(run.order_tasks) if run.matrix.joint else 1):
            totals[t] = max(totals.get(t, 0), memory.adapter_bytes + memory.state_bytes)
    return totals


def _bars(
    axes: Axes,
    stats: Sequence[Stat],
    single: Sequence[Sequence[float | None]],
    rows: Sequence[SummaryRow],
    look: Mapping[str, Look],
    *,
    sign: bool = False,
) -> None:
    _style(axes)
    axes.grid(False, axis="y")
    axes.axvline(0, color=_FAINT, linewidth=0.8)
    for y, (stat, values, row) in enumerate(zip(stats, single, rows, strict=True)):
        if stat.mean is None:
            axes.text(0, y, "  not defined", va="center", fontsize=8.5, color=_FAINT)
            continue
        colour = look[row.label].colour
        axes.barh(y, stat.mean, height=0.62, color=colour, linewidth=0)
        known = [value for value in values if value is not None]
        if stat.sd is not None:
            axes.errorbar(stat.mean, y, xerr=stat.sd, color=_INK, linewidth=1.1, capsize=3)
            axes.plot(known, [y + 0.2] * len(known), "o", ms=3, mfc="white", mec=_INK, mew=0.6)
        spread = stat.sd or 0
        end = max([stat.mean + spread, *known]) if stat.mean >= 0 else min([stat.mean - spread, *known])
        align = "left" if stat.mean >= 0 else "right"
        text = f" {number(stat.mean, sign=sign)} "
        axes.text(end, y, text, va="center", ha=align, fontsize=8.5, color=_INK)
    axes.margins(x=0.14)


def _end_labels(axes: Axes, ends: Mapping[float, list[str]], factor: int) -> None:
    """Name the lines at their right ends, labels of one height together, and push apart what would overlap."""
    gap = axes.get_ylim()[1] * 0.075
    place = -math.inf
    for height in sorted(ends):
        place = max(height, place + gap)
        names = shorten(", ".join(shorten(label, 26) for label in ends[height]), 60)
        axes.annotate(
            f"{_plain(names)}  {size(height * factor)}",
            xy=(1, height),
            xytext=(1.015, place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            fontsize=8.5,
            color=_INK,
            va="center",
            arrowprops={"arrowstyle": "-", "color": _GRID, "linewidth": 0.8} if place > height else None,
            annotation_clip=False,
        )


def _legend(figure: Figure, labels: Sequence[str], look: Mapping[str, Look]) -> None:
    handles = []
    for label in labels:
        one = look[label]
        handle = Line2D([], [], color=one.colour, linestyle=one.dash, linewidth=1.8, label=_plain(shorten(label, 30)))
        if not one.joint:
            handle.set(marker=one.marker, markersize=5)
        handles.append(handle)
    columns = min(len(handles), 5)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=_INK)
