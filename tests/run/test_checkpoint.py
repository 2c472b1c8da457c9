"""Only whole checkpoints count."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from mbf.run.checkpoint import MANIFEST, METHOD, newest, seal


def checkpoint(directory: Path, step: int) -> Path:
    """A whole one, named as the Trainer names it."""
    path = directory / f"checkpoint-{step}"
    (path / "deep").mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(bytes([step] * 100))
    (path / "deep" / "x").write_bytes(b"x")
    seal(path, step, 1.5 * step, {"ft.A.0": torch.full((2, 3), float(step)).T})
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Whole checkpoints of steps 2, 10 and 9, as kills before the removal of the older ones leave them."""
    (tmp_path / "train").mkdir()
    for step in (2, 10, 9):
        checkpoint(tmp_path / str(step), step).rename(tmp_path / "train" / f"checkpoint-{step}")
    return tmp_path / "train"


def test_a_new_one_takes_the_place_of_the_others(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_the_others_go_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 9)
    done: list[tuple[str, str]] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def note(what: str, path: str | os.PathLike[str]) -> None:
        done.append((what, os.path.relpath(path, tmp_path)))

    def synced(descriptor: int) -> None:
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(old, new) -> None:
        note("replace", new)
        replace(old, new)

    def removed(path, *rest, **named) -> None:
        note("remove", path)
        rmtree(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "replace", replaced)
        patch.setattr(shutil, "rmtree", removed)
        checkpoint(tmp_path, 10)
    new = "checkpoint-10"
    manifest = done.index(("replace", f"{new}/{MANIFEST}"))
    content = {name for what, name in done[: manifest - 1] if what == "sync"}
    assert content == {new, *(f"{new}/{name}" for name in ("deep", "deep/x", "optimizer.pt", METHOD))}
    (what, torso), *after = done[manifest - 1], *done[manifest + 1 :]
    assert what == "sync" and torso.startswith(f"{new}/.{MANIFEST}.new-")
    assert after == [("sync", new), ("sync", "."), ("remove", "checkpoint-9")]


def test_the_newest_by_step(train: Path) -> None:
    found = newest(train)
    assert found is not None
    assert (found.path.name, found.step, found.seconds) == ("checkpoint-10", 10, 15.0)
    assert torch.equal(found.method_state()["ft.A.0"], torch.full((3, 2), 10.0))


def missing_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def torn_manifest_beside(path: Path) -> None:
    (path / MANIFEST).rename(path / f".{MANIFEST}.new-1")


def truncated(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(bytes([10] * 99))


def flipped(path: Path) -> None:
    (path / METHOD).write_bytes((path / METHOD).read_bytes()[:-1] + b"!")


def half_removed(path: Path) -> None:
    (path / "deep" / "x").unlink()


def added(path: Path) -> None:
    (path / "scheduler.pt").write_bytes(b"")


@pytest.mark.parametrize("spoil", [missing_manifest, torn_manifest_beside, truncated, flipped, half_removed, added])
def test_one_that_is_not_whole_is_removed(train: Path, spoil) -> None:
    spoil(train / "checkpoint-10")
    found = newest(train)
    assert found is not None and found.step == 9
    assert sorted(path.name for path in train.iterdir()) == ["checkpoint-2", "checkpoint-9"]


def test_none(tmp_path: Path, train: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    for path in train.iterdir():
        missing_manifest(path) if path.name != "checkpoint-2" else shutil.rmtree(path)
    assert newest(train) is None and not list(train.iterdir())
