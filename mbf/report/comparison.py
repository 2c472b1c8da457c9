"""A comparison on disk, beside the usual report: its table as CSV and Markdown, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mbf.continual.atomic import whole_files
from mbf.report import figures, scatter, style, table
from mbf.report.result import RunResult
from mbf.report.summary import Stat

PICTURE = "compare.png"
TABLE = "compare.md"


def write_comparison(
    results: Sequence[RunResult],
    out_dir: str | Path,
    *,
    asked: Mapping[str, int] | None = None,
    failed: Mapping[str, str] | None = None,
) -> Path:
    """Write ``compare.csv`` (one row a label, exact), ``compare.md`` (the table to read) and ``compare.png`` (accuracy
    against memory, where memory was measured).

    Args:
        results: of one stream; at least one.
        out_dir: made if it does not exist; files of the same names are replaced once all are written, the table last.
        asked: cells by label, where more were asked for than there are results.
        failed: reasons by cell.

    Returns:
        The path of ``compare.md``.

    Raises:
        ResultError: before anything is written; see ``mbf.report.summary.prepare``.
        OSError: they cannot be written, and an older comparison is whole.
    """
    entries = table.compared(results, asked)
    rows = [entry.row for entry in entries if entry.row is not None]
    figure = scatter.accuracy_against_memory(rows, style.looks(rows), _zero_shot(results))
    with whole_files(out_dir, TABLE) as out:
        (out / "compare.csv").write_text(table.to_csv(entries), encoding="utf-8", newline="")
        (out / TABLE).write_text(
            table.to_markdown(table.table(entries), failed or {}, table.skipped(results)), encoding="utf-8"
        )
        if figure is not None:
            (out / PICTURE).write_bytes(figures.to_png(figure))
    return Path(out_dir, TABLE)


def _zero_shot(results: Sequence[RunResult]) -> float | None:
    """Mean over tasks and runs; None unless every task was scored before any was learned."""
    scores = [score for run in results for score in run.matrix.zero_shot]
    return None if None in scores else Stat.of(scores).mean
