"""A disk that is full or read-only, a file where a directory should be: one error, and the run goes on with its bits.

The disk is full where the system lets no file grow beyond some bytes (``RLIMIT_FSIZE``); the error is ``EFBIG`` then
and not ``ENOSPC``, and it comes on the same ways.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mbf.report.writer
from mbf.continual import ContinualLora
from mbf.run import LogProgress, RunConfig, resume, run
from mbf.run.config import parse_config
from mbf.run.directory import RunDirectory, RunError, locked, read_json, write_json
from tests.run.children import CHILDREN, outcome
from tests.run.tiny import tiny_settings, write_stream

CONFIG = RunConfig.from_stream("s", methods=["slao"])
FACTS = {"versions": {}, "data": {}, "command": "mbf run s"}


def child(settings: dict[str, Any], root: Path, where: str | None, most: int, call: int, log: Path) -> None:
    """Run or resume; from call number ``call`` of ``where`` on, no file grows beyond ``most`` bytes."""
    import torch

    import mbf.run.cell as cell
    import mbf.run.train as training
    from mbf.run.ledger import Ledger

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    places: dict[str, tuple[Any, str]] = {
        "adapter": (training.RunTrainer, "_save_checkpoint"),
        "optimiser": (training.RunTrainer, "_save_optimizer_and_scheduler"),
        "seal": (training, "seal"),
        "learner": (ContinualLora, "save"),
        "ledger": (Ledger, "write"),
        "result": (cell.Cell, "_result"),
        "report": (mbf.report, "write_report"),
    }
    calls = 0
    if where is not None:
        owner, name = places[where]
        inner = getattr(owner, name)

        def limited(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            return inner(*arguments, **named)

        setattr(owner, name, limited)
    try:
        if (root / "run.json").exists():
            resume(root, LogProgress())
        else:
            run(parse_config(settings | {"output": root}), LogProgress())
        text = "ended"
    except Exception as error:
        text = f"{type(error).__name__} {getattr(error, 'filename', None)}: {getattr(error, 'strerror', error)}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write_text(text)


def go(settings: dict[str, Any], root: Path, where: str | None = None, most: int = 0, call: int = 1) -> str:
    log = root.with_suffix(".log")
    process = CHILDREN.Process(target=child, args=(settings, root, where, most, call, log))
    process.start()
    process.join()
    assert process.exitcode == 0
    return log.read_text()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_settings(write_stream(tmp_path_factory.mktemp("stream") / "tiny", train=8, test=2))


@pytest.fixture(scope="module")
def unbroken(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("unbroken") / "run"
    assert go(settings, root) == "ended"
    return outcome(root)


@pytest.mark.parametrize(
    ("where", "most", "call", "path"),
    [
        ("adapter", 100, 2, r"cells/slao-.*/train/task-02/checkpoint-2"),
        ("optimiser", 100, 1, r"cells/slao-.*/train/task-01/checkpoint-2"),
        ("learner", 100, 2, r"cells/slao-.*/state/task-02"),
        ("ledger", 10, 3, r"cells/slao-.*/progress.json"),
        ("seal", 100, 2, r"cells/slao-.*/train/task-02/checkpoint-2"),
        ("result", 100, 1, r"cells/slao-.*/result.json"),
        ("report", 5000, 1, "report"),
    ],
)
def test_a_full_disk_is_named_and_the_run_goes_on(settings, unbroken, tmp_path: Path, where, most, call, path) -> None:
    root = tmp_path / "run"
    found = go(settings, root, where, most, call)
    way = (
        r"(raise the limit on the size of a file \(ulimit -f\)|free some space or make it writable), then do it again"
        r"\. What was there before is whole"
    )
    assert re.fullmatch(rf"OSError {re.escape(str(root))}/{path}: .*; {way}", found), found
    assert not list(root.rglob(".*.new-*")) and not list(root.rglob(".*.old-*"))
    assert go(settings, root) == "ended"
    assert outcome(root) == unbroken


# -- a directory that cannot be written --------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[None]:
    """The superuser may write everywhere; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A directory that everybody can read and nobody but the superuser can change."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755 if os.geteuid() == 0 else 0o555)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def lock(root: Path) -> None:
    with locked(root):
        pass


@pytest.mark.parametrize(
    ("path", "act"),
    [
        ("run", lock),
        ("run/config.yaml", lambda path: RunDirectory.create(path.parent, CONFIG, FACTS)),
        ("cells/c", lambda path: RunDirectory(path.parent.parent, CONFIG, {}).cell("c")),
        ("x.json", lambda path: write_json(path, {})),
    ],
)
def test_a_read_only_directory_is_named(foreign: Path, path: str, act: Callable[[Path], Any]) -> None:
    way = re.escape("Permission denied; make it writable, then do it again. What was there before is whole")
    with nobody(), pytest.raises(PermissionError, match=way) as error:
        act(foreign / path)
    assert error.value.filename == str(foreign / path)
    assert not list(foreign.iterdir())


# -- a file in place of a directory, a directory in place of a file ----------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    RunDirectory.create(tmp_path / "r", CONFIG, FACTS)
    return tmp_path / "r"


def test_a_file_in_place_of_a_directory(root: Path) -> None:
    (root / "cells").mkdir()
    (root / "cells" / "c").write_text("mine")
    run = RunDirectory.open(root)
    with pytest.raises(OSError, match="move away the file that stands where a directory is wanted") as error:
        run.cell("c")
    assert error.value.filename == str(root / "cells" / "c")
    assert (root / "cells" / "c").read_text() == "mine"


def test_a_directory_in_place_of_a_file(root: Path) -> None:
    (root / "zero_shot.json").mkdir()
    with pytest.raises(RunError, match=r"zero_shot\.json: found a directory, wanted what mbf wrote there; restore it"):
        read_json(root / "zero_shot.json")
    with pytest.raises(OSError, match="move away the directory that stands where a file is wanted"):
        write_json(root / "zero_shot.json", {})
    assert [path.name for path in (root / "zero_shot.json").iterdir()] == []
    assert sorted(path.name for path in root.iterdir()) == ["config.yaml", "run.json", "zero_shot.json"]


# -- what killed processes left ----------------------------------------------------------------------------------------


def test_who_has_the_lock_sweeps(root: Path) -> None:
    """Half-written things go, what was about to be replaced comes back, all else stays."""
    deep = root / "cells" / "c" / "state"
    (deep / ".task-02.new-0a1b2c3d" / "x").mkdir(parents=True)
    (deep / ".task-01.old-0a1b2c3d").mkdir()
    (deep / ".task-01.old-0a1b2c3d" / "learner.json").write_text("whole")
    (root / ".run.json.new-00000000").write_text("{")
    (root / ".report.old-11111111").mkdir()
    (root / "report").mkdir()
    (root / ".run.json.new-mine").write_text("mine")
    with locked(root):
        pass
    assert (deep / "task-01" / "learner.json").read_text() == "whole"
    left = {str(path.relative_to(root)) for path in root.rglob("*")} - {".lock"}
    assert left == {
        *("run.json", "config.yaml", ".run.json.new-mine", "report", "cells", "cells/c", "cells/c/state"),
        *("cells/c/state/task-01", "cells/c/state/task-01/learner.json"),
    }
