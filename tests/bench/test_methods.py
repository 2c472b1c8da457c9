"""``bench/methods.py``: which cells it asks for, and that it goes on, retries and keeps what is small."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mbf import methods
from mbf.continual import TaskError
from tests.run.tiny import tiny_settings, write_stream

BENCH = Path(__file__).resolve().parents[2] / "bench"
GRID = ["slao", "slao-last-merge", "slao-mba", "slao-as-is", "seqlora", "inclora", "olora", "magmax"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    return __import__("methods")


def test_every_method_once_and_the_named_ones_at_three_orders_with_two_seeds(script, tmp_path: Path) -> None:
    from mbf.run.plan import survey

    config, cells = script.cells_of(script.CONFIG, tmp_path / "out")
    asked = survey(config, cells).asked()
    assert asked == {name: 6 if name in GRID else 1 for name in [*methods.available(), *GRID]}
    states = survey(config, cells).cells
    # An overview comes first: one cell of every method.
    assert [one.key.name for one in states[: len(methods.available())]] == [
        f"{name}-order1-seed0" for name in methods.available()
    ]
    options = {one.key.method.label: one.key.method.options for one in states}
    assert options["slao"] == {} and options["slao-last-merge"] == {"start": "last_merge"}
    assert options["slao-mba"] == {"merge": "both"} and options["slao-as-is"] == {"A_start": "as_is"}
    assert {one.key.method.name for one in states if one.key.method.label.startswith("slao")} == {"slao"}


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """The options of a run of two tiny cells a method."""
    settings = tiny_settings(write_stream(tmp_path / "tiny")) | {"methods": ["seqlora"], "seeds": [0, 1]}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings))
    (tmp_path / "images").mkdir()
    (tmp_path / "page.md").write_text(
        "before\n<!-- begin: bench/methods.py -->\nold\n<!-- end: bench/methods.py -->\nafter"
    )
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    return ["--config", str(file), *folders, "--page", str(tmp_path / "page.md")]


def test_in_pieces_to_the_end(script, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from mbf.run.cell import Cell

    monkeypatch.setattr(methods, "available", lambda: ["olora", "seqlora"])
    assert script.main([*small, "--budget", "0"]) == 0
    assert "3 of 3 cells are left; the same command goes on" in capsys.readouterr().out

    whole = Cell.run

    def fails(cell: Cell):
        if cell.key.method.name == "olora":
            raise TaskError("task 'verb': not finite")
        return whole(cell)

    with monkeypatch.context() as patch:
        patch.setattr(Cell, "run", fails)
        assert script.main(small) == 1
    assert "olora-order1-seed0 failed: TaskError: task 'verb'" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()

    assert script.main(small) == 0
    results = tmp_path / "results"
    assert sorted(file.name for file in results.iterdir()) == sorted([*script.KEPT, "config.yaml"])
    assert "| `seqlora` | 1 × 2 |" in (results / "compare.md").read_text()
    assert sum(file.stat().st_size for file in results.iterdir()) < 200_000
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!--") and page.endswith("-->\nafter") and "old" not in page
    assert (results / "compare.md").read_text() in page
    assert (tmp_path / "images" / "compare-real-5.png").read_bytes() == (results / "compare.png").read_bytes()


def test_keep_copies_what_is_there(script, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "available", lambda: ["seqlora"])
    assert script.main([*small, "--budget", "60"]) == 0
    monkeypatch.setattr(methods, "available", lambda: ["olora", "seqlora"])
    (tmp_path / "results" / "compare.md").unlink()
    shutil.rmtree(tmp_path / "out" / "report")  # as after a kill
    assert script.main([*small, "--keep"]) == 0
    assert (tmp_path / "results" / "compare.md").exists()
    assert not (tmp_path / "out" / "cells" / "olora-order1-seed0").exists()


def test_a_page_without_marks_is_left_alone(script, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md has no lines .*the table goes between them"):
        script.show(tmp_path, page)
    assert page.read_text() == "no marks"


def test_the_documentation_shows_what_is_kept(script) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    shown = page.partition(script.BEGIN)[2].partition(script.END)[0]
    assert shown.strip() == (script.RESULTS / "compare.md").read_text(encoding="utf-8").strip()
    picture = script.PAGE.parent / script.PICTURE
    assert picture.read_bytes() == (script.RESULTS / "compare.png").read_bytes() and str(script.PICTURE) in page
    assert (script.RESULTS / "config.yaml").read_bytes() == script.CONFIG.read_bytes()
