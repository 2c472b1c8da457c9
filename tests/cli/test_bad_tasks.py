"""``--on-bad-task``: what is said when a task diverges, and the way on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mbf.cli.app import app
from tests.run.test_bad_tasks import REASON, planted
from tests.run.tiny import tiny_settings, write_stream


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    path = root / "run.yaml"
    path.write_text(json.dumps(tiny_settings(write_stream(root / "tiny"))))
    return path


def test_stopped_then_told_to_skip(mbf, configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.run.cell.train_task", planted)
    root = tmp_path / "run"
    result = mbf("run", configuration, "--output", root)
    assert result.exit_code == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("mbf: ")]
    assert said == [
        f"mbf: {REASON} To leave the task out: mbf resume {root} --on-bad-task skip",
        "mbf: task 2 'colour' was abandoned; the merged LoRA is as it was before it",
        f"mbf: go on with: mbf resume {root}",
    ]
    assert "Traceback" not in result.output and not (root / "report").exists()

    result = mbf("resume", root, "--on-bad-task", "skip")
    assert result.exit_code == 0, result.stderr
    assert f"skipped: slao, tiny order 1, seed 0: colour: {REASON}" in result.stdout.splitlines()
    assert any(line.strip().startswith("2 colour, skipped") for line in result.stdout.splitlines())
    assert f"slao-order1-seed0: skipped: {REASON}" in result.stderr
    assert "colour was skipped and not learned" in (root / "report" / "report.html").read_text()
    stored = json.loads((root / "cells" / "slao-order1-seed0" / "result.json").read_text())
    assert stored["skipped"] == {"colour": REASON}


def test_a_comparison_is_told_how(mbf, configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.run.cell.train_task", planted)
    monkeypatch.setattr("mbf.report.write_report", lambda results, directory: directory, raising=False)
    root = tmp_path / "run"
    result = mbf("compare", "--config", configuration, "--out", root)
    assert result.exit_code == 1
    way = f"mbf compare --out {root} --set on_bad_task=skip"
    assert f"mbf: slao-order1-seed0 failed: DivergedError: {REASON} To leave the task out: {way}" in result.stderr
    result = mbf(*way.split()[1:])
    assert result.exit_code == 0, result.stderr
    assert f"skipped: slao, tiny order 1, seed 0: colour: {REASON}" in result.stdout.splitlines()


def test_the_option_reaches_the_configuration(configuration: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("mbf.run.run", lambda config, progress, sharded: seen.append(config.on_bad_task) or [])
    monkeypatch.setattr("mbf.cli.runs._show", lambda results, directory: None)
    for words in ([], ["--on-bad-task", "skip"], ["--set", "on_bad_task=skip"]):
        result = CliRunner().invoke(app, ["run", str(configuration), "--output", str(tmp_path / "run"), *words])
        assert result.exit_code == 0, result.output
    assert seen == ["stop", "skip", "skip"]


def test_another_word_is_refused(mbf, configuration: Path, tmp_path: Path) -> None:
    for words in (["--on-bad-task", "ignore"], ["--set", "on_bad_task=ignore"]):
        result = mbf("run", configuration, "--output", tmp_path / "run", *words)
        assert result.exit_code == 2
        assert "ignore" in result.stderr and "'stop'" in result.stderr and "'skip'" in result.stderr
    assert not (tmp_path / "run").exists()
