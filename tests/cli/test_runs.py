"""The main job by its commands, on a random model of two layers: run, resume, report, and merging what it left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from mbf.cli.app import app

FLAGS = ["--set", "model=tiny-random-llama", "--set", "train.batch_size=4", "--set", "train.save_steps=2"]


@pytest.fixture(scope="module")
def finished(stream: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of two methods, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "letters"
    arguments = ["run", str(stream), "--method", "slao,seqlora", "--output", str(directory), "--test-rows", "4", *FLAGS]
    return directory, CliRunner().invoke(app, arguments)


def test_run_prints_matrices_measures_and_the_report(finished) -> None:
    directory, result = finished
    assert result.exit_code == 0, result.stderr
    for label in ("slao", "seqlora"):
        matrix = json.loads((directory / "cells" / f"{label}-order1-seed0" / "result.json").read_text())["matrix"]
        lines = result.stdout.splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith(f"{label}, letters order 1, seed 0"))
        for i, task in enumerate(matrix["tasks"]):
            scores = [matrix["zero_shot"][i], *matrix["scores"][i]]
            row = next(line for line in lines[start:] if line.strip().startswith(f"{i + 1} {task}"))
            assert row.split()[2:] == [f"{score:.1f}" for score in scores]
    assert "AA: average accuracy" in result.stdout
    assert result.stdout.splitlines()[-1] == f"report: {directory}/report/report.html"
    assert (directory / "report" / "report.html").stat().st_size > 10_000


def test_options_reach_the_configuration(finished) -> None:
    config = json.loads((finished[0] / "run.json").read_text())["config"]
    assert config["eval"]["rows"] == 4
    assert config["train"]["batch_size"] == 4
    assert [method["name"] for method in config["methods"]] == ["slao", "seqlora"]


def test_a_second_run_does_not_overwrite(mbf, stream: Path, finished) -> None:
    result = mbf("run", stream, "--output", finished[0], *FLAGS)
    assert result.exit_code == 2
    assert f"mbf resume {finished[0]}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_resume_ends_with_the_same_matrix(mbf, finished, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(finished[0], directory)
    cell = directory / "cells" / "seqlora-order1-seed0"
    before = json.loads((cell / "result.json").read_text())["matrix"]
    shutil.rmtree(cell)
    result = mbf("resume", directory)
    assert result.exit_code == 0, result.stderr
    assert json.loads((cell / "result.json").read_text())["matrix"] == before
    assert result.stdout.splitlines()[-1] == f"report: {directory}/report/report.html"


def test_an_interrupted_run_says_how_to_go_on(stream: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = [sys.executable, "-c", "from mbf.cli import main; main()"]
    arguments = ["run", str(stream), "--output", str(directory), "--epochs", "500", *FLAGS]
    with subprocess.Popen(
        [*command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # Wherever the tests run, here Ctrl-C interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "step 10/" in line)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert "mbf: interrupted" in said
    assert said[-1] == f"mbf: go on with: mbf resume {directory}"
    assert not [line for line in said if "Traceback" in line]


def test_report_compares_runs(mbf, finished, tmp_path: Path) -> None:
    result = mbf("report", finished[0], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "seqlora" in (tmp_path / "out" / "report.html").read_text()
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path}/out/report.html"


def test_merge_is_the_closed_form(mbf, finished, tmp_path: Path) -> None:
    adapters = [finished[0] / "cells" / f"{label}-order1-seed0" / "adapter" for label in ("slao", "seqlora")]
    result = mbf("merge", *adapters, "--out", tmp_path / "merged", "--option", "schedule=0.25")
    assert result.exit_code == 0, result.stderr
    first, second = (load_file(path / "adapter_model.safetensors") for path in adapters)
    merged = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        wanted = first[name].lerp(second[name], 0.25) if "lora_B" in name else second[name]
        assert tensor.allclose(wanted, atol=1e-6), name
        assert not first[name].equal(second[name])
