"""A run from configuration to report, on a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mbf.continual import ContinualLora, TaskError
from mbf.methods import Method, MethodInfo, base
from mbf.report import RunResult, load_results
from mbf.run import ConfigError, LogProgress, RunConfig, RunError, resume, run, workbench
from mbf.run.data import Encoder
from mbf.run.evaluate import TestSet, evaluate
from mbf.run.model import load_model
from mbf.run.processes import Processes
from mbf.streams import load_stream
from tests.run.tiny import tiny_settings


class Recorder(LogProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def cell_started(self, cell, number, total, tasks) -> None:
        self.heard.append(("cell", cell, number, total))

    def task_started(self, cell, task, number, total, steps) -> None:
        self.heard.append(("task", task, number, total, steps))

    def step(self, step, steps, loss, tokens_per_second, seconds_left) -> None:
        assert loss is not None and math.isfinite(loss) and tokens_per_second > 0 and seconds_left >= 0
        self.heard.append(("step", step, steps))

    def scored(self, cell, after, task, score) -> None:
        self.heard.append(("score", after, task, score))

    def message(self, text) -> None:
        self.heard.append(("message", text))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [what[1:] for what in self.heard if what[0] == kind]


@dataclass
class Finished:
    """A run of two methods, from start to report."""

    root: Path
    results: list[RunResult]
    progress: Recorder

    def adapter(self, label: str) -> Path:
        return self.root / "cells" / f"{label}-order1-seed0" / "adapter"


@pytest.fixture(scope="module")
def finished(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root, progress = tmp_path_factory.mktemp("finished") / "run", Recorder()
    config = RunConfig.model_validate(tiny_settings(stream) | {"methods": ["slao", "seqlora"], "output": root})
    return Finished(root, run(config, progress), progress)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than tiny models."""
    monkeypatch.setattr("mbf.report.write_report", lambda results, directory: directory, raising=False)


def test_two_methods_end_to_end(finished: Finished) -> None:
    progress, (slao, seqlora) = finished.progress, finished.results
    tasks = ("animal", "colour", "verb")
    assert (slao.method, seqlora.method) == ("slao", "seqlora")
    assert slao.order_tasks == tasks and slao.stream == "tiny"
    for result in (slao, seqlora):
        assert all(score is not None for row in result.matrix.scores for score in row)
        assert len(result.memory) == len(result.train_seconds) == len(result.train_tokens) == 3
        assert result.memory[0].adapter_bytes > 0
    # The first task is the same ordinary LoRA for both; SLAO keeps another LoRA beside the adapter, SeqLoRA nothing.
    assert [row[0] for row in slao.matrix.scores] == [row[0] for row in seqlora.matrix.scores]
    assert slao.memory[2].state_bytes == slao.memory[2].adapter_bytes and seqlora.memory[2].state_bytes == 0
    assert slao.matrix.zero_shot == seqlora.matrix.zero_shot and None not in slao.matrix.zero_shot
    # Zero-shot is evaluated once for all cells.
    assert len([1 for after, *_ in progress.of("score") if after is None]) == 3
    assert progress.of("cell") == [("slao-order1-seed0", 1, 2), ("seqlora-order1-seed0", 2, 2)]
    # 12 rows, batch 2, accumulation 2: 3 steps a task.
    assert progress.of("task")[:3] == [(name, n, 3, 3) for n, name in enumerate(tasks, 1)]
    assert [step for step, _ in progress.of("step")] == [1, 2, 3] * 6
    assert (finished.root / "report" / "report.html").stat().st_size > 1000
    assert [r.matrix for r in load_results([finished.root])] == [seqlora.matrix, slao.matrix]


def test_tokens_are_those_of_the_rows(finished: Finished, stream: Path) -> None:
    result = finished.results[0]
    encoder = Encoder(load_model("tiny-random-llama")[1], 16, 50)
    for name, tokens in zip(result.order_tasks, result.train_tokens, strict=True):
        examples = encoder.examples(load_stream(str(stream)).tasks[name].train)
        assert tokens == sum(len(example["prompt"] + example["answer"]) for example in examples)


def test_the_shipped_adapter_is_what_was_evaluated(finished: Finished, stream: Path) -> None:
    """Loaded in plain PEFT, it has the last column of the matrix."""
    result = finished.results[0]
    base, tokenizer = load_model("tiny-random-llama")
    model = PeftModel.from_pretrained(base, finished.adapter("slao"))
    assert any(bool(p.count_nonzero()) for name, p in model.named_parameters() if "lora_B" in name)
    for row, name in enumerate(result.order_tasks):
        tests = TestSet.of(load_stream(str(stream)).tasks[name], Encoder(tokenizer, 16, 50))
        assert evaluate(model, tests) == result.matrix.scores[row][-1]


