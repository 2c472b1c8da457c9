"""The measures against examples worked out by hand, and the files they travel in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mbf.continual.metrics import FORMULAS, ScoreMatrix, order_disparity

# Rows are tasks, columns "after learning task"; chosen so that every measure has another value.
#   AA = (70 + 60 + 90) / 3 = 73 1/3
#   BWT = ((70 − 80) + (60 − 75)) / 2 = −12.5
#   FWT = ((30 − 25) + (42 − 40)) / 2 = 3.5
#   Forgetting = (82 − 70, 75 − 60, 90 − 90) = (12, 15, 0), mean over the first two 13.5
SCORES = [[80.0, 82.0, 70.0], [30.0, 75.0, 60.0], [41.0, 42.0, 90.0]]
ZERO = [50.0, 25.0, 40.0]


def matrix(scores=SCORES, zero_shot=ZERO, tasks=("a", "b", "c")) -> ScoreMatrix:
    return ScoreMatrix(tasks=tasks, scores=scores, zero_shot=zero_shot)


def with_missing(*entries: tuple[int, int]) -> ScoreMatrix:
    return matrix([[None if (i, t) in entries else s for t, s in enumerate(row)] for i, row in enumerate(SCORES)])


def test_worked_example():
    m = matrix()
    assert m.aa == pytest.approx(220 / 3)
    assert m.bwt == -12.5
    assert m.fwt == 3.5
    assert m.forgetting_by_task == {"a": 12.0, "b": 15.0, "c": 0.0}
    assert m.forgetting == 13.5
    assert [m.average_accuracy_after(t) for t in (1, 2)] == [80.0, 78.5]
    assert m.average_accuracy_after(3) == m.aa
    assert m.final == {"a": 70.0, "b": 60.0, "c": 90.0}
    assert not m.joint


def test_forgetting_takes_the_maximum_over_all_evaluated_columns():
    better_before = matrix([[80.0, 82.0, 70.0], [95.0, 75.0, 60.0], [41.0, 42.0, 90.0]])
    assert better_before.forgetting_by_task["b"] == 35.0
    assert with_missing((1, 0)).forgetting_by_task["b"] == 15.0


def test_one_task_defines_average_accuracy_only():
    m = ScoreMatrix(tasks=("a",), scores=[[64.0]], zero_shot=[10.0])
    assert m.aa == 64.0
    assert (m.bwt, m.fwt, m.forgetting) == (None, None, None)
    assert m.forgetting_by_task == {"a": 0.0}
    assert not m.joint


@pytest.mark.parametrize(
    ("missing", "undefined"),
    [
        ((0, 2), {"aa", "bwt", "forgetting"}),
        ((2, 2), {"aa"}),
        ((1, 1), {"bwt", "forgetting"}),
        ((0, 1), {"forgetting"}),
        ((1, 0), {"fwt"}),
        ((2, 0), set()),
    ],
)
def test_a_missing_entry_undefines_exactly_the_measures_that_need_it(missing, undefined):
    whole, m = matrix(), with_missing(missing)
    for name in ("aa", "bwt", "fwt", "forgetting"):
        assert getattr(m, name) == (None if name in undefined else getattr(whole, name)), name


def test_missing_zero_shot_undefines_forward_transfer():
    assert matrix(zero_shot=[None, 25.0, None]).fwt is None
    assert matrix(zero_shot=[None, 25.0, 40.0]).fwt == 3.5  # the first task has no part in it
    assert matrix(zero_shot=[]).zero_shot == [None, None, None]


def test_all_tasks_at_once_has_an_average_and_no_history():
    m = with_missing(*((i, t) for i in range(3) for t in range(2)))
    assert m.joint
    assert m.aa == pytest.approx(220 / 3)
    assert (m.bwt, m.fwt, m.forgetting) == (None, None, None)
    assert m.forgetting_by_task == {"a": None, "b": None, "c": None}
    assert m.average_accuracy_after(2) is None


def test_nan_is_missing():
    assert matrix([[float("nan"), 82.0, 70.0], *SCORES[1:]]) == with_missing((0, 0))


def test_record_fills_an_empty_matrix():
    m = ScoreMatrix.empty(["a", "b", "c"])
    assert (m.aa, m.joint) == (None, False)
    for i, task in enumerate(m.tasks):
        m.record(task, 0, ZERO[i])
        for t in range(3):
            m.record(task, t + 1, SCORES[i][t])
    assert m == matrix()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", 1, 5.0), "no task 'x'.*a, b, c"),
        (("a", 4, 5.0), "after = 4, wanted 0"),
        (("a", -1, 5.0), "after = -1"),
        (("a", 1, 101.0), "is 101.0, wanted a percentage"),
        (("a", 1, float("nan")), "is nan"),
    ],
)
def test_record_refuses(arguments, message):
    m = matrix()
    with pytest.raises(ValueError, match=message):
        m.record(*arguments)
    assert m == matrix()


@pytest.mark.parametrize("t", [0, 4])
def test_average_accuracy_outside_the_stream(t):
    with pytest.raises(ValueError, match=f"t = {t}, wanted 1 to 3"):
        matrix().average_accuracy_after(t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("a", "b", "a")}, "task 'a' occurs twice"),
        ({"tasks": ("a", "b", "")}, "task 3 is named ''"),
        ({"tasks": ("a", "b", "c\n")}, "printable"),
        ({"tasks": (), "scores": [], "zero_shot": []}, "no tasks"),
        ({"tasks": ("a", "b")}, "3 rows, wanted 2"),
        ({"scores": [[1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]}, "row 'a' of scores has 2 entries, wanted 3"),
        ({"zero_shot": [1.0]}, "zero_shot has 1 entries, wanted 3"),
        ({"scores": [[100.5, 2.0, 3.0], *SCORES[1:]]}, "less than or equal to 100"),
        ({"scores": [[-0.5, 2.0, 3.0], *SCORES[1:]]}, "greater than or equal to 0"),
        ({"scores": [["80", 2.0, 3.0], *SCORES[1:]]}, "valid number"),
        ({"scores": [[True, 2.0, 3.0], *SCORES[1:]]}, "valid number"),
    ],
)
def test_malformed_matrices_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        matrix(**change)


# -- tasks that were skipped --


def skipping(*skipped: str) -> ScoreMatrix:
    """A skipped task's column is the one before it, zero-shot before the first."""
    columns = [ZERO]
    for t, name in enumerate("abc"):
        columns.append(columns[-1] if name in skipped else [row[t] for row in SCORES])
    return ScoreMatrix(
        tasks=("a", "b", "c"), zero_shot=ZERO, scores=[list(row) for row in zip(*columns[1:], strict=True)],
        skipped=skipped,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("skipped", "aa", "bwt", "fwt", "forgetting"),
    [
        # a: 80, 80, 70; b: 30, 30, 60; c: 41, 41, 90. b has no score of its own moment; FWT ((30 − 25) + (41 − 40)) / 2
        (("b",), (70 + 60 + 90) / 3, 70 - 80, 3.0, 10.0),
        # a: 80, 82, 82; b: 30, 75, 75; c: 41, 42, 42. b was the last to be learned.
        (("c",), (82 + 75 + 42) / 3, 82 - 80, 3.5, 0.0),
        # a: 50, 82, 70; b: 25, 75, 60; c: 40, 42, 90. Nothing was transferred to b: it was the first to be learned.
        (("a",), (70 + 60 + 90) / 3, 60 - 75, 42 - 40, 15.0),
        (("a", "b"), (70 + 60 + 90) / 3, None, None, None),
        (("a", "b", "c"), (50 + 25 + 40) / 3, None, None, None),
    ],
)
def test_what_was_skipped_counts_in_aa_and_not_as_forgotten(skipped, aa, bwt, fwt, forgetting):
    m = skipping(*skipped)
    assert (m.aa, m.bwt, m.fwt, m.forgetting) == (pytest.approx(aa), bwt, fwt, forgetting)
    assert [name for name, value in m.forgetting_by_task.items() if value is None] == list(skipped)


