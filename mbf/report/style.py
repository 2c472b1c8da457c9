"""What pictures and page share: colours, and numbers as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mbf.report.summary import Stat, SummaryRow

# Okabe and Ito's palette, which stays apart under every common colour blindness; its yellow is too pale for lines on
# white and gives way to a brown, its black to the axes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4B1E", "#4B3F9E")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
Dash: TypeAlias = Literal["-"] | tuple[float, tuple[float, ...]]
_DASHES: tuple[Dash, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
_JOINT_COLOUR = "#6B7280"

# ColorBrewer's "Blues": one hue whose lightness falls evenly, so it also reads in print and in grey.
HEAT_STOPS = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
MISSING = "#f1f1ef"
MISSING_TEXT = "–"
OUTLINE = "#E69F00"  # stands out on every step of the scale


@dataclass(frozen=True)
class Look:
    """How one label is drawn in every picture of a report."""

    colour: str
    marker: str
    dash: Dash
    joint: bool = False


def looks(rows: Iterable[SummaryRow]) -> dict[str, Look]:
    """A look for each label. The method at the centre is the first; what learns all tasks at once is grey."""
    ordered = sorted(rows, key=lambda row: (row.method != "slao", row.label))
    found: dict[str, Look] = {}
    for n, label in enumerate(row.label for row in ordered if not row.joint):
        marker = _MARKERS[n % len(_MARKERS)]
        found[label] = Look(_COLOURS[n % len(_COLOURS)], marker, _DASHES[n // len(_COLOURS) % len(_DASHES)])
    for n, label in enumerate(row.label for row in ordered if row.joint):
        found[label] = Look(_JOINT_COLOUR, "*", _DASHES[1 + n % 3], joint=True)
    return found


def heat(score: float | None) -> tuple[str, str]:
    """Background and text colour of a score from 0 to 100, by the heat map's scale."""
    if score is None:
        return MISSING, "#8a8a86"
    place = score / 100 * (len(HEAT_STOPS) - 1)
    low = min(int(place), len(HEAT_STOPS) - 2)
    start, stop = (_rgb(HEAT_STOPS[n]) for n in (low, low + 1))
    rgb = [round(a + (b - a) * (place - low)) for a, b in zip(start, stop, strict=True)]
    # WCAG's relative luminance; at 0.18 black and white text contrast equally.
    red, green, blue = ((c / 255) ** 2.2 for c in rgb)
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#ffffff" if dark else "#10151c"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Fixed decimals with a real minus; never a negative zero."""
    if value is None:
        return MISSING_TEXT
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def stat(value: Stat, runs: int, *, sign: bool = False, digits: int = 2) -> str:
    """Mean ± sd, and how many runs have the value where not all do."""
    text = number(value.mean, digits, sign=sign)
    if value.sd is not None:
        text += f" ± {value.sd:.{digits}f}"
    return text + (f" ({value.n} of {runs})" if 0 < value.n < runs else "")


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return MISSING_TEXT
    factor, unit = size_unit(count)
    return f"{count / factor:.2f} {unit}" if factor > 1 else f"{count:.0f} {unit}"


def size_unit(count: float) -> tuple[int, str]:
    """The largest unit that leaves at least one whole, as (bytes in it, its name)."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return 1024**power, unit
    return 1, "B"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units."""
    if seconds is None:
        return MISSING_TEXT
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
