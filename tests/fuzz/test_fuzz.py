"""The short form of the fuzzers: some hundred inputs a reader, the same every time."""

from __future__ import annotations

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
