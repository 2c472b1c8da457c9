"""Accuracy against memory: the picture of a comparison, one point a label with its name beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from mbf.report.figures import _FAINT, _INK, _plain, _style
from mbf.report.style import Look, shorten, size_unit
from mbf.report.summary import SummaryRow

_FLOOR = 1024  # bytes; a logarithm needs something above zero
_RINGS = 14  # how far from its point a name may go, in heights of a line


class Point(NamedTuple):
    """A label: bytes of adapter and state, mean and standard deviation of AA (0 for one run)."""

    bytes: float
    mean: float
    sd: float


def accuracy_against_memory(
    rows: Sequence[SummaryRow], look: Mapping[str, Look], zero_shot: float | None = None
) -> Figure | None:
    """AA against the bytes of adapter and state after the last task, on a logarithmic axis; whiskers are the standard
    deviation over the cells of a label. None where no label has both.

    Args:
        zero_shot: mean score of the model before any task, a dotted line where it is not far below all points.
    """
    points = {
        row.label: Point(max(float(row.adapter_bytes + (row.state_bytes or 0)), _FLOOR), row.aa.mean, row.aa.sd or 0.0)
        for row in rows
        if row.aa.mean is not None and row.adapter_bytes is not None
    }
    if not points:
        return None
    # Laid out by hand: names are placed by pixels, which automatic layout would move afterwards.
    figure = Figure(figsize=(9.6, max(4.8, 2.6 + 0.16 * len(points))), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.12, 0.905, 0.83))
    _style(axes)
    for label, point in points.items():
        one = look[label]
        axes.errorbar(
            point.bytes,
            point.mean,
            yerr=point.sd or None,
            fmt=one.marker,
            color=one.colour,
            markersize=9 if one.joint else 6.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.0,
            capsize=2.5,
        )
    low, high = _limits(axes, points, zero_shot)
    if zero_shot is not None and low < zero_shot < high:
        axes.axhline(zero_shot, color=_FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axes.text(0.995, zero_shot, "zero-shot", fontsize=8, color=_FAINT, **where)
    axes.set_xlabel("adapter + state after the last task", fontsize=9, color=_FAINT)
    axes.set_ylabel("AA: average accuracy, %", fontsize=9, color=_FAINT)
    _name(axes, canvas, points)
    return figure


def _limits(axes: Axes, points: Mapping[str, Point], zero_shot: float | None) -> tuple[float, float]:
    """Set both axes; the lower and upper end of AA."""
    counts = [point.bytes for point in points.values()]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(counts) / 1.6, max(counts) * 2.6)  # names mostly stand on the right
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _whole_size(count)))
    low = min(point.mean - point.sd for point in points.values())
    high = max(point.mean + point.sd for point in points.values())
    if zero_shot is not None and low - zero_shot <= max(high - low, 10.0):
        low, high = min(low, zero_shot), max(high, zero_shot)
    margin = max(0.08 * (high - low), 1.0)
    axes.set_ylim(low - margin, high + margin)
    return low - margin, high + margin


def _whole_size(count: float) -> str:
    factor, unit = size_unit(round(count))
    return f"{count / factor:.0f} {unit}"


# -- names -------------------------------------------------------------------------------------------------------------


def _name(axes: Axes, canvas: FigureCanvasAgg, points: Mapping[str, Point]) -> None:
    """Each name goes to the nearest free place around its point; with a line to it where that is not beside it."""
    renderer = canvas.get_renderer()
    at = {label: axes.transData.transform((point.bytes, point.mean)) for label, point in points.items()}
    marker = 3.5 * canvas.figure.dpi / 72
    taken = [Bbox.from_extents(x - marker, y - marker, x + marker, y + marker) for x, y in at.values()]
    inside = axes.get_window_extent(renderer)
    to_data = axes.transData.inverted()
    for label in sorted(at, key=lambda label: -at[label][1]):
        x, y = at[label]
        text = axes.text(0, 0, _plain(shorten(label, 30)), fontsize=8, color=_INK, va="center", ha="left")
        extent = text.get_window_extent(renderer)
        place, box, beside = _free_place(x, y, extent.width, extent.height, marker, taken, inside)
        taken.append(box)
        text.set_position(tuple(to_data.transform(place)))
        if not beside:
            near = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
            (x0, y0), (x1, y1) = to_data.transform([(x, y), near])
            axes.plot([x0, x1], [y0, y1], color=_FAINT, linewidth=0.6, zorder=1.2)


def _free_place(
    x: float, y: float, width: float, height: float, marker: float, taken: Sequence[Bbox], inside: Bbox
) -> tuple[tuple[float, float], Bbox, bool]:
    """Left end and middle of a text, its box, and whether it stands beside its point."""
    first = None
    for left, middle, beside in _places(x, y, width, height, marker):
        box = Bbox.from_extents(left, middle - height / 2, left + width, middle + height / 2)
        first = first or ((left, middle), box, beside)
        within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if within and not any(box.overlaps(other) for other in taken):
            return (left, middle), box, beside
    assert first is not None
    return first  # more names than places: they overlap


def _places(x: float, y: float, width: float, height: float, marker: float) -> Iterator[tuple[float, float, bool]]:
    gap = marker + 2
    yield x + gap, y, True
    yield x - gap - width, y, True
    for ring in range(1, _RINGS):
        rise = ring * 1.05 * height
        aside = gap + 0.6 * rise
        for sign in (1, -1):
            yield x + aside, y + sign * rise, False
            yield x - width / 2, y + sign * (rise + marker), ring == 1
            yield x - aside - width, y + sign * rise, False