def test_skipped_tasks_are_those_of_the_matrix_and_are_written_where_there_are_some():
    with pytest.raises(ValidationError, match="skipped has 'x', wanted names of tasks: a, b, c"):
        ScoreMatrix(tasks=("a", "b", "c"), scores=SCORES, skipped=("x",))
    assert "skipped" not in json.loads(matrix().to_json())
    assert json.loads(skipping("b").to_json())["skipped"] == ["b"]
    assert skipping("b").to_csv().splitlines()[:2] == [
        "task,zero-shot,after a,skipped b,after c",
        "a,50.0,80.0,80.0,70.0",
    ]


# -- several orders --


def final_only(**scores: float | None) -> ScoreMatrix:
    """A matrix in the order of the keywords whose last column is their values."""
    count = len(scores)
    return ScoreMatrix(tasks=tuple(scores), scores=[[50.0] * (count - 1) + [score] for score in scores.values()])


def test_order_disparity_by_hand():
    # P_a = 70, 60, 64: OPD 10. P_b = 80, 82, 85: OPD 5. P_c = 90, 90, 90: OPD 0.
    orders = [
        final_only(a=70.0, b=80.0, c=90.0),
        final_only(b=82.0, c=90.0, a=60.0),
        final_only(c=90.0, a=64.0, b=85.0),
    ]
    disparity = order_disparity(orders)
    assert disparity.opd == {"a": 10.0, "b": 5.0, "c": 0.0}
    assert (disparity.mopd, disparity.aopd, disparity.orders) == (10.0, 5.0, 3)


