"""Run directories with broken files: one error that names the file and the way out, and nothing is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mbf.cli.app import app
from mbf.continual import ScoreMatrix
from mbf.report import RunResult, load_results
from mbf.run.checkpoint import Manifest
from mbf.run.config import RunConfig
from mbf.run.directory import RunDirectory, RunError, read_json, write_json
from mbf.run.ledger import Ledger, check_scores
from mbf.run.plan import FAILED, check_failure, check_plan, planned_cells, survey

CONFIG = RunConfig.from_stream("s", methods=["slao"])
FACTS = {"versions": {"torch": "2.13.0", "mbf": None}, "data": {"a": "0" * 64}, "command": "mbf run s"}
CELL = "cells/slao-order1-seed0"
WAY = "restore it from a copy, or remove it and let what it told be computed anew"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run whose one cell is finished."""
    run = RunDirectory.create(tmp_path / "r", CONFIG, FACTS)
    cell = run.cell("slao-order1-seed0")
    write_json(cell.progress, {"tasks": ["a"], "learned": [learned()]})
    write_json(cell.result, result().model_dump(mode="json"))
    write_json(run.root / "compare.json", {"format": 1, "cells": [{"method": {"name": "slao"}, "order": 1, "seed": 0}]})
    return tmp_path / "r"


def result() -> RunResult:
    matrix = ScoreMatrix(tasks=("a",), scores=[[50.0]], zero_shot=[10.0])
    return RunResult(method="slao", label="slao", stream="s", order=1, order_tasks=("a",), seed=0, matrix=matrix)


def learned() -> dict[str, Any]:
    return {"name": "a", "seconds": 1.0, "tokens": 5, "adapter_bytes": 8, "state_bytes": 8, "scores": {"a": 50.0}}


def files(root: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")}


def show(root: Path) -> None:
    survey(CONFIG.model_copy(update={"output": root}))


READERS: dict[str, Callable[[Path], Any]] = {
    "run.json": RunDirectory.open,
    "compare.json": show,
    f"{CELL}/result.json": show,
    f"{CELL}/progress.json": lambda root: Ledger.read(root / CELL / "progress.json", ("a",), joint=False),
    f"{CELL}/{FAILED}": lambda root: check_failure(read_json(root / CELL / FAILED), root / CELL / FAILED),
    "zero_shot.json": lambda root: check_scores(read_json(root / "zero_shot.json"), root / "zero_shot.json"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "broken JSON"),
        (b"null", "broken JSON \\(null\\)"),
        (b'{"a": 1', "broken JSON"),
        (b"\xff\xfe{", "broken JSON"),
        (b"[" * 100_000, "JSON nested without end"),
        (b"9" * 5_000, "broken JSON"),
        (None, "a directory"),
    ],
)
def test_no_json(root: Path, name: str, text: bytes | None, found: str) -> None:
    path = root / name
    path.unlink(missing_ok=True)
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    before = files(root)
    with pytest.raises(RunError, match=rf"{re.escape(str(path))}: found {found}.*, wanted what mbf wrote there; .* it"):
        READERS[name](root)
    assert files(root) == before