@pytest.mark.usefixtures("no_report")
def test_orders_and_seeds_are_cells(config, stream: Path, tmp_path: Path) -> None:
    spec = {
        "name": "two",
        "tasks": [{"name": name, "path": str(stream / name)} for name in ("animal", "verb")],
        "orders": [["animal", "verb"], ["verb", "animal"]],
    }
    results = run(config(stream=spec, methods=["seqlora"], orders=[1, 2], seeds=[0, 1]))
    assert [(r.seed, r.order, r.order_tasks[0]) for r in results] == [
        (0, 1, "animal"), (0, 2, "verb"), (1, 1, "animal"), (1, 2, "verb"),
    ]  # fmt: skip
    assert results[0].data_hashes == results[2].data_hashes
    adapters = {r: (tmp_path / f"run/cells/seqlora-order1-seed{r}/adapter/adapter_model.safetensors") for r in (0, 1)}
    assert adapters[0].read_bytes() != adapters[1].read_bytes()


@pytest.mark.usefixtures("no_report")
def test_all_tasks_at_once_fill_the_last_column(config) -> None:
    progress = Recorder()
    (result,) = run(config(methods=["multitask"]), progress)
    assert progress.of("task") == [("all tasks", 1, 1, 9)]
    assert all(row[:2] == [None, None] and row[2] is not None for row in result.matrix.scores)
    assert len(result.train_tokens) == 1 and result.matrix.aa is not None


@pytest.mark.usefixtures("no_report")
def test_evaluating_only_what_was_seen(config) -> None:
    (result,) = run(config(methods=["seqlora"], eval={"every": "seen"}))
    seen = [[score is not None for score in row] for row in result.matrix.scores]
    assert seen == [[True, True, True], [False, True, True], [False, False, True]]
    assert result.matrix.zero_shot == [None] * 3


