"""The run's directory: who may begin there, go on there, and be there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mbf.run import resume, run
from mbf.run.config import RunConfig
from mbf.run.directory import RunDirectory, RunError, locked, read_json, write_json
from tests.run.test_engine import Recorder

CONFIG = RunConfig.from_stream("s", methods=[{"name": "slao", "label": "mine", "basis": "rsvd"}])
FACTS = {"versions": {}, "data": {}, "command": "mbf run s"}


def test_what_was_created_is_opened(tmp_path: Path) -> None:
    made = RunDirectory.create(tmp_path / "r", CONFIG, FACTS)
    found = RunDirectory.open(tmp_path / "r")
    assert found == made and found.config == CONFIG
    assert found.facts["sha256"] == CONFIG.sha256() and found.facts["command"] == "mbf run s"


def test_a_changed_configuration_is_refused_by_key(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, CONFIG, FACTS)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    written["train"]["lr"] = 0.5
    written["seeds"] = [0, 1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(RunError, match=r"configuration changed .*seeds: \[0\] -> \[0, 1\]; train.lr: 0.001 -> 0.5"):
        RunDirectory.open(tmp_path)


class Interrupted(Recorder):
    def step(self, *told) -> None:
        raise KeyboardInterrupt


def test_a_result_says_what_happened_to_bad_tasks(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one setting that may be changed in a run's ``config.yaml``."""
    monkeypatch.setattr("mbf.report.write_report", lambda results, directory: directory, raising=False)
    root = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(config(), Interrupted())
    written = yaml.safe_load((root / "config.yaml").read_text())
    (root / "config.yaml").write_text(yaml.safe_dump(written | {"on_bad_task": "skip"}))
    before = (root / "run.json").read_bytes()
    (result,) = resume(root, Recorder())
    (stored,) = (json.loads(file.read_text()) for file in root.rglob("result.json"))
    assert stored["config"] == result.config == written | {"on_bad_task": "skip"}
    assert (root / "run.json").read_bytes() == before and json.loads(before)["config"]["on_bad_task"] == "stop"


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run was started here"):
        RunDirectory.open(tmp_path)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "r", CONFIG, FACTS)
    with pytest.raises(RunError, match="holds a run already; mbf resume"):
        RunDirectory.create(tmp_path / "r", CONFIG, FACTS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"is not empty \(it has thesis.tex\)"):
        RunDirectory.create(tmp_path / "other", CONFIG, FACTS)
    with pytest.raises(RunError, match="is a file"):
        RunDirectory.create(tmp_path / "other" / "thesis.tex", CONFIG, FACTS)


def test_what_an_interrupted_start_left_is_no_hindrance(tmp_path: Path) -> None:
    for name in ("config.yaml", ".lock", ".config.yaml.new-0123abcd", ".run.json.new-0123abcd"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]
    (tmp_path / ".run.json.new-0123abcd").touch()
    RunDirectory.create(tmp_path, CONFIG, FACTS)
    assert RunDirectory.open(tmp_path).config == CONFIG


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The lock is the system's, so another open file is as good as another process, and a dead one holds nothing."""
    code = f"import filelock, os; filelock.FileLock({str(tmp_path / '.lock')!r}).acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])
    with locked(tmp_path), pytest.raises(RunError, match="another process is running here"), locked(tmp_path):
        pass
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    way = "move away the directory that stands where a file is wanted, then do it again"
    with pytest.raises(OSError, match=way) as error, locked(tmp_path / "other"):
        pass
    assert error.value.filename == str(tmp_path / "other")


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    assert read_json(tmp_path / "x.json") is None
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_tidying_keeps_what_is_needed(tmp_path: Path) -> None:
    cell = RunDirectory(tmp_path, CONFIG, {}).cell("c")
    for number in (1, 2, 3):
        cell.state(number).mkdir(parents=True)
        cell.train(number).mkdir(parents=True)
    (cell.state(1).parent / ".task-02.new-1").mkdir()
    cell.tidy(2)
    left = sorted(str(path.relative_to(cell.root)) for path in cell.root.glob("*/*"))
    assert left == ["state/task-02", "train/task-03"]
