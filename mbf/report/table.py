"""The table of a comparison: one row a label, the same cells in the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbf.report import style
from mbf.report.result import RunResult
from mbf.report.summary import SummaryRow, summary_rows

CAPTION = (
    "AA, BWT and FWT in percent, mean ± sample standard deviation over the cells (orders × seeds) of a row; adapter is "
    "what is shipped, state what the method keeps beside it, measured after the last task; s/task is seconds of "
    "training, evaluation left out."
)


@dataclass(frozen=True)
class Table:
    """Texts; all columns but the first hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Compared:
    """One label and the number of cells asked for; ``row`` is None before any of them is finished."""

    label: str
    asked: int
    row: SummaryRow | None

    @property
    def done(self) -> int:
        return self.row.runs if self.row else 0

    @property
    def cells(self) -> str:
        """``3 × 2`` for all of three orders with two seeds, ``4 of 6`` while some are missing."""
        if self.row is None or self.done < self.asked:
            return f"{self.done} of {self.asked}"
        orders, seeds = len(self.row.orders), len(self.row.seeds)
        return f"{orders} × {seeds}" if orders * seeds == self.done else str(self.done)


def compared(results: Sequence[RunResult], asked: Mapping[str, int] | None = None) -> list[Compared]:
    """One entry a label, by falling AA; labels without a result come last.

    Args:
        results: of one stream.
        asked: cells by label; default those that there are.

    Raises:
        ResultError: see ``summary_rows``.
    """
    rows = summary_rows(results) if results else []
    asked = dict(asked or {})
    entries = [Compared(row.label, asked.pop(row.label, row.runs), row) for row in rows]
    return entries + [Compared(label, count, None) for label, count in asked.items()]


def table(entries: Sequence[Compared]) -> Table:
    """FWT only where some label has it."""
    with_fwt = any(entry.row and entry.row.fwt.n for entry in entries)
    fwt = ["FWT"] if with_fwt else []
    columns = ["method", "orders × seeds", "AA", "BWT", *fwt, "adapter", "state", "s/task"]
    return Table(columns, [_texts(entry, with_fwt) for entry in entries])


def _texts(entry: Compared, with_fwt: bool) -> list[str]:
    row = entry.row
    if row is None:
        return [entry.label, entry.cells, *[style.MISSING_TEXT] * (6 if with_fwt else 5)]
    stats = [_stat(row.aa, row), _stat(row.bwt, row, sign=True)]
    stats += [_stat(row.fwt, row, sign=True)] if with_fwt else []
    sizes = [style.size(row.adapter_bytes), style.size(row.state_bytes)]
    return [entry.label, entry.cells, *stats, *sizes, style.number(row.task_seconds.mean)]


def _stat(value: Any, row: SummaryRow, *, sign: bool = False) -> str:
    return style.stat(value, row.runs, sign=sign, digits=1)


def skipped(results: Iterable[RunResult]) -> list[str]:
    """A line for each task that a run did not learn, with the reason."""
    return [f"{run.cell}: {task}: {reason}" for run in results for task, reason in run.skipped.items()]


def to_markdown(shown: Table, failed: Mapping[str, str], left_out: Sequence[str] = ()) -> str:
    """A table of Markdown with its caption, the tasks that were skipped, and the cells that failed."""
    lines = [_line(shown.columns), _line(["---", *["---:"] * (len(shown.columns) - 1)])]
    lines += [_line([_code(label), *numbers]) for label, *numbers in shown.rows]
    lines += ["", CAPTION]
    lines += (
        ["", "Skipped tasks, which AA counts all the same:", "", *(f"- {_escaped(line)}" for line in left_out)]
        if left_out
        else []
    )
    of_cells = [f"- {_code(cell)}: {_escaped(reason)}" for cell, reason in failed.items()]
    lines += ["", "Failed:", "", *of_cells] if failed else []
    return "\n".join(lines) + "\n"


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _code(text: str) -> str:
    """``text`` in the typewriter's letters; in backticks nothing can be escaped."""
    escaped = _escaped(text)
    return f"`{text}`" if escaped == text else f"<code>{escaped}</code>"


def _escaped(text: str) -> str:
    """``text`` as Markdown that shows it in one line of a table or a list, whatever is in it."""
    escaped = html.escape(" ".join(text.splitlines()), quote=False)
    return re.sub(r"[`|\\*\[\]]", lambda found: f"&#{ord(found[0])};", escaped)


def flat(entries: Sequence[Compared]) -> list[dict[str, Any]]:
    """One value a column, exact, as ``compare.csv`` and ``--json`` have them."""
    known = next((list(entry.row.flat()) for entry in entries if entry.row), ["label"])
    return [
        {**(entry.row.flat() if entry.row else dict.fromkeys(known)), "label": entry.label}
        | {"cells_asked": entry.asked, "cells_done": entry.done}
        for entry in entries
    ]


def to_csv(entries: Sequence[Compared]) -> str:
    rows = flat(entries)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
