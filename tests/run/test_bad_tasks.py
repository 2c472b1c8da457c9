"""A task that diverges in a run: it stops the run, or is skipped, and what was learned before keeps its bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import mbf.report
import mbf.run.cell
import mbf.run.processes
from mbf.continual import DivergedError
from mbf.report import RunResult, load_results
from mbf.run import RunConfig, resume, run
from mbf.run.compare import compare
from mbf.run.config import differences, parse_config
from mbf.run.train import train_task
from tests.processes import together
from tests.run.test_engine import Recorder
from tests.run.tiny import tiny_settings, write_stream

CHILDREN = multiprocessing.get_context("forkserver")
STEP = 3  # of 3; a checkpoint is written after step 2
REASON = (
    "task 2 'colour', step 3: inf or NaN in the gradient of B of model.layers.0.self_attn.v_proj: 1 nan of 32 values; "
    "the merged LoRA is as it was. Lower the learning rate, clip gradients, or train in a wider dtype."
)


def planted(model: Any, *arguments: Any, run_name: str, check: Any, checkpoint: Any, **options: Any) -> Any:
    """``train_task``, whose task ``colour`` gets NaN into one gradient at step 3, however often it is begun."""
    steps = [checkpoint.step if checkpoint else 0]
    name = "layers.0.self_attn.v_proj.lora_B.default.weight"
    (parameter,) = [p for n, p in model.named_parameters() if n.endswith(name)]

    def spoilt(loss: torch.Tensor) -> None:
        steps[0] += 1
        if run_name.endswith("/colour") and steps[0] == STEP:
            grad = parameter.grad
            (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = float("nan")
        check(loss)

    return train_task(model, *arguments, run_name=run_name, check=spoilt, checkpoint=checkpoint, **options)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("mbf.run.cell.train_task", planted)
    monkeypatch.setattr("mbf.report.write_report", lambda results, directory: directory, raising=False)
    return monkeypatch


class Keeper(Recorder):
    """Reads what the cell has on disk when a task begins, by the task's number."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.cell, self.files = root, "", {}

    def cell_started(self, cell, number, total, tasks) -> None:
        self.cell = cell

    def task_started(self, cell, task, number, total, steps) -> None:
        super().task_started(cell, task, number, total, steps)
        state = self.root / "cells" / self.cell / "state"
        self.files[self.cell, number] = {path.name: path.read_bytes() for path in state.rglob("*.safetensors")}


def cell(root: Path, label: str = "slao") -> Path:
    return root / "cells" / f"{label}-order1-seed0"


def ledger(root: Path) -> list[dict[str, Any]]:
    return json.loads((cell(root) / "progress.json").read_text())["learned"]


def adapter(root: Path, label: str = "slao") -> bytes:
    return (cell(root, label) / "adapter" / "adapter_model.safetensors").read_bytes()


METHODS = ["slao", "magmax", "olora", "opcm", "lilora"]


