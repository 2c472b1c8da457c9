"""The JSON of a run's directory: what its readers accept has the fields and types they promise, what they refuse is
one error that names the file. Of a result that is accepted the report is written, but for its pictures.

The first byte says which reader; the rest is as in ``_json.document``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mbf.report import RunResult, page, summary_rows, table
from mbf.report.result import parse_result
from mbf.report.summary import prepare
from mbf.report.writer import slugs_of, texts
from mbf.run.checkpoint import Manifest
from mbf.run.config import RunConfig
from mbf.run.directory import check_facts
from mbf.run.ledger import Ledger, check_scores
from mbf.run.plan import check_failure, check_plan
from tests.fuzz.targets._json import document

ROOT = Path("/run")

GOOD: dict[str, Any] = {
    "run.json": {
        "format": 1,
        "config": RunConfig.from_stream("s", methods=["slao"]).plain(),
        "sha256": "0" * 64,
        "versions": {"torch": "2.13.0", "mbf": None},
        "data": {"a": "0" * 64},
        "command": "mbf run s",
    },
    "progress.json": {
        "tasks": ["a", "b"],
        "learned": [
            {"name": "a", "seconds": 1.0, "tokens": 5, "adapter_bytes": 8, "state_bytes": 8, "scores": {"a": 50.0}}
        ],
    },
    "result.json": {
        "schema_version": 1,
        "method": "slao",
        "label": "slao",
        "stream": "s",
        "order": 1,
        "order_tasks": ["a", "b"],
        "seed": 0,
        "matrix": {"tasks": ["a", "b"], "scores": [[50.0, None], [None, 60.0]], "zero_shot": [1.0, None]},
        "memory": [{"adapter_bytes": 8, "state_bytes": 8}],
        "train_seconds": [1.0],
        "train_tokens": [5],
        "method_options": {"basis": "qr"},
        "versions": {"torch": "2.13.0", "mbf": None},
        "data_hashes": {"a": "0" * 64},
        "config": {"model": "m", "train": {"lr": 0.1, "targets": ["q"]}},
        "command": "mbf run s",
    },
    "compare.json": {"format": 1, "cells": [{"method": {"name": "slao", "label": "x"}, "order": 1, "seed": 0}]},
    "manifest.json": {"step": 2, "seconds": 1.5, "sha256": {"optimizer.pt": "0" * 64}},
    "zero_shot.json": {"a": 10.0},
    "failed.json": {"reason": "no", "command": "mbf compare", "traceback": ["x"]},
}


def _manifest(data: Any, path: Path) -> None:
    found = Manifest.parse(data)
    assert found is None or (found.step >= 0 and found.seconds >= 0)


def _ledger(data: Any, path: Path) -> None:
    found = Ledger.parse(data, path)
    assert len(found.learned) <= len(found.tasks)


def _result(data: Any, path: Path) -> None:
    render(parse_result(data, path))


def render(result: RunResult) -> None:
    """All text of the report and of the comparison's table."""
    results = prepare([result])
    rows, (run,) = summary_rows(results), results
    runs = {run.label: results}
    methods, memory, accuracy = (
        page.Picture("x.png", b"", alt)
        for alt in (page.methods_alt(rows), page.memory_alt(rows), page.accuracy_alt(run.order, runs))
    )
    part = page.StreamPart(run.stream, rows, runs, methods, memory if run.memory else None, {run.order: accuracy})
    entries, skipped = table.compared(results), table.skipped(results)
    markdown = table.to_markdown(table.table(entries), {run.cell: "x"}, skipped)
    assert len(markdown.splitlines()) == 9 + (3 + len(skipped) if skipped else 0)
    written = [*texts(results, rows, [part], slugs_of(results)).values(), table.to_csv(entries), markdown]
    assert all(text.encode() for text in written)


def _plan(data: Any, path: Path) -> None:
    assert all("/" not in key.name and not key.name.startswith(".") for key in check_plan(data, path))


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "run.json": check_facts,
    "progress.json": _ledger,
    "result.json": _result,
    "compare.json": _plan,
    "manifest.json": _manifest,
    "zero_shot.json": check_scores,
    "failed.json": check_failure,
}


def seeds() -> list[bytes]:
    return [
        bytes([number]) + first + rest
        for number, name in enumerate(READERS)
        for first, rest in ((b"\x00", json.dumps(GOOD[name]).encode()), (b"\x80", b""), (b"\x80", b"abcdef"))
    ]


def one(data: bytes) -> None:
    if len(data) < 2:
        return
    name = list(READERS)[data[0] % len(READERS)]
    try:
        parsed = document(data[1:], GOOD[name])
    except (ValueError, RecursionError):
        return
    try:
        READERS[name](parsed, ROOT / name)
    except ValueError as error:
        assert str(ROOT) in str(error)