def edited(*path: Any, value: Any) -> Callable[[Any], Any]:
    def edit(data: Any) -> Any:
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return data

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "run.json",
            lambda data: 3,
            "found Input should be a valid dictionary.*; restore it from a copy, or start a new",
        ),
        ("run.json", edited("format", value=2), "run.json has format 2, this mbf reads 1; use that mbf"),
        (
            "run.json",
            edited("config", value=...),
            "found config: Field required; restore it from a copy, or start a new",
        ),
        (
            "run.json",
            edited("config", value=[]),
            "found config: Input should be a valid dictionary, found \\[\\]; restore",
        ),
        ("run.json", edited("data", value={"a": 1}), "found data.a: Input should be a valid string, found 1; restore"),
        (
            "run.json",
            edited("command", value=None),
            "found command: Input should be a valid string, found None; restore",
        ),
        ("run.json", edited("versions", "torch", value=2), "found versions.torch: .* found 2; restore"),
        (
            "compare.json",
            lambda data: [],
            "found Input should be .*, wanted the cells asked for; restore it from a copy, or",
        ),
        ("compare.json", edited("format", value=9), "compare.json has format 9, this mbf reads 1; use that mbf"),
        ("compare.json", edited("cells", value=...), "found cells: Field required, wanted the cells asked for"),
        (
            "compare.json",
            edited("cells", 0, "order", value="x"),
            "found cells.0.order: Input should be a valid integer",
        ),
        (
            "compare.json",
            edited("cells", 0, "method", "label", value="../up"),
            r"cells.0.method.*'\.\./up', wanted letters",
        ),
        ("compare.json", edited("cells", 0, "method", "haste", value=1), "cells.0.method: .*haste"),
        (
            f"{CELL}/result.json",
            lambda data: [],
            "is not a result of a run: .*; restore it from a copy, give the folder of a run or, .* remove it and",
        ),
        (f"{CELL}/result.json", edited("\ud800", value=1), "is not a result of a run: .*"),
        (
            f"{CELL}/result.json",
            edited("schema_version", value=7),
            "has schema_version 7, this mbf reads 1; update mbf",
        ),
        (
            f"{CELL}/result.json",
            edited("matrix", value={}),
            "is not a result of a run: matrix.*; restore it from a copy",
        ),
        (
            f"{CELL}/result.json",
            edited("order_tasks", value=["b"]),
            "order_tasks is b, but the matrix is of a; restore it",
        ),
        (f"{CELL}/progress.json", lambda data: "x", f"found Input should be .*, wanted what mbf wrote there; {WAY}"),
        (
            f"{CELL}/progress.json",
            edited("tasks", value=["b"]),
            f"found a score on a, which is none of the tasks; {WAY}",
        ),
        (f"{CELL}/progress.json", edited("tasks", value=["a", "b"]), f"found the tasks a, b, wanted a; {WAY}"),
        (f"{CELL}/progress.json", edited("tasks", value=[]), f"found 1 tasks learned of 0; {WAY}"),
        (
            f"{CELL}/progress.json",
            edited("learned", 0, "tokens", value=-1),
            "found learned.0.tokens: .* found -1, wanted what",
        ),
        (
            f"{CELL}/progress.json",
            edited("learned", 0, "mood", value=1),
            "found learned.0.mood: Extra inputs are not permit",
        ),
        (
            f"{CELL}/progress.json",
            edited("learned", 0, "scores", value={"a": "x"}),
            "found learned.0.scores.a: .*wanted what",
        ),
        (f"{CELL}/progress.json", edited("learned", 0, "seconds", value=float("inf")), "learned.0.seconds: .* finite"),
    ],
)
def test_json_of_something_else(root: Path, name: str, edit: Callable[[Any], Any], message: str) -> None:
    path = root / name
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    before = files(root)
    with pytest.raises(ValueError, match=message) as error:
        READERS[name](root)
    assert str(root) in str(error.value)
    assert files(root) == before


def test_scores_and_reasons_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"zero_shot.json: found a: .*, wanted scores by task; {WAY}"):
        check_scores({"a": "much"}, tmp_path / "zero_shot.json")
    with pytest.raises(RunError, match=r"found a: .*finite"):
        check_scores({"a": float("nan")}, tmp_path / "zero_shot.json")
    with pytest.raises(
        RunError, match=r"failed.json: found reason: Field required, wanted the reason .*; remove it, and"
    ):
        check_failure({}, tmp_path / FAILED)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"step": -1, "seconds": 1.0, "sha256": {}},
        {"step": 1, "seconds": float("nan"), "sha256": {}},
        {"step": "1", "seconds": 1.0, "sha256": {}},
        {"step": 1, "seconds": 1.0, "sha256": []},
        {"step": 1, "seconds": 1.0, "sha256": {"x": 1}},
        {"step": 1, "seconds": 1.0, "sha256": {}, "more": 1},
    ],
)
def test_manifests_that_are_none(data: Any) -> None:
    assert Manifest.parse(data) is None
    assert Manifest.parse({"step": 1, "seconds": 1.0, "sha256": {"x": "y"}}) is not None


def test_what_is_whole_is_read(root: Path) -> None:
    """What the other tests spoil is read as it is."""
    assert [key.name for key in planned_cells(RunDirectory.open(root))] == ["slao-order1-seed0"]
    assert check_plan({"format": 1, "cells": []}, root) == []
    assert load_results([root]) == [result()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot be read as JSON: .*; restore it from a copy, give .*, remove it and `mbf resume` the run"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "is not a result of a run"),
        (b'{"schema_version": 99}', "has schema_version 99, this mbf reads 1; update mbf"),
    ],
)
def test_the_report_of_broken_results(root: Path, text: bytes, message: str) -> None:
    """``mbf report`` says which file in one line, and an older report stays whole."""
    (root / CELL / "result.json").write_bytes(text)
    (root / "report").mkdir()
    (root / "report" / "report.html").write_text("older")
    before = files(root)
    said = CliRunner().invoke(app, ["report", str(root), "--out", str(root / "report")])
    assert said.exit_code == 2
    line = " ".join(said.stderr.split())
    assert re.match(rf"mbf: {re.escape(str(root))}/{CELL}/result.json {message}", line), line
    assert files(root) == before