@pytest.mark.usefixtures("no_report")
def test_a_method_is_told_how_many_optimiser_steps_a_task_has(
    config, stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int | None] = []
    monkeypatch.setattr(Drifting, "before_task", lambda self, i, data: told.append(self.steps))
    monkeypatch.setitem(base._METHODS, "drifting", Drifting)
    progress = Recorder()
    run(config(methods=["drifting"], train=tiny_settings(stream)["train"] | {"epochs": 2}), progress)
    assert told == [steps for *_, steps in progress.of("task")] == [6, 6, 6]
    assert [step for step, _ in progress.of("step")] == 3 * [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("no_report")
def test_the_same_seed_gives_the_same_bits(config, finished: Finished, tmp_path: Path) -> None:
    """Even when another method ran before in the process, and whether or not it ran."""
    (again,) = run(config(methods=["seqlora"]))
    assert again.matrix == finished.results[1].matrix
    adapter = tmp_path / "run/cells/seqlora-order1-seed0/adapter/adapter_model.safetensors"
    assert adapter.read_bytes() == (finished.adapter("seqlora") / adapter.name).read_bytes()


@pytest.mark.usefixtures("no_report")
def test_fusing_is_a_matter_of_speed(config, tmp_path: Path) -> None:
    """Without dropout, whose masks differ, PEFT's own layers learn the same to rounding."""
    adapters = []
    for fuse in (True, False):
        run(config(output=tmp_path / str(fuse), methods=["seqlora"], lora={"r": 2, "dropout": 0.0}, fuse=fuse))
        adapters.append(load_file(tmp_path / f"{fuse}/cells/seqlora-order1-seed0/adapter/adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-3, atol=1e-5)


def test_nothing_is_written_when_the_configuration_does_not_fit(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "get_available_reporting_integrations", lambda: ["trackio"])
    with pytest.raises(ConfigError, match="orders: stream 'tiny' has no order 2; it has 1"):
        run(config(orders=[2]))
    with pytest.raises(ConfigError, match=r"lora.target_modules: the model has no 'query'; it has .*q_proj"):
        run(config(lora={"target_modules": ["query"]}))
    for pattern, wanted in (
        (
            "q_proj",
            r"no module's whole name matches 'q_proj', a regular expression; write a list .*\[q_proj\]",
        ),
        ("(q_proj", r"found '\(q_proj', which is no regular expression \(.*\[q_proj, v_proj\]"),
        (r".*attn.*", r"matches 'model.layers.0.self_attn', too, which is no single layer; .* has .*q_proj"),
    ):
        with pytest.raises(ConfigError, match=f"lora.target_modules: .*{wanted}"):
            run(config(lora={"target_modules": pattern}))
    for name, wanted in (
        ("wandbb", r"the tracker 'wandbb' is unknown; did you mean 'wandb'\?"),
        (["none", "zzz"], r"the tracker 'none' is unknown; known: none, all, .*tensorboard"),
        ("wandb", r"the tracker 'wandb' is not installed \(there are: trackio\); install it, or set"),
    ):
        with pytest.raises(ConfigError, match=f"train.report_to: {wanted}"):
            run(config(train={"report_to": name}))
    assert not (tmp_path / "run").exists()


def test_target_modules_and_trackers_are_taken_as_peft_and_the_trainer_take_them(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "get_available_reporting_integrations", lambda: ["trackio"])
    for targets in ("all-linear", "ALL-LINEAR", r".*\.(q|v)_proj"):
        for report_to in ("none", "all", ["none"], [], "trackio"):
            made = config(lora={"target_modules": targets}, train={"report_to": report_to})
            workbench.Workbench(made, LogProgress(), Processes())


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(("rows", "steps"), [(2, 1), (6, 3)])
def test_tasks_that_are_shorter_than_the_warm_up_are_learnt(
    config, stream: Path, tmp_path: Path, rows: int, steps: int
) -> None:
    train = tiny_settings(stream)["train"] | {"rows": rows, "accumulation": 1, "warmup_steps": 5}
    progress = Recorder()
    run(config(methods=["seqlora"], train=train), progress)
    assert progress.of("step")[0][1] == steps
    adapter = load_file(tmp_path / "run/cells/seqlora-order1-seed0/adapter/adapter_model.safetensors")
    assert all(bool(B.count_nonzero()) for name, B in adapter.items() if "lora_B" in name)


@pytest.mark.usefixtures("no_report")
def test_a_model_that_one_process_cannot_split_is_said_to_be_whole(config) -> None:
    progress = Recorder()
    run(config(methods=["seqlora"]), progress, sharded=True)
    said = "sharded: there is one process, which holds the whole model; start more of them to split it"
    assert (said,) in progress.of("message")


def test_a_run_is_not_started_over(config, finished: Finished) -> None:
    with pytest.raises(RunError, match="holds a run already"):
        run(config(output=finished.root))


def test_a_finished_run_is_not_run_again(finished: Finished) -> None:
    progress = Recorder()
    assert resume(finished.root, progress) == finished.results
    assert [kind for kind, *_ in progress.heard if kind != "message"] == []


def test_changed_data_is_refused(finished: Finished, tmp_path: Path, stream: Path) -> None:
    file = stream / "verb" / "train.jsonl"
    text = file.read_text()
    file.write_text(text.replace("train3", "train three"))
    try:
        with pytest.raises(RunError, match="the rows of verb are not those"):
            resume(finished.root)
    finally:
        file.write_text(text)


@pytest.mark.usefixtures("no_report")
def test_other_labels_or_another_model_in_its_place_are_refused(config, stream: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny-random-llama")
    folder, file = tmp_path / "model", tmp_path / "tasks.yaml"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tasks = [{"name": name, "path": str(stream / name)} for name in ("animal", "verb")]
    file.write_text(json.dumps({"tasks": tasks}))
    chosen = config(stream=str(file), model=str(folder), methods=["seqlora"])
    run(chosen)
    resume(tmp_path / "run", Recorder())
    tasks[1]["labels"] = ["run", "walk slowly", "fly"]
    file.write_text(json.dumps({"tasks": tasks}))
    with pytest.raises(RunError, match="labels or metric of verb changed since the run was started"):
        resume(tmp_path / "run", Recorder())
    del tasks[1]["labels"]
    file.write_text(json.dumps({"tasks": tasks}))
    (folder / "generation_config.json").write_text("{}")
    resume(tmp_path / "run", Recorder())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    with pytest.raises(RunError, match="the model changed since the run was started, so its scores do not compare"):
        resume(tmp_path / "run", Recorder())


class Drifting(Method):
    """Changes its state inside a task, and the adapter by it and by the number of the step."""

    name = "drifting"
    info = MethodInfo(title="", trained="", frozen="", merge="", memory="")

    def init_adapter(self, i: int) -> None:
        self.state = {"drift": 0.5}

    def after_step(self, step: int) -> None:
        drift = self.state["drift"]
        assert isinstance(drift, float)
        self.state = {"drift": 0.75 * drift + step}
        for layer in self.layers:
            layer.A.add_(1e-3 * drift * step)


@pytest.mark.usefixtures("no_report")
def test_what_a_method_keeps_inside_a_task_is_restored(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Recorder):
        def step(self, step, *rest) -> None:
            if step == 3 and len(self.of("step")) == 5:
                raise KeyboardInterrupt
            super().step(step, *rest)

    monkeypatch.setitem(base._METHODS, "drifting", Drifting)
    run(config(methods=["drifting"], output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(config(methods=["drifting"]), Interrupted())
    progress = Recorder()
    resume(tmp_path / "run", progress)
    assert [step for step, _ in progress.of("step")] == [3, 1, 2, 3]  # steps 1 and 2 of task 2 were in a checkpoint
    whole, resumed = (
        (tmp_path / name / "cells/drifting-order1-seed0/adapter/adapter_model.safetensors").read_bytes()
        for name in ("whole", "run")
    )
    assert whole == resumed


@pytest.mark.usefixtures("no_report")
def test_a_broken_task_stops_the_run_and_can_be_resumed(
    config, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_task = ContinualLora.end_task

    def poisoned(learner: ContinualLora, data: Any = None) -> None:
        if learner.task_index == 2:
            with torch.no_grad():
                learner.layers[0].B.fill_(float("nan"))
        end_task(learner, data)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualLora, "end_task", poisoned)
        with pytest.raises(TaskError, match="colour"):
            run(config())
    ledger = json.loads((tmp_path / "run" / "cells" / "slao-order1-seed0" / "progress.json").read_text())
    assert [one["name"] for one in ledger["learned"]] == ["animal"]
    assert resume(tmp_path / "run")[0].matrix == finished.results[0].matrix
