"""A comparison grows, goes on, keeps what is finished, and refuses what would not compare."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import mbf.report
from mbf.continual import TaskError
from mbf.continual.header import CheckpointError
from mbf.methods import Method, MethodInfo, base
from mbf.report import RunResult
from mbf.run import ConfigError, RunConfig, RunError, resume, run
from mbf.run.cell import CellKey, cells_of
from mbf.run.compare import compare, go_on
from mbf.run.config import MethodSpec, parse_config
from mbf.run.plan import Comparison, ask, survey
from tests.run.children import CHILDREN, Bomb, outcome
from tests.run.test_engine import Recorder
from tests.run.tiny import tiny_settings, write_stream

LAST_MERGE = {"name": "slao", "label": "last-merge", "start": "last_merge"}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than tiny models."""
    for name in ("write_report", "write_comparison"):
        monkeypatch.setattr(f"mbf.report.{name}", lambda results, directory, **_: directory, raising=False)


def two_orders(stream: Path) -> dict[str, Any]:
    return {
        "name": "two",
        "tasks": [{"name": name, "path": str(stream / name)} for name in ("animal", "verb")],
        "orders": [["animal", "verb"], ["verb", "animal"]],
    }


def contents(cell: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file of a cell."""
    return {
        str(f.relative_to(cell)): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(cell.rglob("*")) if f.is_file()
    }


def cells(progress: Recorder) -> list[str]:
    return [name for name, *_ in progress.of("cell")]


def names(comparison: Comparison) -> list[str]:
    return [f"{r.label}-order{r.order}-seed{r.seed}" for r in comparison.results]


# -- growth --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A finished comparison of two labels, not to be changed."""
    root = tmp_path_factory.mktemp("small") / "run"
    settings = tiny_settings(stream) | {"methods": ["seqlora", LAST_MERGE], "output": root}
    config = RunConfig.model_validate(settings)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_report", "write_comparison"):
            patch.setattr(f"mbf.report.{name}", lambda results, directory, **_: directory, raising=False)
        compare(config)
    return root, config


def test_a_cell_is_that_of_a_run(config, small) -> None:
    """Another loop, the same engine: scores and adapter bit for bit."""
    results = run(config(methods=["seqlora", LAST_MERGE]))
    found = compare(small[1])
    assert [r.matrix for r in found.results] == [r.matrix for r in results]
    for name in ("seqlora-order1-seed0", "last-merge-order1-seed0"):
        adapter = Path("cells", name, "adapter", "adapter_model.safetensors")
        assert (small[0] / adapter).read_bytes() == (config().output / adapter).read_bytes()


def test_what_is_finished_is_not_run_again(config) -> None:
    first = Recorder()
    found = compare(config(methods=["seqlora", LAST_MERGE]), first)
    assert cells(first) == ["seqlora-order1-seed0", "last-merge-order1-seed0"] and found.left == []
    root = found.directory
    before = {name: contents(root / "cells" / name) for name in cells(first)}
    zero_shot = (root / "zero_shot.json").read_bytes()
    second = Recorder()
    grown = compare(config(methods=["olora", "seqlora"], seeds=[0, 1]), second)
    assert cells(second) == ["olora-order1-seed0", "olora-order1-seed1", "seqlora-order1-seed1"]
    assert len(second.of("step")) == 3 * 3 * 3
    assert {name: contents(root / "cells" / name) for name in before} == before
    assert (root / "zero_shot.json").read_bytes() == zero_shot
    assert [after for after, *_ in second.of("score") if after is None] == []  # zero-shot is there already
    assert names(grown) == [*cells(first), *cells(second)]
    assert grown.asked() == {"seqlora": 2, "last-merge": 1, "olora": 2}
    third = Recorder()
    assert compare(grown_config(root), third, cells=[]).results == grown.results
    assert third.heard == []  # neither stream nor model was loaded


def grown_config(root: Path) -> RunConfig:
    config, more = ask(None, {"output": str(root)})
    assert more == []
    return config


def test_methods_may_have_orders_and_seeds_of_their_own(config, stream: Path) -> None:
    one = config(stream=two_orders(stream), methods=["slao"], orders=[1, 2], seeds=[0, 1])
    two = config(stream=two_orders(stream), methods=["seqlora"], orders=[2], seeds=[1])
    compare(one)
    found = compare(two)
    assert names(found) == [
        "slao-order1-seed0", "slao-order2-seed0", "slao-order1-seed1", "slao-order2-seed1", "seqlora-order2-seed1",
    ]  # fmt: skip
    assert [r.order_tasks[0] for r in found.results] == ["animal", "verb", "animal", "verb", "verb"]


def test_given_cells_are_all_there_are_in_their_order(config) -> None:
    """Of a new comparison those of its configuration are not begun before them, nor beside them."""
    settings = config(methods=["seqlora", "olora"], seeds=[0, 1])
    asked = list(reversed(cells_of(settings)))[:3]
    progress = Recorder()
    found = compare(settings, progress, cells=asked)
    assert cells(progress) == names(found) == ["olora-order1-seed1", "seqlora-order1-seed1", "olora-order1-seed0"]


def test_a_run_grows_into_a_comparison(config) -> None:
    run(config(methods=["seqlora"]))
    progress = Recorder()
    found = compare(config(methods=["olora"]), progress)
    assert cells(progress) == ["olora-order1-seed0"]
    assert names(found) == ["seqlora-order1-seed0", "olora-order1-seed0"]
    with pytest.raises(RunError, match="holds a comparison; go on with it by mbf compare --out"):
        resume(found.directory)
    with pytest.raises(RunError, match="holds a run already"):
        run(config(methods=["olora"]))


def test_a_result_says_what_made_it(config) -> None:
    found = compare(config(methods=["seqlora", LAST_MERGE]))
    plain, merged = found.results
    assert merged.method == "slao" and merged.method_options == {"start": "last_merge"}
    assert plain.config == merged.config and not {"methods", "orders", "seeds"} & plain.config.keys()
    assert plain.config["lora"]["r"] == 2 and plain.command and plain.versions["torch"]


# -- refusals ------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_key(config, small) -> None:
    root, first = small
    before = contents(root)
    other = first.model_copy(
        update={"train": first.train.model_copy(update={"lr": 0.5, "rows": 4}), "model": "smollm2-135m-instruct"}
    )
    wanted = (
        r"other settings.*: model: 'tiny-random-llama' -> 'smollm2-135m-instruct'; train.lr: 0.01 -> 0.5; "
        r"train.rows: None -> 4\. Ask for the same, or name another --out"
    )
    for call in (compare, survey):
        with pytest.raises(RunError, match=wanted):
            call(other)
    assert contents(root) == before


def test_a_label_stands_for_one_rule(small) -> None:
    _, first = small
    for taken in ("seqlora", {**LAST_MERGE, "start": "zero"}):
        spec = MethodSpec.model_validate(taken if isinstance(taken, dict) else {"name": "slao", "label": taken})
        with pytest.raises(RunError, match=rf"the label '{spec.label}' stands for .* there, and slao.* is asked for"):
            compare(first, cells=[CellKey(spec, 1, 0)])
    # an option that is written out with its default changes nothing
    same = MethodSpec.model_validate({**LAST_MERGE, "merge": "B"})
    assert [one.state for one in survey(first, [CellKey(same, 1, 0)]).cells] == ["finished"] * 2
    (_, _, more) = survey(first, [CellKey(same, 1, 1)]).cells
    assert more.key.method.options == {"start": "last_merge"}  # one label is one row of the report


def test_nothing_is_written_where_it_does_not_fit(config, small) -> None:
    with pytest.raises(ConfigError, match="has no order 3; it has 1"):
        compare(config(orders=[3]))
    assert not config().output.exists()
    root, first = small
    before = contents(root)
    with pytest.raises(ConfigError, match="has no order 3; it has 1"):
        compare(first.model_copy(update={"orders": [3]}))
    assert contents(root) == before


def test_changed_rows_are_refused(config, tmp_path: Path) -> None:
    own = write_stream(tmp_path / "own")
    compare(config(stream=str(own), methods=["seqlora"]))
    file = own / "verb" / "train.jsonl"
    file.write_text(file.read_text().replace("train3", "train three"))
    with pytest.raises(RunError, match="the rows of verb are not those"):
        compare(config(stream=str(own), methods=["olora"]))


def test_a_foreign_directory_is_refused(config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    for call in (compare, survey):
        with pytest.raises(RunError, match="is not empty"):
            call(config())


def test_a_plan_of_a_later_format_is_refused(config) -> None:
    found = compare(config(methods=["seqlora"]))
    (found.directory / "compare.json").write_text('{"format": 2, "cells": []}')
    with pytest.raises(RunError, match=r"compare\.json has format 2, this mbf reads 1"):
        compare(config(methods=["seqlora"]))


def test_one_of_several_processes_is_refused(config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        size = 2

    monkeypatch.setattr("mbf.run.processes.Processes", Two)
    with pytest.raises(RunError, match="runs in one process, and this is one of 2"):
        compare(config())


# -- what a call asks for ------------------------------------------------------------------------------------------


def test_what_a_call_leaves_out_is_as_it_is_there(small) -> None:
    root, first = small
    base_settings = {"output": str(root)}
    config, more = ask(None, base_settings)
    assert more == [] and config.train == first.train and config.lora == first.lora and config.stream == first.stream
    config, more = ask(None, base_settings | {"methods": ["olora"], "train.rows": None})
    assert [key.name for key in more] == ["olora-order1-seed0"] and config.train == first.train
    config, more = ask(first.stream, base_settings | {"seeds": [1, 2]})
    assert [key.name for key in more] == [
        f"{label}-order1-seed{seed}" for seed in (1, 2) for label in ("seqlora", "last-merge")
    ]
    assert more[1].method.options == {"start": "last_merge"}
    config, _ = ask(None, base_settings | {"train.lr": 0.5})
    assert config.train.lr == 0.5 and config.train.batch_size == first.train.batch_size  # compare() refuses it


def test_a_file_names_what_it_names(small, tmp_path: Path) -> None:
    root, first = small
    file = tmp_path / "more.yaml"
    file.write_text(f"methods: [seqlora, {{name: slao, label: mean, schedule: 1/i}}]\nseeds: [3]\noutput: {root}\n")
    config, more = ask(file)
    assert [key.name for key in more] == ["seqlora-order1-seed3", "mean-order1-seed3"]
    assert config.output == root and config.train == first.train


def test_a_call_without_a_name_for_the_directory_finds_it_again(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {k: v for k, v in tiny_settings(stream).items() if k != "stream"}
    config, _ = ask(stream, settings | {"methods": ["seqlora"]})
    assert config.output == Path("runs/tiny-compare")
    compare(config)
    again, _ = ask(stream, {"methods": ["seqlora"]})
    assert survey(again).left == []


@pytest.mark.parametrize(
    ("source", "settings", "wanted"),
    [
        (None, {}, "stream: is missing; name one"),
        (None, {"output": "nowhere", "methods": ["slao"]}, "stream: is missing; name one"),
        ("quickstart", {"output": "nowhere"}, "methods: are missing; name some"),
        ("quickstart", {"methods": ["slow"], "output": "nowhere"}, "method 'slow' is unknown"),
        ("quickstart", {"methods": ["slao", "slao"]}, "slao is there more than once; give each a label"),
        ("quickstart", {"methods": ["slao"], "train.epoch": 3}, "train.epoch: unknown key; did you mean 'epochs'"),
    ],
)
def test_a_wrong_call_is_told(source, settings, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=wanted):
        ask(source, settings)
    assert list(tmp_path.iterdir()) == []


# -- failures ------------------------------------------------------------------------------------------------------


class Fragile(Method):
    """Writes NaN into the adapter in task 2, after a step that is saved in a checkpoint, while ``broken``."""

    name = "fragile"
    info = MethodInfo(title="", trained="", frozen="", merge="", memory="")
    broken = True
    task = 0

    def init_adapter(self, i: int) -> None:
        self.task = i

    def after_step(self, step: int) -> None:
        if Fragile.broken and self.task == 2 and step >= 1:
            self.layers[0].B.data.fill_(float("nan"))


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> type[Fragile]:
    monkeypatch.setitem(base._METHODS, "fragile", Fragile)
    monkeypatch.setattr(Fragile, "broken", True)
    return Fragile


class Lenient(Recorder):
    """Hears of losses that are NaN, too."""

    def step(self, step, steps, *rest) -> None:
        self.heard.append(("step", step, steps))


def test_a_cell_that_fails_leaves_the_others_and_is_run_again(config, fragile) -> None:
    asked = config(methods=["fragile", "seqlora"])
    progress = Lenient()
    found = compare(asked, progress)
    assert names(found) == ["seqlora-order1-seed0"] and found.left == []
    assert list(found.failed) == ["fragile-order1-seed0"]
    reason = found.failed["fragile-order1-seed0"]
    assert reason.startswith("DivergedError: task 2 'colour', step 2: the loss is nan") and "\n" not in reason
    assert found.reasons() == found.failed
    mark = found.directory / "cells" / "fragile-order1-seed0" / "failed.json"
    record = json.loads(mark.read_text())
    assert record["reason"] == reason and "check_step" in "".join(record["traceback"])
    assert any(reason in text for (text,) in progress.of("message"))

    again = Lenient()
    found = compare(asked, again)  # still broken
    assert cells(again) == ["fragile-order1-seed0"] and list(found.failed) == ["fragile-order1-seed0"]

    fragile.broken = False
    before = contents(found.directory / "cells" / "seqlora-order1-seed0")
    last = Recorder()
    found = compare(asked, last)
    assert cells(last) == ["fragile-order1-seed0"] and found.failed == {} and found.reasons() == {}
    # From the start: the checkpoint of task 2 held the NaN.
    assert [name for name, *_ in last.of("task")] == ["animal", "colour", "verb"]
    assert [step for step, _ in last.of("step")] == [1, 2, 3] * 3
    assert not mark.exists() and names(found) == ["fragile-order1-seed0", "seqlora-order1-seed0"]
    assert contents(found.directory / "cells" / "seqlora-order1-seed0") == before


def test_a_failed_cell_waits_for_those_that_never_failed(config, fragile) -> None:
    compare(config(methods=["fragile", "seqlora"]), Lenient())
    progress = Lenient()
    compare(config(methods=["olora"]), progress)
    assert cells(progress) == ["olora-order1-seed0", "fragile-order1-seed0"]


@pytest.mark.parametrize("error", [TaskError("a"), KeyError("x"), TypeError("t"), MemoryError()])
def test_whatever_a_method_raises_is_its_own(config, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("mbf.run.cell.Cell.run", raising(error))
    found = compare(config(methods=["seqlora", "olora"]))
    assert len(found.failed) == 2
    assert all(reason.startswith(f"{type(error).__name__}:") for reason in found.failed.values())


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), CheckpointError("damaged"), RunError("broken"), KeyboardInterrupt()],
)
def test_what_would_break_every_cell_ends_the_call(config, monkeypatch, error: BaseException) -> None:
    monkeypatch.setattr("mbf.run.cell.Cell.run", raising(error))
    with pytest.raises(type(error)):
        compare(config(methods=["seqlora", "olora"]))
    assert [one.state for one in survey(config(methods=["seqlora", "olora"])).cells] == ["missing"] * 2


def raising(error: BaseException) -> Any:
    def fail(cell: Any) -> RunResult:
        raise error

    return fail


# -- budget --------------------------------------------------------------------------------------------------------


def test_after_the_budget_no_cell_is_begun(config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("mbf.run.compare.time.monotonic", lambda: now[0])

    class Slow(Recorder):
        def cell_finished(self, cell: str) -> None:
            now[0] += 60.0

    asked = config(methods=["seqlora", "olora", "inclora"])
    progress = Slow()
    found = compare(asked, progress, budget=1.5)  # begun at 0 and 1 minutes, not at 2
    assert cells(progress) == ["seqlora-order1-seed0", "olora-order1-seed0"]
    assert found.left == ["inclora-order1-seed0"] and found.failed == {}
    assert compare(asked, budget=0).left == ["inclora-order1-seed0"]
    assert compare(asked).left == []


def test_the_command_that_goes_on() -> None:
    assert go_on(Path("runs/a b")) == "mbf compare --out 'runs/a b'"
    assert go_on(Path("runs/a"), 110.0) == "mbf compare --out runs/a --budget 110"


# -- kills ---------------------------------------------------------------------------------------------------------


def test_states_of_what_was_broken_off(config) -> None:
    class Stopped(Recorder):
        def __init__(self, steps: int) -> None:
            super().__init__()
            self.steps = steps

        def step(self, step, *rest) -> None:
            super().step(step, *rest)
            if len(self.of("step")) == self.steps:
                raise KeyboardInterrupt

    asked = config(methods=["seqlora", "olora"])
    for steps, detail in ((3, "in the first task"), (2, "1 of 3 tasks learned")):
        with pytest.raises(KeyboardInterrupt):
            compare(asked, Stopped(steps))
        first, second = survey(asked).cells
        assert (first.state, first.detail) == ("begun", detail) and second.state == "missing"


def child(settings: dict[str, Any], root: Path, at: int | None, log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    bomb = Bomb(root, at, log)
    for name in ("write_report", "write_comparison"):
        setattr(mbf.report, name, lambda results, directory, **_: directory)
    config = parse_config(settings | {"output": root})
    for seed in (0, 1):  # the directory grows
        found = compare(config.model_copy(update={"seeds": [seed]}), bomb)
        bomb.write("failed", *found.failed)  # and would be run again, so that the end would not show it
    bomb.at = None
    bomb.write("events", bomb.count)


def go(settings: dict[str, Any], root: Path, at: int | None, log: Path) -> int:
    process = CHILDREN.Process(target=child, args=(settings, root, at, log))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], int]:
    root = tmp_path_factory.mktemp("unbroken")
    settings = tiny_settings(write_stream(tmp_path_factory.mktemp("stream") / "tiny", train=8, test=3))
    settings["methods"] = ["seqlora", "slao"]
    assert go(settings, root / "run", None, root / "log") == 0
    return settings, outcome(root / "run"), int((root / "log").read_text().split()[-1])


@pytest.mark.parametrize("moment", range(5))
def test_killed_anywhere_the_same_call_goes_on(unbroken, tmp_path: Path, moment: int) -> None:
    settings, wanted, events = unbroken
    at = random.Random(moment).randint(moment * events // 5 + 1, (moment + 1) * events // 5)
    root, log = tmp_path / "run", tmp_path / "log"
    assert go(settings, root, at, log) == -signal.SIGKILL
    assert go(settings, root, None, log) == 0
    found = outcome(root)
    assert found == wanted, f"killed at event {at} of {events}"
    assert len([name for name in found if name.endswith("result.json")]) == 4
    told = log.read_text().splitlines()
    assert {line for line in told if line.startswith("failed")} == {"failed"}
    # 4 cells, 3 tasks, 2 steps; only a task whose checkpoint was not written yet is learned again
    assert 24 <= len([line for line in told if line.startswith("step")]) <= 24 + 2


@pytest.mark.parametrize("event", [1, 4, 9, 14])
def test_killed_while_it_begins(unbroken, tmp_path: Path, event: int) -> None:
    settings, wanted, _ = unbroken
    root, log = tmp_path / "run", tmp_path / "log"
    assert go(settings, root, event, log) == -signal.SIGKILL
    assert go(settings, root, None, log) == 0
    assert outcome(root) == wanted


def test_a_mark_of_failure_outlives_a_kill_while_it_is_cleared(config, fragile, monkeypatch) -> None:
    found = compare(config(methods=["fragile"]), Lenient())
    cell = found.directory / "cells" / "fragile-order1-seed0"
    fragile.broken = False

    def stopped(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mbf.run.compare.shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(config(methods=["fragile"]))
    assert (cell / "failed.json").exists() and not (cell / "progress.json").exists()
    last = Recorder()
    assert compare(config(methods=["fragile"]), last).failed == {}
    assert [step for step, _ in last.of("step")] == [1, 2, 3] * 3
