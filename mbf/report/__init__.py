"""Reports of continual runs: one page, its pictures, and the numbers behind them.

A run writes a ``RunResult`` as ``result.json``; ``load_results`` reads any number of them and ``write_report`` shows
them side by side. Needs the ``run`` extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mbf.report.result import RESULT_FILE, ResultError, RunResult, TaskMemory, load_results
from mbf.report.summary import Stat, SummaryRow, summary_rows

if TYPE_CHECKING:
    from mbf.report.comparison import write_comparison
    from mbf.report.writer import write_report

__all__ = [
    "RESULT_FILE",
    "ResultError",
    "RunResult",
    "Stat",
    "SummaryRow",
    "TaskMemory",
    "load_results",
    "summary_rows",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Late, because matplotlib takes longer to import than most commands take to run.
    if name == "write_report":
        from mbf.report.writer import write_report

        return write_report
    if name == "write_comparison":
        from mbf.report.comparison import write_comparison

        return write_comparison
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
