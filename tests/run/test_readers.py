"""Whatever the readers of a run's directory are given, they take it whole or refuse it in their own words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf.report.result import ResultError
from mbf.run.directory import WAY, RunError, write_json
from mbf.run.ledger import AT_ONCE, Ledger, check_scores
from tests.continual.test_readers import JSON
from tests.fuzz.targets.run_directory import GOOD, READERS

ROOT = Path("/run")


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_field_of_anything(name: str, data: st.DataObject) -> None:
    key, value = data.draw(st.sampled_from(sorted(GOOD[name]))), data.draw(JSON)
    read(name, {**GOOD[name], key: value})


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=100, deadline=None)
@given(content=JSON)
def test_anything(name: str, content: Any) -> None:
    read(name, content)


def read(name: str, content: Any) -> None:
    try:
        READERS[name](content, ROOT / name)
    except (RunError, ResultError) as error:
        assert str(ROOT) in str(error) and name in str(error)


@pytest.mark.parametrize("name", READERS)
def test_what_is_good_is_taken(name: str) -> None:
    READERS[name](GOOD[name], ROOT / name)


# -- what was learned --------------------------------------------------------------------------------------------------


def ledger(*learned: dict[str, Any]) -> dict[str, Any]:
    rest = {"seconds": 1.0, "tokens": 5, "adapter_bytes": 8, "state_bytes": 8}
    return {"tasks": ["a", "b"], "learned": [rest | one for one in learned]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            ledger({"name": "a", "scores": {"a": 250.0}}),
            "found learned.0.scores.a: .* less than or equal to 100, found",
        ),
        (
            ledger({"name": "a", "scores": {"a": -1.0}}),
            "found learned.0.scores.a: .* greater than or equal to 0, found",
        ),
        (ledger({"name": "c", "skipped": "inf"}), "found c learned, wanted a, or all tasks at once"),
        (ledger({"name": "b"}), "found b learned, wanted a, or all tasks at once"),
        (ledger({"name": "a"}, {"name": "a"}), "found a, a learned, wanted a, b, or all tasks at once"),
        (ledger({"name": "a"}, {"name": AT_ONCE}), "found a, all tasks learned, wanted a, b, or all tasks at once"),
        (ledger({"name": "a", "tokens": 10**400}), "found learned.0.tokens: .* less than or equal to 922"),
        (ledger({"name": "a", "skipped": "\ud800"}), "found learned.0.skipped: .*, wanted text in Unicode"),
    ],
)
def test_a_ledger_that_no_run_wrote(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=rf"^/run/progress\.json: {message}.*; {re.escape(WAY)}$"):
        Ledger.parse(data, ROOT / "progress.json")


@pytest.mark.parametrize(("learned", "wanted"), [(["a", "b"], AT_ONCE), ([AT_ONCE], "a")])
def test_the_ledger_of_a_method_that_learns_otherwise(learned: list[str], wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    write_json(path, ledger(*({"name": name} for name in learned)))
    otherwise = learned != [AT_ONCE]
    found = f"{path}: found {', '.join(learned)} learned, wanted {wanted}; {WAY}"
    with pytest.raises(RunError, match=f"^{re.escape(found)}$"):
        Ledger.read(path, ("a", "b"), joint=otherwise)
    assert [one.name for one in Ledger.read(path, ("a", "b"), joint=not otherwise).learned] == learned


@pytest.mark.parametrize("learned", [[], ["a"], ["a", "b"], [AT_ONCE]])
@pytest.mark.parametrize("reason", [None, "the loss is nan"])
def test_a_ledger_that_is_taken_has_a_matrix(learned: list[str], reason: str | None) -> None:
    entries = [{"name": name, "scores": {"a": 100.0, "b": 0}, "skipped": reason} for name in learned]
    found = Ledger.parse(ledger(*entries), ROOT / "progress.json")
    joint = learned == [AT_ONCE]
    matrix = found.matrix({"a": 1.0, "b": 2.0}, joint)
    assert len(matrix.skipped) == (0 if reason is None else 2 if joint else len(learned))
    assert [row[-1] for row in matrix.scores] == ([100.0, 0.0] if joint or len(learned) == 2 else [None, None])


@pytest.mark.parametrize("score", [250.0, -0.5, float("inf")])
def test_scores_that_are_no_percentages(score: float) -> None:
    with pytest.raises(RunError, match=rf"zero_shot\.json: found a: .*, wanted scores by task; {re.escape(WAY)}"):
        check_scores({"a": score}, ROOT / "zero_shot.json")
