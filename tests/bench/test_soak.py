"""``bench/soak.py`` end to end over a few tasks, and its picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def soak(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import soak

    return soak


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def test_weights_are_those_of_the_recurrence(soak) -> None:
    merged = torch.zeros(7, dtype=torch.float64)
    for i in range(1, 8):
        merged = (1 - i**-0.5) * merged + i**-0.5 * torch.eye(7, dtype=torch.float64)[i - 1]
    torch.testing.assert_close(soak.weights(7), merged)


@pytest.mark.parametrize(("kind", "tasks"), [("loop", 3), ("run", 3), ("merge", 4)])
def test_every_kind_holds_the_closed_form(soak, kind: str, tasks: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(soak, "EVERY", 2)
    assert soak.main([kind, "--tasks", str(tasks), "--csv", str(tmp_path / "soak.csv")]) == 0
    found = rows(tmp_path / "soak.csv")
    assert [int(row["task"]) for row in found] == ([2, 4] if kind == "merge" else [1, 2, 3])
    assert len({row["state"] for row in found}) == 1 and int(found[0]["state"]) > 0
    assert all(float(row["error"]) < 1e-6 and float(row["resident"]) > 100 for row in found)
    assert f"{tasks} tasks, closed form off by at most" in capsys.readouterr().out

    import soak_plot

    assert soak_plot.main([str(tmp_path / "soak.csv"), "--out", str(tmp_path / "soak.png")]) == 0
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_merge_of_other_weights_is_wrong(soak, monkeypatch, capsys) -> None:
    right = soak.weights
    monkeypatch.setattr(soak, "weights", lambda tasks: right(tasks) + 1e-3)
    assert soak.main(["loop", "--tasks", "2"]) == 1
    assert "WRONG: after task 1" in capsys.readouterr().out