def test_seeds_of_an_order_are_averaged_before_orders_are_compared():
    # Order ab: P_a = (70 + 80) / 2 = 75, P_b = 50. Order ba: P_a = 72, P_b = 58. Without averaging OPD_a would be 10.
    seeds = [final_only(a=70.0, b=50.0), final_only(a=80.0, b=50.0)]
    disparity = order_disparity([*seeds, final_only(b=58.0, a=72.0)])
    assert disparity.opd == {"a": 3.0, "b": 8.0}
    assert disparity.orders == 2


def test_order_disparity_undefined():
    one = order_disparity([final_only(a=70.0, b=80.0), final_only(a=75.0, b=80.0)])
    assert (one.opd, one.mopd, one.aopd, one.orders) == ({"a": None, "b": None}, None, None, 1)
    gap = order_disparity([final_only(a=70.0, b=80.0), final_only(b=None, a=60.0)])
    assert (gap.opd, gap.mopd, gap.aopd) == ({"a": 10.0, "b": None}, None, None)


def test_order_disparity_of_different_tasks():
    with pytest.raises(ValueError, match="only one of two has b, c"):
        order_disparity([final_only(a=1.0, b=2.0), final_only(a=1.0, c=2.0)])
    with pytest.raises(ValueError, match="no matrices"):
        order_disparity([])


def test_every_measure_has_a_formula():
    assert set(FORMULAS) == {"AA", "AA_t", "BWT", "FWT", "Forgetting", "OPD", "MOPD", "AOPD"}


# -- files --

names = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co")), min_size=1, max_size=12).filter(
    str.isprintable
)
score = st.none() | st.floats(0, 100)


@st.composite
def matrices(draw) -> ScoreMatrix:
    tasks = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    row = st.lists(score, min_size=len(tasks), max_size=len(tasks))
    skipped = tuple(task for task in tasks if draw(st.booleans()))
    scores = [draw(row) for _ in tasks]
    return ScoreMatrix(tasks=tuple(tasks), scores=scores, zero_shot=draw(row), skipped=skipped)


@settings(deadline=None)
@given(matrices())
def test_csv_and_json_give_the_same_matrix_back(m):
    assert ScoreMatrix.from_csv(m.to_csv()) == m
    assert ScoreMatrix.from_json(m.to_json()) == m


def test_csv_is_readable():
    assert with_missing((0, 0)).to_csv().splitlines() == [
        "task,zero-shot,after a,after b,after c",
        "a,50.0,,82.0,70.0",
        "b,25.0,30.0,75.0,60.0",
        "c,40.0,41.0,42.0,90.0",
    ]
    assert ScoreMatrix.from_csv("\ufeff" + matrix().to_csv().replace("\n", "\r\n")) == matrix()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header is ''"),
        ("task,zero-shot,after b\na,1,2\n", "wanted is 'task,zero-shot,after a'"),
        ("task,zero-shot,after a\na,1\n", "row 'a' has 2 cells, wanted 3"),
        ("task,zero-shot,after a\na,1,high\n", "row 'a', column 'after a' is 'high'"),
        ("task,zero-shot,after a\na,1,120\n", "less than or equal to 100.*found 120"),
        ("task,zero-shot\n", "no tasks"),
    ],
)
def test_malformed_csv(text, message):
    with pytest.raises(ValueError, match=f"not a score matrix in CSV.*{message}"):
        ScoreMatrix.from_csv(text)


def test_malformed_json():
    with pytest.raises(ValueError, match="not a score matrix in JSON: Invalid JSON"):
        ScoreMatrix.from_json("{")
    newer = json.loads(matrix().to_json()) | {"schema_version": 2}
    with pytest.raises(ValueError, match="schema_version 2, this mbf reads 1"):
        ScoreMatrix.from_json(json.dumps(newer))
    with pytest.raises(ValueError, match="scores: Field required"):
        ScoreMatrix.from_json('{"tasks": ["a"]}')
    with pytest.raises(ValueError, match=r"scores\.0\.0.*found 'x'"):
        ScoreMatrix.from_json('{"tasks": ["a"], "scores": [["x"]]}')
