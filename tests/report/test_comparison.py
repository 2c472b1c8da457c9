"""The table and the picture of a comparison: what a row counts, exact numbers, and names that can be read."""

from __future__ import annotations

import csv
import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mbf.report import TaskMemory, summary_rows, write_comparison
from mbf.report.scatter import accuracy_against_memory
from mbf.report.style import looks
from mbf.report.table import CAPTION, Compared, compared, skipped, table, to_markdown
from tests.report.examples import run, skipping

BACK = ("trec", "agnews", "sst2")


def memory(adapter: int, state: int) -> list[TaskMemory]:
    """Grows to ``adapter`` and ``state`` at the last of three tasks."""
    return [TaskMemory(adapter_bytes=adapter // 3 * n, state_bytes=state // 3 * n) for n in (1, 2, 3)]


RESULTS = [
    run("slao", offset=5.0, memory=memory(3 * 2**20, 3 * 2**20), train_seconds=[10.0, 20.0, 33.0]),
    run("slao", offset=8.0, seed=1, memory=memory(3 * 2**20, 3 * 2**20), train_seconds=[10.0, 20.0, 27.0]),
    run("slao", offset=6.5, tasks=BACK, order=2, memory=memory(3 * 2**20, 3 * 2**20)),
    run("seqlora", memory=memory(3 * 2**20, 0)),
    run("multitask", joint=True, offset=9.0, train_seconds=[30.0], memory=memory(3 * 2**20, 0)[:1]),
]


def rows(**given) -> dict[str, list[str]]:
    shown = table(compared(RESULTS, **given))
    assert {len(row) for row in shown.rows} == {len(shown.columns)}
    return {row[0]: list(row[1:]) for row in shown.rows}


def test_a_row_has_the_mean_the_spread_and_the_last_bytes() -> None:
    aa = [run.matrix.aa for run in RESULTS[:3]]
    mean = sum(aa) / 3
    sd = math.sqrt(sum((a - mean) ** 2 for a in aa) / 2)
    _, shown_aa, bwt, fwt, adapter, state, seconds = rows()["slao"]
    assert shown_aa == f"{mean:.1f} ± {sd:.1f}"
    assert (adapter, state) == ("3.00 MiB", "3.00 MiB")
    # seconds a task: (63/3 + 57/3 + 30/3) / 3
    assert seconds == f"{(21 + 19 + 10) / 3:.1f}"
    assert bwt.startswith("−") and fwt.startswith("+")
    assert rows()["multitask"] == ["1 × 1", f"{RESULTS[4].matrix.aa:.1f}", "–", "–", "1.00 MiB", "0 B", "10.0"]


def test_rows_fall_with_accuracy_and_what_has_no_result_comes_last() -> None:
    assert list(rows(asked={"broken": 2, "slao": 3, "seqlora": 1, "multitask": 1})) == [
        "multitask", "slao", "seqlora", "broken",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "asked", "cells"),
    [
        ("slao", {}, "3"),  # order 1 with two seeds, order 2 with one: no rectangle
        ("slao", {"slao": 4}, "3 of 4"),
        ("seqlora", {}, "1 × 1"),
        ("seqlora", {"seqlora": 6}, "1 of 6"),
        ("broken", {"broken": 2}, "0 of 2"),
    ],
)
def test_cells_say_what_is_done_of_what_was_asked(label: str, asked: dict[str, int], cells: str) -> None:
    assert rows(asked=asked)[label][0] == cells


def test_a_whole_rectangle_is_orders_by_seeds() -> None:
    whole = [run(order=order, seed=seed, tasks=BACK) for order in (1, 2, 3) for seed in (0, 1)]
    ((_, cells, *_),) = table(compared(whole)).rows
    assert cells == "3 × 2"


def test_without_zero_shot_there_is_no_fwt() -> None:
    blind = run()
    blind.matrix.zero_shot[:] = [None] * 3
    assert "FWT" not in table(compared([blind])).columns
    assert "FWT" in table(compared(RESULTS)).columns


def test_markdown_is_a_table_whatever_the_names() -> None:
    text = to_markdown(table(compared([run("a|b")])), {"c-order1-seed0": "TaskError: x"})
    lines = text.splitlines()
    assert lines[2].startswith("| <code>a&#124;b</code> | 1 × 1 |")
    assert {line.count("|") for line in lines[:3]} == {9}
    assert CAPTION in lines and lines[-1] == "- `c-order1-seed0`: TaskError: x"


def test_markdown_shows_names_and_reasons_as_they_are() -> None:
    evil = "<img src=x onerror=alert(1)> `a` & | [b](http://c) **d**"
    shown = "&lt;img src=x onerror=alert(1)&gt; &#96;a&#96; &amp; &#124; &#91;b&#93;(http://c) &#42;&#42;d&#42;&#42;"
    result = skipping(run(evil, stream=evil, tasks=(evil, "b", "c")), evil, f"{evil}\n# why\r\n")
    # Labels that come from options may have more lines than one.
    entries = [*compared([result]), Compared("slao (basis=a\nb)", 1, None)]
    text = to_markdown(table(entries), {evil: f"{evil}\n\n<script>"}, skipped([result]))
    lines = text.splitlines()
    assert len(lines) == 14
    assert lines[2].startswith(f"| <code>{shown}</code> | ")
    assert lines[3].startswith("| <code>slao (basis=a b)</code> | 0 of 1 |")
    assert {line.count("|") for line in lines[:4]} == {9}
    assert lines[9] == f"- {shown}, {shown} order 1, seed 0: {shown}: {shown} # why"
    assert lines[-1] == f"- <code>{shown}</code>: {shown}  &lt;script&gt;"


def test_skipped_tasks_are_listed_with_their_reasons(tmp_path) -> None:
    results = [run("slao"), skipping(run("magmax"), "trec", "task 3 'trec', step 1: the loss is nan")]
    text = write_comparison(results, tmp_path).read_text()
    assert text.endswith(
        "Skipped tasks, which AA counts all the same:\n\n"
        "- magmax, quickstart order 1, seed 0: trec: task 3 'trec', step 1: the loss is nan\n"
    )
    assert "Skipped" not in write_comparison(results[:1], tmp_path).read_text()


def test_files(tmp_path) -> None:
    path = write_comparison(RESULTS, tmp_path / "report", asked={"slao": 6, "broken": 1}, failed={})
    assert sorted(file.name for file in path.parent.iterdir()) == ["compare.csv", "compare.md", "compare.png"]
    with (path.parent / "compare.csv").open(newline="") as file:
        read = {row["label"]: row for row in csv.DictReader(file)}
    slao = next(row for row in summary_rows(RESULTS) if row.label == "slao")
    assert float(read["slao"]["aa_mean"]) == slao.aa.mean and float(read["slao"]["aa_sd"]) == slao.aa.sd
    assert (read["slao"]["cells_asked"], read["slao"]["cells_done"]) == ("6", "3")
    assert (read["broken"]["aa_mean"], read["broken"]["cells_done"]) == ("", "0")
    assert "broken" in path.read_text() and "Failed" not in path.read_text()


def drawn(results, zero_shot=None):
    of = summary_rows(results)
    figure = accuracy_against_memory(of, looks(of), zero_shot)
    FigureCanvasAgg(figure).draw()
    return figure.axes[0]


def test_a_point_is_bytes_and_accuracy_with_its_spread() -> None:
    axes = drawn(RESULTS)
    points = [tuple(container.lines[0].get_xydata()[0]) for container in axes.containers]
    of = summary_rows(RESULTS)
    assert points == [(row.adapter_bytes + row.state_bytes, row.aa.mean) for row in of]
    slao = next(n for n, row in enumerate(of) if row.label == "slao")
    (whisker,) = axes.containers[slao].lines[2]
    low, high = (y for _, y in whisker.get_segments()[0])
    assert (low, high) == pytest.approx((of[slao].aa.mean - of[slao].aa.sd, of[slao].aa.mean + of[slao].aa.sd))
    assert [bool(container.lines[2]) for container in axes.containers].count(True) == 1  # one cell has no spread
    assert axes.get_xscale() == "log"


def test_names_of_crowded_points_do_not_overlap() -> None:
    names = [f"method-{n}" for n in range(24)]
    # Within a tenth of the height, which the last one, far below, sets.
    crowd = [run(name, offset=9 + (n * 7 % 23) / 20, memory=memory(3 * 2**20, 0)) for n, name in enumerate(names[:-1])]
    crowd += [run(names[-1], offset=-5.0, memory=memory(3 * 2**21, 0))]
    axes = drawn(crowd)
    texts = [text for text in axes.texts if text.get_text() in names]
    assert len(texts) == 24
    boxes = [text.get_window_extent() for text in texts]
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert [(a, b) for n, a in enumerate(boxes) for b in boxes[n + 1 :] if a.overlaps(b)] == []


def test_zero_shot_is_a_line_where_it_is_near() -> None:
    assert "zero-shot" in [text.get_text() for text in drawn(RESULTS, zero_shot=60.0).texts]
    assert "zero-shot" not in [text.get_text() for text in drawn(RESULTS, zero_shot=1.0).texts]


def test_nothing_measured_is_no_picture(tmp_path) -> None:
    write_comparison([run(memory=[])], tmp_path)
    assert not (tmp_path / "compare.png").exists()