@pytest.fixture(scope="module")
def skipped(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunResult], Keeper]:
    """A run of four methods that skips ``colour``."""
    root = tmp_path_factory.mktemp("skipped") / "run"
    settings = tiny_settings(stream) | {"methods": METHODS, "output": root, "on_bad_task": "skip"}
    keeper = Keeper(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbf.run.cell.train_task", planted)
        return root, run(RunConfig.model_validate(settings), keeper), keeper


@pytest.mark.parametrize("label", METHODS)
def test_a_skipped_task_leaves_adapter_and_state_as_they_were(skipped, label: str) -> None:
    root, results, keeper = skipped
    (result,) = [one for one in results if one.label == label]
    before, after = (keeper.files[f"{label}-order1-seed0", number] for number in (2, 3))
    assert before == after and set(before) == {"adapter_model.safetensors", "learner.safetensors"}
    assert result.skipped == {"colour": REASON} and result.matrix.skipped == ("colour",)
    # The column is that of the LoRA as it was; then the next task is learned.
    assert all(row[1] == row[0] for row in result.matrix.scores)
    assert adapter(root, label) != after["adapter_model.safetensors"]
    assert (result.train_seconds[1], result.train_tokens[1]) == (0.0, 0)
    assert result.memory[1] == result.memory[0] and result.train_tokens[2] > 0


def test_a_skipped_task_is_told_and_written_down(skipped) -> None:
    root, results, keeper = skipped
    assert ("slao-order1-seed0: skipped: " + REASON,) in keeper.of("message")
    assert [(one["name"], one["skipped"]) for one in ledger(root)] == [
        ("animal", None), ("colour", REASON), ("verb", None),
    ]  # fmt: skip
    assert load_results([root]) == sorted(results, key=lambda one: one.label)
    learner = next((cell(root) / "state").rglob("learner.json"))
    history = json.loads(learner.read_text())["history"]
    assert [(one["index"], one["name"]) for one in history] == [(1, "animal"), (2, "verb")]  # i of 1/√i counts these
    assert REASON.replace("'", "&#39;") in (root / "report" / "report.html").read_text()


def test_a_bad_task_stops_the_run_and_leaves_the_directory_as_before(bad, config, skipped, tmp_path: Path) -> None:
    root, keeper = tmp_path / "run", Keeper(tmp_path / "run")
    with pytest.raises(DivergedError) as error:
        run(config(), keeper)
    assert str(error.value) == f"{REASON} To leave the task out: mbf resume {root} --on-bad-task skip"
    assert error.value.__notes__ == ["task 2 'colour' was abandoned; the merged LoRA is as it was before it"]
    assert [one["name"] for one in ledger(root)] == ["animal"]
    state = {path.name: path.read_bytes() for path in (cell(root) / "state").rglob("*.safetensors")}
    assert state == keeper.files["slao-order1-seed0", 2]
    assert not list((cell(root) / "train").rglob("checkpoint-*")) and not (cell(root) / "result.json").exists()

    # What is wrong is still wrong; told to skip, the same directory ends as the run that skipped from the start.
    with pytest.raises(DivergedError, match="task 2 'colour', step 3"):
        resume(root)
    (result,) = resume(root, on_bad_task="skip")
    assert result.matrix == skipped[1][0].matrix and result.skipped == {"colour": REASON}
    assert adapter(root) == adapter(skipped[0])
    assert result.config["on_bad_task"] == "skip"
    assert json.loads((root / "run.json").read_text())["config"]["on_bad_task"] == "stop"


def test_without_what_was_wrong_a_stopped_run_ends_as_any(bad, config, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run(config())
    bad.setattr("mbf.run.cell.train_task", train_task)
    (result,) = resume(tmp_path / "run")
    (whole,) = run(config(output=tmp_path / "whole"))
    assert result.matrix == whole.matrix and result.skipped == {}
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert "skipped" not in json.loads((cell(tmp_path / "run") / "result.json").read_text())


def test_a_rate_that_makes_everything_diverge(config, bad, tmp_path: Path) -> None:
    """Not planted. Nothing is learned, and the scores are those of the model without an adapter."""
    bad.setattr("mbf.run.cell.train_task", train_task)
    train = tiny_settings(tmp_path)["train"] | {"lr": 1e18, "warmup_steps": 0}
    (result,) = run(config(train=train, on_bad_task="skip"))
    assert list(result.skipped) == ["animal", "colour", "verb"]
    assert all(reason.startswith("task 1 ") for reason in result.skipped.values())  # none was learned before
    for row, zero in zip(result.matrix.scores, result.matrix.zero_shot, strict=True):
        assert row == [zero] * 3
    assert result.matrix.aa is not None and result.matrix.bwt is None and result.train_tokens == [0, 0, 0]


def test_only_seen_tasks_and_all_at_once(config, bad, tmp_path: Path) -> None:
    (result,) = run(config(on_bad_task="skip", eval={"every": "seen"}))
    seen = [[score is not None for score in row] for row in result.matrix.scores]
    assert seen == [[True, True, True], [False, True, True], [False, False, True]]
    assert result.matrix.aa is not None and result.matrix.scores[0][1] == result.matrix.scores[0][0]
    bad.setattr("mbf.run.cell.train_task", train_task)
    train = tiny_settings(tmp_path)["train"] | {"lr": 1e18}
    (joint,) = run(config(output=tmp_path / "joint", methods=["multitask"], on_bad_task="skip", train=train))
    assert list(joint.skipped) == ["animal", "colour", "verb"] and joint.matrix.joint
    assert [row[2] for row in joint.matrix.scores] == joint.matrix.zero_shot


def test_the_setting_may_change_between_calls(config) -> None:
    stop, skip = config(), config(on_bad_task="skip")
    assert differences(stop.plain(), skip.plain()) == []
    old = {key: value for key, value in stop.plain().items() if key != "on_bad_task"}  # written before there was one
    assert differences(old, stop.plain()) == []
    assert differences(stop.plain(), config(fuse=False, on_bad_task="skip").plain()) == ["fuse: True -> False"]


def test_a_comparison_skips_when_told_to(bad, config, tmp_path: Path) -> None:
    found = compare(config())
    reason = found.failed["slao-order1-seed0"]
    way = f"mbf compare --out {tmp_path / 'run'} --set on_bad_task=skip"
    assert reason == f"DivergedError: {REASON} To leave the task out: {way}"
    found = compare(config(on_bad_task="skip"))
    assert found.failed == {} and found.results[0].skipped == {"colour": REASON}
    assert found.results[0].config["on_bad_task"] == "skip"
    assert f"- slao, tiny order 1, seed 0: colour: {REASON}" in (tmp_path / "run/report/compare.md").read_text()


# -- killed ------------------------------------------------------------------------------------------------------------


class Killer(Recorder):
    """Kills the process at a step of a task."""

    def __init__(self, at: tuple[int, int]) -> None:
        super().__init__()
        self.at, self.task = at, 0

    def task_started(self, cell, task, number, total, steps) -> None:
        self.task = number

    def step(self, step, *rest) -> None:
        if (self.task, step) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def child(settings: dict[str, Any], root: Path, at: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    mbf.report.write_report = lambda results, directory: directory
    mbf.run.cell.train_task = planted
    if (root / "run.json").exists():
        resume(root, Killer(at))
    else:
        run(parse_config(settings | {"output": root, "on_bad_task": "skip"}), Killer(at))


def go(settings: dict[str, Any], root: Path, at: tuple[int, int]) -> int | None:
    process = CHILDREN.Process(target=child, args=(settings, root, at))
    process.start()
    process.join()
    return process.exitcode


def outcome(root: Path) -> dict[str, Any]:
    result = json.loads((cell(root) / "result.json").read_text())
    tensors = {str(path.relative_to(root)): path.read_bytes() for path in cell(root).rglob("*.safetensors")}
    return {key: result[key] for key in ("matrix", "skipped", "train_tokens", "memory")} | tensors


def test_killed_with_a_skipped_task_it_ends_with_the_same_bits(stream: Path, tmp_path: Path) -> None:
    """Killed inside the bad task, after its checkpoint, and inside the task after it."""
    settings = tiny_settings(stream)
    assert go(settings, tmp_path / "unbroken", (0, 0)) == 0
    root = tmp_path / "run"
    for at in [(2, 2), (3, 2)]:
        assert go(settings, root, at) == -signal.SIGKILL
    assert [one["skipped"] for one in ledger(root)] == [None, REASON]
    assert go(settings, root, (0, 0)) == 0
    assert outcome(root) == outcome(tmp_path / "unbroken")
    assert outcome(root)["skipped"] == {"colour": REASON}


# -- several processes -------------------------------------------------------------------------------------------------


def in_processes(settings: dict[str, Any], root: Path, sharded: bool, on_bad_task: str) -> Any:
    mbf.report.write_report = lambda results, directory: directory
    mbf.run.cell.train_task = planted
    mbf.run.processes._GRACE = 0.0
    try:
        return run(parse_config(settings | {"output": root, "on_bad_task": on_bad_task}), sharded=sharded)
    except SystemExit:
        return "ended quietly"
    except DivergedError as error:
        return str(error)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without dropout, whose masks differ between processes; 12 rows are 3 steps of 2 x 2."""
    settings = tiny_settings(write_stream(tmp_path_factory.mktemp("two") / "tiny"))
    return settings | {"lora": {"r": 2, "dropout": 0.0}}


@pytest.fixture(scope="module")
def alone(two: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return together(in_processes, two, tmp_path_factory.mktemp("alone") / "run", False, "skip", processes=1)[0][0]


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_several_processes_decide_alike(two, alone, tmp_path: Path, sharded: bool) -> None:
    (first,), (second,) = together(in_processes, two, tmp_path / "skip", sharded, "skip")
    assert first.matrix == second.matrix and list(first.skipped) == ["colour"]
    assert first.skipped == second.skipped
    assert first.skipped["colour"].startswith(
        "task 2 'colour', step 3: inf or NaN in the gradient of B of model.layers"
    )
    assert alone.matrix == first.matrix


def test_of_several_processes_one_reports_why_it_stopped(two, tmp_path: Path) -> None:
    first, second = together(in_processes, two, tmp_path / "stop", False, "stop")
    assert first.startswith("task 2 'colour', step 3: inf or NaN in the gradient of B of model.layers.0")
    assert second == "ended quietly"
    assert [one["name"] for one in ledger(tmp_path / "stop")] == ["animal"]
