"""The short form of the fuzzers: some hundred inputs a reader, the same every time."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.harness import inputs, names, target


@pytest.mark.parametrize("name", names())
def test_a_reader_refuses_in_its_own_words(name: str) -> None:
    module = target(name)
    for data in inputs(module, 1000, seed=1):
        module.one(data)


def test_inputs_are_the_same_for_a_seed() -> None:
    module = target(names()[0])
    assert list(inputs(module, 200, 3)) == list(inputs(module, 200, 3)) != list(inputs(module, 200, 4))


def test_a_find_is_counted_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = ModuleType("planted")

    def one(data: bytes) -> None:
        if data != b"good":
            raise KeyError("planted")

    vars(planted).update(seeds=lambda: [b"good"], one=one)
    monkeypatch.setattr("tests.fuzz.__main__.target", lambda name: planted)
    assert fuzz("planted", 100, 0, tmp_path, most=3) == 3
    kept = [file.read_bytes() for file in tmp_path.iterdir()]
    assert len(kept) == 3 and b"good" not in kept
    assert "KeyError: 'planted'" in capsys.readouterr().out


def test_an_input_that_takes_too_long_is_a_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = ModuleType("planted")

    def one(data: bytes) -> None:
        with suppress(Exception):
            while data != b"good":
                pass

    vars(planted).update(seeds=lambda: [b"good", b"slow"], one=one)
    monkeypatch.setattr("tests.fuzz.__main__.target", lambda name: planted)
    before = time.monotonic()
    assert fuzz("planted", 2, 0, tmp_path, seconds=0.05) == 1
    assert time.monotonic() - before < 30
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"slow"]
    assert "computed for more than 0.05 s" in capsys.readouterr().out
    until = time.process_time() + 0.1
    while time.process_time() < until:  # no alarm is left
        pass


GUIDED = """
import sys
from types import ModuleType
from tests.fuzz import guided
planted = ModuleType("planted")
def one(data):
    if data[:1] == b"b" and len(data) > 2:
        raise KeyError("planted")
vars(planted).update(seeds=lambda: [b"good", b"b"], one=one)
if "--planted" in sys.argv:
    sys.argv.remove("--planted")
    guided.target = lambda name: planted
guided.main()
"""


@pytest.mark.parametrize(("planted", "finds"), [([], 0), (["--planted"], 1)])
def test_guided_by_branches(planted: list[str], finds: int, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="no Atheris for this platform; the inputs of the harness above need none")
    command = [sys.executable, "-c", GUIDED, "jsonl", "--inputs", "200000" if planted else "500", *planted]
    done = subprocess.run([*command, "--corpus", tmp_path], capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(finds), done.stderr[-2000:]
    kept = [path.read_bytes() for path in tmp_path.glob("jsonl-crash-*")]
    assert len(kept) == finds and all(data[:1] == b"b" for data in kept)
    assert ("KeyError: 'planted'" in done.stdout + done.stderr) == bool(finds)
    assert planted or len(list((tmp_path / "jsonl").iterdir())) > len(target("jsonl").seeds())
