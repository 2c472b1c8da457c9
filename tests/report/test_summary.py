"""Rows over several runs: means, spreads, what is undefined, and what must not be averaged."""

from __future__ import annotations

import pytest

from mbf.report import ResultError, Stat, summary_rows
from tests.report.examples import run

BACK = ("trec", "agnews", "sst2")


def test_stat_by_hand():
    assert Stat.of([1.0, None, 3.0, 5.0]) == (3.0, 2.0, 3)
    assert Stat.of([4.0]) == (4.0, None, 1)
    assert Stat.of([None]) == (None, None, 0)


def test_one_row_a_label_by_falling_accuracy():
    results = [
        run("seqlora"),
        run("slao", offset=6.0),
        run("slao", offset=8.0, seed=1),
        run("joint", joint=True, offset=9),
    ]
    rows = {row.label: row for row in summary_rows(results)}
    assert list(rows) == ["joint", "slao", "seqlora"]
    slao = rows["slao"]
    assert (slao.runs, slao.orders, slao.seeds, slao.joint) == (2, (1,), (0, 1), False)
    first, second = results[1].matrix, results[2].matrix
    assert slao.aa.mean == pytest.approx((first.aa + second.aa) / 2)
    assert slao.aa.sd == pytest.approx(2**0.5)
    assert slao.bwt == (pytest.approx(first.bwt), pytest.approx(0), 2)
    assert (slao.adapter_bytes, slao.state_bytes) == (4096, 3072)
    assert slao.train_seconds.mean == 30.0
    assert slao.tokens_per_second == 500.0
    assert rows["joint"].joint
    assert (rows["joint"].bwt.mean, rows["joint"].state_bytes) == (None, 1024)


def test_a_run_without_final_scores_is_left_out_of_the_mean_and_counted():
    broken = run(seed=1)
    broken.matrix.scores[0][2] = None
    (row,) = summary_rows([run(), broken])
    assert row.aa == (run().matrix.aa, None, 1)
    assert row.runs == 2


def test_disparity_needs_two_orders():
    forth, back = run(), run(tasks=BACK, order=2)
    (row,) = summary_rows([forth])
    assert row.disparity.mopd is None
    (row,) = summary_rows([forth, back])
    final = [forth.matrix.final, back.matrix.final]
    assert row.disparity.opd == {task: abs(final[0][task] - final[1][task]) for task in forth.order_tasks}
    assert row.disparity.mopd == 6.25
    (row,) = summary_rows([forth, run(tasks=("sst2", "imdb"), order=2)])
    assert row.disparity is None


def test_flat_rows_name_every_measure():
    (row,) = summary_rows([run(), run(seed=1)])
    flat = row.flat()
    assert flat["aa_mean"] == row.aa.mean and flat["bwt_sd"] == 0.0 and flat["fwt_n"] == 2
    assert flat["seeds"] == "0 1" and flat["mopd"] is None


def test_different_options_under_one_label_are_told_apart():
    common = {"start": "last_ft"}
    results = [
        run(method_options={**common, "schedule": "1/sqrt(i)"}),
        run(method_options={**common, "schedule": "1/i"}),
        run(method_options=common, offset=1.0),
    ]
    labels = {row.label for row in summary_rows(results)}
    assert labels == {"slao (schedule=1/sqrt(i))", "slao (schedule=1/i)", "slao (schedule=default)"}
    assert {row.label for row in summary_rows([run("x", method="slao"), run("x", method="olora")])} == {
        "x (slao)",
        "x (olora)",
    }


def test_results_that_cannot_stand_together():
    with pytest.raises(ResultError, match="two results are slao, quickstart order 1, seed 0"):
        summary_rows([run(), run(offset=1.0)])
    with pytest.raises(
        ResultError, match="quickstart order 1 is sst2, agnews, trec in one result and trec, agnews, sst2"
    ):
        summary_rows([run(), run(tasks=BACK, seed=1)])
    with pytest.raises(ResultError, match="no results"):
        summary_rows([])
