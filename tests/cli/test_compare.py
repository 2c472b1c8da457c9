"""``mbf compare`` by its words: it grows, lists, stops at its budget, and says what failed and how to go on."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mbf.cli.app import app
from mbf.continual import TaskError

FLAGS = ["--set", "model=tiny-random-llama", "--set", "train.batch_size=4", "--set", "train.save_steps=2"]
SLAO = "slao,last-merge={name: slao, start: last_merge}"


@pytest.fixture(scope="module")
def finished(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A comparison of two labels, and what it printed."""
    directory = tmp_path_factory.mktemp("compare") / "letters"
    arguments = ["compare", str(stream), "--methods", SLAO, "--out", str(directory), "--set", "eval.rows=4", *FLAGS]
    return directory, CliRunner().invoke(app, arguments)


@pytest.fixture
def copy(finished, tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy")


def row(text: str, label: str) -> list[str]:
    return next(line for line in text.splitlines() if line.split()[:1] == [label]).split()


def test_a_table_a_picture_and_the_numbers(finished) -> None:
    directory, result = finished
    assert result.exit_code == 0, result.stderr
    report = directory / "report"
    with (report / "compare.csv").open(newline="") as file:
        read = {line["label"]: line for line in csv.DictReader(file)}
    assert read.keys() == {"slao", "last-merge"}
    markdown = (report / "compare.md").read_text()
    for label, line in read.items():
        aa = f"{float(line['aa_mean']):.1f}"
        assert row(result.stdout, label)[1:5] == ["1", "×", "1", aa]
        assert f"| `{label}` | 1 × 1 | {aa} |" in markdown
    assert len(json.loads((report / "results.json").read_text())["results"]) == 2
    assert (report / "compare.png").stat().st_size > 5000 and (report / "report.html").exists()
    assert result.stdout.splitlines()[-1] == f"report: {report}/report.html"


def test_a_second_call_adds_cells_and_need_not_repeat_the_settings(mbf, copy: Path) -> None:
    kept = {file: file.stat().st_mtime_ns for file in (copy / "cells").rglob("*") if file.is_file()}
    result = mbf("compare", "--methods", "seqlora", "--seeds", "0,1", "--out", copy)
    assert result.exit_code == 0, result.stderr
    assert row(result.stdout, "seqlora")[1:4] == ["1", "×", "2"]
    assert "slao-order1-seed0 (" not in result.stderr and "seqlora-order1-seed1 (4 of 4)" in result.stderr
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    config = json.loads((copy / "cells" / "seqlora-order1-seed1" / "result.json").read_text())["config"]
    assert config["eval"]["rows"] == 4 and config["model"] == "tiny-random-llama"


def test_list_runs_nothing(mbf, copy: Path) -> None:
    (copy / "cells" / "slao-order1-seed0" / "result.json").unlink()
    before = sorted(copy.rglob("*"))
    result = mbf("compare", "--methods", "olora", "--out", copy, "--list")
    assert result.exit_code == 0, result.stderr
    states = [line.split()[:2] for line in result.stdout.splitlines() if "-order1-seed" in line]
    assert states == [
        ["slao-order1-seed0", "begun"], ["last-merge-order1-seed0", "finished"], ["olora-order1-seed0", "missing"],
    ]  # fmt: skip
    assert " ".join(row(result.stdout, "slao-order1-seed0")[2:]) == "2 of 2 tasks learned"
    assert result.stdout.splitlines()[-1] == f"1 of 3 cells finished in {copy}"
    assert sorted(copy.rglob("*")) == before
    found = json.loads(mbf("compare", "--methods", "olora", "--out", copy, "--list", "--json").stdout)
    assert [cell["state"] for cell in found["cells"]] == ["begun", "finished", "missing"]
    assert found["cells"][1]["options"] == {"start": "last_merge"}


def test_json_is_all_that_stands_on_stdout(mbf, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where bars are drawn
    (copy / "cells" / "slao-order1-seed0" / "result.json").unlink()
    found = json.loads(mbf("compare", "--out", copy, "--json").stdout)
    assert {line["label"] for line in found["rows"]} == {"slao", "last-merge"}
    assert (found["failed"], found["left"], found["report"]) == ({}, [], f"{copy}/report/report.html")
    again = mbf("compare", "--methods", "olora", "--out", copy, "--json", "--budget", "0")
    assert json.loads(again.stdout)["left"] == ["olora-order1-seed0"]
    assert f"1 of 3 cells are left; go on with: mbf compare --out {copy} --budget 0" in again.stderr


def test_out_of_budget_is_no_failure(mbf, copy: Path) -> None:
    result = mbf("compare", "--methods", "olora,seqlora", "--out", copy, "--budget", "0")
    assert result.exit_code == 0, result.stderr
    line = f"2 of 4 cells are left; go on with: mbf compare --out {copy} --budget 0"
    assert result.stdout.splitlines()[-1] == line
    assert row(result.stdout, "olora")[1:4] == ["0", "of", "1"]
    assert mbf("compare", "--out", copy).exit_code == 0
    assert (copy / "cells" / "olora-order1-seed0" / "result.json").exists()


def test_a_failed_cell_is_exit_status_1_and_run_again(mbf, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mbf.run.cell.Cell.run", only("olora", TaskError("task 'digits': [not] finite")))
        result = mbf("compare", "--methods", "olora,seqlora", "--out", copy)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == [
        "mbf: olora-order1-seed0 failed: TaskError: task 'digits': [not] finite",
        f"mbf: 1 cell failed; run again with: mbf compare --out {copy}",
    ]
    assert row(result.stdout, "seqlora")[1:4] == ["1", "×", "1"] and row(result.stdout, "olora")[1:4] == [
        "0",
        "of",
        "1",
    ]
    assert "- `olora-order1-seed0`: TaskError" in (copy / "report" / "compare.md").read_text()
    listed = mbf("compare", "--out", copy, "--list").stdout
    assert row(listed, "olora-order1-seed0")[1:3] == ["failed", "TaskError:"]
    result = mbf("compare", "--out", copy)
    assert result.exit_code == 0, result.stderr
    assert row(result.stdout, "olora")[1:4] == ["1", "×", "1"]
    assert "Failed" not in (copy / "report" / "compare.md").read_text()


def only(label: str, error: Exception) -> Callable[[Any], Any]:
    from mbf.run.cell import Cell

    whole = Cell.run

    def fail(cell: Cell) -> Any:
        if cell.key.method.label == label:
            raise error
        return whole(cell)

    return fail


def test_when_all_fail_there_is_no_table(mbf, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.run.cell.Cell.run", only("olora", TaskError("x")))
    result = mbf("compare", stream, "--methods", "olora", "--out", tmp_path / "run", *FLAGS)
    assert result.exit_code == 1 and result.stdout == ""
    assert not (tmp_path / "run" / "report").exists()


def test_an_interrupted_comparison_says_how_to_go_on(mbf, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.run.cell.Cell.run", only("olora", KeyboardInterrupt()))  # type: ignore[arg-type]
    result = mbf("compare", "--methods", "olora", "--out", copy, "--budget", "5")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-2:] == [
        "mbf: interrupted", f"mbf: go on with: mbf compare --out {copy} --budget 5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "train.lr=0.5"], ["train.lr: 0.001 -> 0.5", "name another --out"]),
        (["--methods", "slao={start: zero}"], ["label 'slao' stands for slao there", "slao, start=zero"]),
        (["--methods", "slaoo"], ["slaoo", "did you mean 'slao'"]),
        (["--methods", "x={name: slao, begin: zero}"], ["begin: unknown key", "known: start"]),
        (["--orders", "7"], ["no order 7", "it has 1"]),
        (["quickstart"], ["stream:", "-> 'quickstart'"]),
    ],
)
def test_what_does_not_fit_is_one_line(mbf, finished, words: list[str], parts: list[str]) -> None:
    result = mbf("compare", *words, "--out", finished[0])
    assert result.exit_code == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mbf: ") and [part for part in parts if part not in last] == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "stream: is missing"),
        (["quickstart", "--out", "new"], "methods: are missing"),
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["--config", "none.json"], "wanted a YAML file"),
        (["quickstart", "--methods", "slao,,olora"], "--methods"),
        (["quickstart", "--methods", "slao", "--orders", "one"], "--orders"),
        (["quickstart", "--methods", "slao", "--budget", "-1"], "--budget"),
    ],
)
def test_wrong_usage(mbf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = mbf("compare", *words)
    assert result.exit_code == 2
    assert part in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_stream_over_it(mbf, stream: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "stream: quickstart\nmodel: tiny-random-llama\nmethods: [slao, {name: slao, label: m, merge: both}]\n"
    )
    result = mbf("compare", stream, "--config", file, "--out", tmp_path / "run", "--list", "--json", "--seeds", "4")
    assert result.exit_code == 0, result.stderr
    cells = json.loads(result.stdout)["cells"]
    assert [(c["cell"], c["options"]) for c in cells] == [
        ("slao-order1-seed4", {}), ("m-order1-seed4", {"merge": "both"}),
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_help_tells_of_labels_and_growth(mbf) -> None:
    text = " ".join(mbf("compare", "--help").stdout.replace("│", " ").split())
    for part in ("label={name: slao, start: last_merge}", "is not run again", "runs/<stream>-compare", "--budget 110"):
        assert part in text
