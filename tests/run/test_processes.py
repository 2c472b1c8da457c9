"""A run on two processes, replicated (DDP) and in parts (FSDP2), is the run of one: matrix, adapters, checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mbf.report
import mbf.run.processes
from mbf.report import RunResult
from mbf.run import resume, run
from mbf.run.config import parse_config
from mbf.run.progress import LogProgress
from tests.processes import together
from tests.run.tiny import tiny_settings, write_stream

SHARDED = pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])


class Stop(LogProgress):
    """Ends the process at a step of a task."""

    def __init__(self, task: int | None, step: int) -> None:
        self.task, self.at, self.now = task, step, 0

    def task_started(self, cell, task, number, total, steps) -> None:
        self.now = number

    def step(self, step, *rest) -> None:
        if (self.now, step) == (self.task, self.at):
            raise KeyboardInterrupt("stopped on purpose")


def settings(folder: Path) -> dict[str, Any]:
    """13 rows in batches of 4, two a step: the last batch is short. High rates, so that scores move.

    On all linear layers AdamW, which divides by the gradient's size, makes much of rounding where a gradient is nil.
    """
    stream = write_stream(folder / "stream", train=13)
    tasks = [{"name": name, "path": str(stream / name)} for name in ("animal", "colour")]
    tasks.append({"name": "verb", "path": str(stream / "verb"), "kind": "generation"})
    spec = {"name": "tiny", "tasks": tasks, "orders": [["animal", "colour", "verb"]]}
    train = {"batch_size": 4, "accumulation": 2, "lr": 0.03, "warmup_steps": 0, "epochs": 3, "save_steps": 2}
    lora = {"r": 3, "dropout": 0.0}
    return tiny_settings(stream) | {"stream": spec, "train": train, "lora": lora, "eval": {"batch_size": 2}}


def start(plain: dict[str, Any], root: Path, sharded: bool, stop: int | None = None) -> list[RunResult]:
    mbf.report.write_report = lambda results, directory: directory  # pictures take longer than all else here
    return run(parse_config(plain | {"output": root}), Stop(stop, 4), sharded=sharded)


def go_on(root: Path, sharded: bool) -> list[RunResult]:
    mbf.report.write_report = lambda results, directory: directory
    return resume(root, LogProgress(), sharded=sharded)


def adapter(root: Path, label: str = "slao") -> dict[str, torch.Tensor]:
    return load_file(root / "cells" / f"{label}-order1-seed0" / "adapter" / "adapter_model.safetensors")


def assert_close(root: Path, other: Path) -> None:
    mine, wanted = adapter(root), adapter(other)
    assert mine.keys() == wanted.keys() and any(bool(t.count_nonzero()) for n, t in wanted.items() if "lora_B" in n)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return settings(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def alone(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    root = tmp_path_factory.mktemp("alone") / "run"
    (result,) = together(start, plain, root, False, processes=1)[0]
    return root, result


@SHARDED
def test_two_processes_end_with_the_matrix_of_one(plain, alone, tmp_path: Path, sharded: bool) -> None:
    root, wanted = alone
    scores = {score for row in wanted.matrix.scores for score in row}
    assert len(scores) > 3, "a matrix that training does not move proves nothing"
    (first,), (second,) = together(start, plain, tmp_path / "run", sharded)
    assert first.matrix == second.matrix == wanted.matrix
    assert first.train_tokens == wanted.train_tokens and first.memory == wanted.memory
    assert_close(tmp_path / "run", root)
    stored = json.loads((tmp_path / "run/cells/slao-order1-seed0/result.json").read_text())
    assert stored["matrix"]["scores"] == wanted.matrix.scores


@pytest.mark.parametrize(
    ("first", "then", "sharded"),
    [(2, 1, (False, False)), (1, 2, (False, True)), (2, 1, (True, False)), (2, 2, (True, False))],
    ids=["ddp, alone", "alone, fsdp", "fsdp, alone", "fsdp, ddp"],
)
def test_a_checkpoint_resumes_on_other_processes(plain, alone, tmp_path: Path, first, then, sharded) -> None:
    root = tmp_path / "run"
    with pytest.raises(AssertionError, match="stopped on purpose"):
        together(start, plain, root, sharded[0], 2, processes=first)
    checkpoints = list((root / "cells/slao-order1-seed0/train/task-02").glob("checkpoint-*"))
    assert checkpoints and json.loads((root / "cells/slao-order1-seed0/progress.json").read_text())["learned"]
    ((result,), *_) = together(go_on, root, sharded[1], processes=then)
    assert result.matrix == alone[1].matrix
    assert_close(root, alone[0])


def seeds(plain: dict[str, Any], root: Path) -> int:
    start(plain, root, False)
    return torch.initial_seed()


def test_each_process_draws_dropout_masks_of_its_own(plain, tmp_path: Path) -> None:
    with_dropout = plain | {"lora": plain["lora"] | {"dropout": 0.3}, "methods": ["multitask"]}
    first, second = together(seeds, with_dropout, tmp_path / "run")
    assert first != second


def refused(plain: dict[str, Any], root: Path) -> str:
    mbf.run.processes._GRACE = 0.0
    try:
        start(plain, root, False)
    except SystemExit:
        return "ended quietly"
    except ValueError as error:
        return str(error)
    return "nothing was wrong"


def test_one_process_reports_what_is_wrong_and_none_waits(plain, tmp_path: Path) -> None:
    odd = plain | {"train": plain["train"] | {"batch_size": 3}}
    said = together(refused, odd, tmp_path / "run")
    assert said[0].startswith("train.batch_size: 3 rows") and "choose a multiple of 2" in said[0]
    assert said[1] == "ended quietly"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thing").touch()
    said = together(refused, plain, tmp_path / "taken")
    assert "is not empty (it has thing)" in said[0] and said[1] == "ended quietly"
    assert not (tmp_path / "run" / "run.json").exists()


def asked_by_accelerate(value: str) -> tuple[bool, bool]:
    os.environ["ACCELERATE_USE_FSDP"] = value
    return mbf.run.processes.Processes().sharded, "ACCELERATE_USE_FSDP" in os.environ


def test_accelerates_wish_for_fsdp_is_ours_to_fulfil() -> None:
    """And is not passed on, as accelerate would wrap what is sharded already. One process has nothing to shard."""
    assert together(asked_by_accelerate, "true") == [(True, False)] * 2
    assert together(asked_by_accelerate, "false") == [(False, False)] * 2
    assert together(asked_by_accelerate, "true", processes=1) == [(False, False)]


# -- by their launchers ------------------------------------------------------------------------------------------------


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment |= variables
    return subprocess.run([sys.executable, *words], text=True, capture_output=True, timeout=300, env=environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def yaml_file(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(json.dumps(plain))
    return path


@pytest.mark.parametrize("launcher", ["mbf", "accelerate"])
def test_launched(yaml_file: Path, alone, tmp_path: Path, launcher: str) -> None:
    """``mbf run --nproc 2 --sharded``; ``accelerate launch -m mbf run``, which asks for FSDP in its own way."""
    root = tmp_path / "run"
    words = ["run", str(yaml_file), "--output", str(root)]
    if launcher == "mbf":
        done = command("-m", "mbf", *words, "--nproc", "2", "--sharded")
    else:
        flags = (
            f"--cpu --num_processes 2 --num_machines 1 --mixed_precision no --main_process_port {free_port()}".split()
        )
        done = command("-m", "accelerate.commands.launch", *flags, "-m", "mbf", *words, ACCELERATE_USE_FSDP="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1 and done.stderr.count("slao-order1-seed0: finished") == 1
    stored = json.loads((root / "cells/slao-order1-seed0/result.json").read_text())
    assert stored["matrix"]["scores"] == alone[1].matrix.scores
    assert_close(root, alone[0])
    assert json.loads((root / "run.json").read_text())["command"].startswith("mbf run ")
