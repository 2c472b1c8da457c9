"""``bench/contest.py`` and the scripts on it, end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def test_rounds_are_in_orders_of_their_own_and_slow_variants_have_fewer():
    from contest import Contest, hold

    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c", "d")}
    times = hold(Contest(calls, lambda name, result: [], slow=frozenset({"d"})), rounds=20, budget=60)
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 20, "b": 20, "c": 20, "d": 4}
    timed = order[4:]  # after the round that is checked
    assert {*timed[:4]} == {*timed[4:8]} == {*calls} and len({*zip(*[iter(timed[-48:])] * 3, strict=True)}) > 3


def test_a_budget_ends_it_after_three_rounds():
    from contest import Contest, hold

    times = hold(Contest({"a": lambda: None}, lambda name, result: []), rounds=20, budget=0)
    assert len(times.seconds["a"]) == 3


def test_wrong_results_are_not_timed():
    from contest import Contest, hold

    contest = Contest({"a": lambda: 1, "b": lambda: 2}, lambda name, result: [f"gave {result}"] * (result == 2))
    assert hold(contest, 20, 60) == ["b: gave 2"]


@pytest.mark.parametrize("script", ["basis", "task_boundary", "rsvd", "merge"])
def test_the_quick_form_of_a_script(script, tmp_path, capsys):
    target = tmp_path / "out.csv"
    module = __import__(script)
    assert module.main(["--quick", "--rounds", "3", "--csv", str(target)]) == 0
    from common import read_csv

    header, rows = read_csv(target)
    assert header["command"].startswith(f"python bench/{script}.py --quick")
    assert {row["case"] for row in rows} == set(module.QUICK)
    assert all(float(row["median_ms"]) > 0 and int(row["rounds"]) >= 3 for row in rows)
    assert rows[0]["variant"] == "mbf" and rows[0]["times_faster"] == "1.00"


def test_a_basis_that_is_wrong_is_reported(monkeypatch, capsys):
    import basis

    monkeypatch.setattr(basis, "orthonormal_rows", lambda A: [1.01 * Q for Q in basis.composed(A)])
    assert basis.main(["--quick", "--rounds", "3"]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_an_unknown_case_is_refused(capsys):
    import basis

    with pytest.raises(SystemExit):
        basis.main(["--case", "everything"])
    assert "64 x [8, 4096]" in capsys.readouterr().err
    assert sys.modules["basis"].__file__ == str(BENCH / "basis.py")
