"""Tables have the numbers of what they show, wherever they are printed."""

from __future__ import annotations

import io

from rich.console import Console

from mbf.cli import results as tables
from mbf.continual import ScoreMatrix


def printed(results, width: int = 200) -> list[str]:
    stream = io.StringIO()
    tables.show(Console(file=stream, width=width), results)
    return stream.getvalue().splitlines()


def cells(lines: list[str], start: str) -> list[str]:
    return next(line for line in lines if line.strip().startswith(start)).split()


def test_matrix_and_measures(result) -> None:
    lines = printed([result])
    assert cells(lines, "1 news") == ["1", "news", "10.0", "80.0", "50.0"]
    assert cells(lines, "2 mail") == ["2", "mail", "20.0", "40.0", "90.0"]
    # AA (50+90)/2, BWT 50−80, FWT 40−20, forgetting 80−50
    assert cells(lines, "slao ") == ["slao", "post", "70.0", "-30.0", "20.0", "30.0", "1"]
    assert any(line.startswith("BWT:") and "a[i,T]" in line for line in lines)
    assert not any("MOPD" in line for line in lines)


def test_several_orders_have_their_disparity(result) -> None:
    tasks = ("mail", "news")
    matrix = ScoreMatrix(tasks=tasks, scores=[[70.0, 60.0], [30.0, 80.0]], zero_shot=[20.0, 10.0])
    other = result.model_copy(update={"order": 2, "order_tasks": tasks, "matrix": matrix})
    lines = printed([result, other])
    # news: 50 and 80; mail: 90 and 60: OPD 30 each
    assert cells(lines, "slao ")[-3:] == ["30.0", "30.0", "2"]
    assert any(line.startswith("AOPD:") for line in lines)


def test_a_skipped_task_is_marked_and_its_reason_printed(result) -> None:
    matrix = result.matrix.model_copy(update={"skipped": ("mail",)})
    lines = printed([result.model_copy(update={"matrix": matrix, "skipped": {"mail": "the [loss] is nan"}})])
    assert cells(lines, "2 mail")[:3] == ["2", "mail,", "skipped"]
    assert "skipped: slao, post order 1, seed 0: mail: the [loss] is nan" in lines


def test_missing_entries_are_dashes(result) -> None:
    matrix = ScoreMatrix(tasks=("news", "mail"), scores=[[None, 50.0], [None, 90.0]])
    assert cells(printed([result.model_copy(update={"matrix": matrix})]), "1 news") == ["1", "news", "–", "–", "50.0"]


def test_a_narrow_terminal_cuts_nothing(result) -> None:
    tasks = tuple(f"a_rather_long_name_{n}" for n in range(15))
    scores = [[float(10 * i / 2 + t) for t in range(15)] for i in range(15)]
    wide = result.model_copy(update={"order_tasks": tasks, "matrix": ScoreMatrix(tasks=tasks, scores=scores)})
    text = " ".join(" ".join(printed([wide], width=80)).split())
    assert "…" not in text.replace("task … (column)", "")
    assert " ".join(f"{score:.1f}" for score in scores[14]) in text


def test_markup_in_a_name_stays(result) -> None:
    odd = result.model_copy(update={"label": "slao[bold]"})
    assert any("slao[bold]" in line for line in printed([odd])[:2])
