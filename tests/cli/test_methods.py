from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from typing import get_args

import pytest
from rich.cells import cell_len
from rich.console import Console

from mbf import methods
from mbf.cli import adapters, show
from mbf.methods import MethodInfo, base


def test_table(mbf) -> None:
    result = mbf("methods")
    assert result.exit_code == 0
    for name in methods.available():
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert methods.get(name).info.title.split()[0] in line


def test_json_has_every_field_and_option(mbf) -> None:
    found = json.loads(mbf("methods", "--json").stdout)
    assert list(found) == methods.available()
    assert found["slao"]["options"]["schedule"]["default"] == "1/sqrt(i)"
    assert found["slao"]["merge"] == methods.get("slao").info.merge


LONG = {
    "slao": {"trained": "A, B", "merge": "A ← A_ft;  B ← B + (B_ft − B)/√i", "task_id": False, "grade": "paper"},
    "a_long_name": {
        "trained": "A,B0,Eb,Ea,gate-and-more",
        "merge": "D ← (λ D + τ')/λ_i",
        "task_id": True,
        "grade": "CODE",
    },
}


@pytest.mark.parametrize("width", [20, 60, 80, 100, 140, 200])
def test_nothing_is_cut_however_narrow(width: int) -> None:
    """At every width the letters of a record's lines are those of the record, and no line is longer."""
    screen = Console(file=io.StringIO(), width=width, highlight=False)
    show.wrapped(screen, "method", LONG, {"task_id": "needs task id"})
    assert isinstance(screen.file, io.StringIO)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= screen.width
    if width >= 60:
        assert screen.width == width
    starts = [n for n, line in enumerate(lines) if line.split()[:1] in (["slao"], ["a_long_name"])]
    assert len(starts) == 2
    for (name, record), start, end in zip(LONG.items(), starts, [starts[1], len(lines)], strict=True):
        texts = [name, *(("✓" if value else "") if isinstance(value, bool) else value for value in record.values())]
        assert Counter("".join("".join(lines[start:end]).split())) == Counter("".join("".join(texts).split()))
    head = "".join("".join(lines[: starts[0]]).replace("─", "").split())
    assert Counter(head) == Counter("methodtrainedmergeneedstaskidgrade")


@pytest.mark.parametrize("width", [70, 100, 199])
def test_the_table_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Every field of every method but title and source, which need a wide terminal, and no ellipsis."""
    screen = Console(file=io.StringIO(), width=width, highlight=False)
    monkeypatch.setattr(adapters, "console", lambda: screen)
    adapters.methods(as_json=False)
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    table = text.split(adapters.NOTES[0])[0]
    assert "…" not in text and max(map(cell_len, table.splitlines())) <= max(width, 100)
    wanted = ["method", *methods.available()]
    for number, name in enumerate(methods.available()):
        info = dataclasses.asdict(methods.get(name).info)
        shown = {key: value for key, value in info.items() if width >= 160 or key not in ("title", "source")}
        wanted += [("✓" if value else "") if isinstance(value, bool) else value for value in shown.values()]
        wanted += [] if number else [adapters.HEADS.get(key, key.replace("_", " ")) for key in shown]
    assert Counter("".join(table.replace("─", "").split())) == Counter("".join("".join(wanted).split()))
    assert ("arXiv 2512.23017" in text) == (width >= 160)


def test_grades_are_explained(mbf) -> None:
    assert adapters.GRADES.keys() == set(get_args(base.Grade))
    text = mbf("methods").stdout
    for grade, meaning in adapters.GRADES.items():
        assert f"  {grade:<8}  {meaning}" in text.splitlines()


def test_every_field_has_a_column(mbf) -> None:
    """New fields of MethodInfo come by themselves."""
    head = " ".join(mbf("methods").stdout.split("─")[0].split())
    for field in dataclasses.fields(MethodInfo):
        for word in adapters.HEADS.get(field.name, field.name.replace("_", " ")).split():
            assert word in head
