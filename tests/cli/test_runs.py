"""The main job by its commands, on a random model of two layers: run, resume, report, and merging what it left."""

from __future__ import annotations

import json
import os
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


def test_nproc_is_refused_where_a_launcher_was_there_before(stream: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = CliRunner().invoke(app, ["run", str(stream), "--output", str(tmp_path / "run"), "--nproc", "2"])
    assert result.exit_code == 2
    assert "--nproc 2: a launcher has started this process as one of several already (WORLD_SIZE is 4)" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (0, 0, None),
        (3, 3, None),
        (-9, 1, "mbf: process 1 of 2 was ended by SIGKILL; mbf resume goes on with the run"),
        (None, 130, "mbf: interrupted"),
    ],
)
def test_what_nproc_starts_and_reports(stream: Path, tmp_path: Path, monkeypatch, failure, code: int, line) -> None:
    """The processes report for themselves; one that was killed cannot. ``None``: Ctrl-C."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    started = []

    def engine(config, program):
        def go(*words):
            started.append((config.nproc_per_node, program, words))
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "run.json").touch()
            if failure is None:
                raise SignalException("stopped", signal.SIGINT)
            if failure:
                raise ChildFailedError("mbf", {1: ProcessFailure(local_rank=1, pid=1, exitcode=failure, error_file="")})

        return go

    monkeypatch.setattr(api, "elastic_launch", engine)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "0")
    arguments = ["run", str(stream), "--output", str(tmp_path / "run"), "--nproc", "2", "--sharded", "--seed", "0,1"]
    result = CliRunner().invoke(app, [*arguments, "--set", "train.lr=0.5"])
    assert result.exit_code == code, result.output
    ((count, program, words),) = started
    assert (count, program, words[:3]) == (2, sys.executable, ("-m", "mbf", "run"))
    assert words[3:5] == (str(stream), "--sharded") and words[-2:] == ("--set", "train.lr=0.5")
    assert "seeds=[0, 1]" in words and f'output="{tmp_path / "run"}"' in words
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1
    if line is not None:
        assert result.stderr.splitlines() == [line, f"mbf: go on with: mbf resume {tmp_path / 'run'}"]
    else:
        assert result.stderr == ""
