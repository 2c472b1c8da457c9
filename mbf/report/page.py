"""The HTML page of a report: what it shows, gathered from results and pictures and handed to ``report.html.j2``."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from mbf.continual.metrics import FORMULAS
from mbf.report import style
from mbf.report.result import RunResult
from mbf.report.summary import SummaryRow

_HERE = Path(__file__).parent
_OPEN_MATRICES = 6  # runs; the matrices of more are folded by order


@dataclass(frozen=True)
class Picture:
    """A picture of the page, with the text that stands in for it."""

    name: str
    png: bytes
    alt: str

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class StreamPart:
    """What the page shows of one stream; ``accuracy`` is by order number."""

    name: str
    rows: Sequence[SummaryRow]
    runs: Mapping[str, Sequence[RunResult]]
    methods: Picture
    memory: Picture | None
    accuracy: Mapping[int, Picture]

    @property
    def results(self) -> list[RunResult]:
        """The runs by order, then by falling AA of their label, then by seed."""
        rank = {row.label: n for n, row in enumerate(self.rows)}
        return sorted(
            (run for of in self.runs.values() for run in of), key=lambda run: (run.order, rank[run.label], run.seed)
        )

    @property
    def orders(self) -> dict[int, tuple[str, ...]]:
        return {run.order: run.order_tasks for run in self.results}

    @property
    def disparity(self) -> list[SummaryRow]:
        """The rows whose methods were run on several orders of the same tasks."""
        return [row for row in self.rows if row.disparity is not None and row.disparity.orders > 1]


def render(parts: Sequence[StreamPart], results: Sequence[RunResult], slugs: Mapping[str, str]) -> str:
    """The whole page as one string without outside resources.

    Args:
        parts: one a stream.
        results: all runs.
        slugs: file-name part of each run by its ``cell``.
    """
    return _template().render(
        css=(_HERE / "report.css").read_text(encoding="utf-8"),
        parts=parts,
        results=results,
        slugs=slugs,
        looks={part.name: style.looks(part.rows) for part in parts},
        heat=style.heat,
        formulas=FORMULAS,
        notes=notes(results),
        fold=len(results) > _OPEN_MATRICES,
        facts={
            "Versions": _facts({run.cell: run.versions for run in results}),
            "Configuration": _facts({run.cell: run.config for run in results}),
            "Method options": _facts({run.cell: run.method_options for run in results}),
        },
        hashes=_hashes(results),
        commands=_commands(results),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": style.number,
        "stat": style.stat,
        "size": style.size,
        "duration": style.duration,
    }
    return environment.get_template("report.html.j2")


_OF_A_CELL = ("methods", "orders", "seeds", "output", "on_bad_task")  # settings that runs of one comparison differ in


def notes(results: Iterable[RunResult]) -> list[str]:
    """What a reader must know before comparing the runs."""
    found: list[str] = []
    results = list(results)
    for run in results:
        for task, reason in run.skipped.items():
            found.append(
                f"{run.cell}: {task} was skipped and not learned: {reason.removesuffix('.')}. AA counts its score all "
                "the same; BWT and forgetting leave it out."
            )
        missing = [name for name, score in run.matrix.final.items() if score is None]
        if missing:
            found.append(f"{run.cell}: no final score on {', '.join(missing)}, so AA is not defined.")
    for stream, tasks in _hashes(results).items():
        found += [
            f"{stream}: the data of {task} is not the same in all runs; scores on it do not compare."
            for task, hashes in tasks.items()
            if len(hashes) > 1
        ]
    differ = sorted(_facts({run.cell: run.versions for run in results})["differing"])
    if differ:
        found.append(f"The runs used different versions of {', '.join(differ)}; see Versions.")
    configs = _facts({run.cell: run.config for run in results})["differing"]
    if differ := sorted(key for key in configs if key.partition(".")[0] not in _OF_A_CELL):
        found.append(
            f"The runs differ in {', '.join(differ)}, and a row may be a mean over runs that do; see Configuration."
        )
    return found


def _facts(by_run: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What all runs share as name → value, and what differs as name → value → the runs that have it."""
    flat = {run: dict(_flatten(values)) for run, values in by_run.items()}
    names = list(dict.fromkeys(name for values in flat.values() for name in values))
    shared: dict[str, Any] = {}
    differing: dict[str, Any] = {}
    for name in names:
        by_value: dict[str, list[str]] = {}
        for run, values in flat.items():
            by_value.setdefault(values.get(name, "not set"), []).append(run)
        if len(by_value) == 1:
            shared[name] = next(iter(by_value))
        else:
            differing[name] = by_value
    return {"shared": shared, "differing": differing}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield (
                f"{prefix}{name}",
                value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False),
            )


def _hashes(results: Iterable[RunResult]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """stream → task → hash → the runs that saw it."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for run in results:
        for task, digest in run.data_hashes.items():
            found.setdefault(run.stream, {}).setdefault(task, {}).setdefault(digest, []).append(run.cell)
    return found


def _commands(results: Iterable[RunResult]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in results:
        if run.command is not None:
            found.setdefault(run.command, []).append(run.cell)
    return found


def methods_alt(rows: Sequence[SummaryRow]) -> str:
    return "Bars of average accuracy and backward transfer. " + " ".join(
        f"{row.label}: AA {style.stat(row.aa, row.runs)}, BWT {style.stat(row.bwt, row.runs, sign=True)}."
        for row in rows
    )


def accuracy_alt(order: int, runs: Mapping[str, Sequence[RunResult]]) -> str:
    tasks = next(iter(runs.values()))[0].order_tasks
    return (
        f"Score on each task after each task learned, order {order}: {', '.join(tasks)}; methods {', '.join(runs)}. "
        "The numbers are in the score matrices."
    )


def memory_alt(rows: Sequence[SummaryRow]) -> str:
    return "Measured bytes against tasks learned. After the last task: " + " ".join(
        f"{row.label}: adapter {style.size(row.adapter_bytes)}, state {style.size(row.state_bytes)}."
        for row in rows
        if row.adapter_bytes is not None
    )
