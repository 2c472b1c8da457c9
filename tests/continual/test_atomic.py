"""Whole or not at all: files, directories, sets of files; on full and read-only disks, too."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mbf.continual import ContinualLora, merge_adapters
from mbf.continual.atomic import recover_directory, sweep, whole_directory, whole_files, write_file, writing
from tests.continual.tiny import batches, peft_model, train

WHOLE = "then do it again. What was there before is whole"


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")}


def test_directories_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "d"
    with whole_directory(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(RuntimeError), whole_directory(target) as new:
        (new / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["d"]
    with whole_directory(target) as new:
        (new / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]
    shutil.move(target, tmp_path / ".d.old-1")
    recover_directory(target)
    assert (target / "b").read_text() == "3"
    write_file(tmp_path / "x" / "f", "ü")
    assert (tmp_path / "x" / "f").read_text(encoding="utf-8") == "ü" and len(list((tmp_path / "x").iterdir())) == 1


def test_an_old_one_left_behind_goes_with_the_next_replacement(tmp_path: Path) -> None:
    """Stopped after both renames; and what is recovered is whole, however many there were."""
    for text in "12":
        with whole_directory(tmp_path / "d") as new:
            (new / "a").write_text(text)
        (tmp_path / ".d.old-0a").mkdir(exist_ok=True)
    with whole_directory(tmp_path / "d") as new:
        (new / "a").write_text("3")
    assert tree(tmp_path) == {"d": None, "d/a": b"3"}


def test_a_replacement_that_cannot_end_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error; free some space"), whole_directory(tmp_path / "d") as new:
        (new / "a").write_text("2")
    assert tree(tmp_path) == {"d": None, "d/a": b"1"}


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_reader_that_puts_the_old_one_back_does_not_stop_a_replacement(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``load`` of another process, between the two renames."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    rename, left = Path.rename, times

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal left
        if ".new-" in self.name and left:
            left -= 1
            recover_directory(tmp_path / "d")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with suppress(OSError) if times == 3 else nullcontext(), whole_directory(tmp_path / "d") as new:
        (new / "a").write_text("2")
    assert tree(tmp_path) == {"d": None, "d/a": b"1" if times == 3 else b"2"}


def test_two_readers_recover_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".d.old-0a").mkdir()
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        rename(self, target)  # the other one was faster
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    recover_directory(tmp_path / "d")
    assert tree(tmp_path) == {"d": None}


@pytest.mark.parametrize("there", [False, True])
def test_what_is_replaced_goes_when_the_new_one_is_on_the_disk(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power the disk has a whole one: files first, then their directory, the renames, the place of
    them, and only then is anything removed."""
    done: list[tuple[str, str]] = []
    opened: dict[int, str] = {}

    def watched(module: Any, name: str, of: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            if name == "open":
                opened[found] = Path(args[0]).name.split("-")[0]
            else:
                done.append((name, of(*args)))
            return found

        monkeypatch.setattr(module, name, call)

    target = tmp_path / "d"
    if there:
        target.mkdir()
        (target / "a").write_text("1")
    watched(os, "open", lambda path, *_: "")
    watched(os, "fsync", lambda number: opened.pop(number, "a file"))
    watched(Path, "rename", lambda path, to: f"{path.name.split('-')[0]} {Path(to).name.split('-')[0]}")
    watched(shutil, "rmtree", lambda path, **_: path.name.split("-")[0])
    with whole_directory(target) as new:
        (new / "a").write_text("2")
    aside, removed = [("rename", "d .d.old")] * there, [("rmtree", ".d.old")] * there
    assert done == [
        *(("fsync", "a"), ("fsync", ".d.new"), *aside, ("rename", ".d.new d")),
        *(("fsync", tmp_path.name.split("-")[0]), *removed),
    ]
    done.clear()
    opened.clear()
    write_file(tmp_path / "f", "x")
    assert done[-1] == ("fsync", tmp_path.name.split("-")[0]) and done[0] == ("fsync", "a file")


def test_through_a_link_and_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for make in (whole_directory(tmp_path / "link"), whole_files(tmp_path / "link", "b")):
        with make as new:
            (new / "b").write_text("new")
        assert (tmp_path / "link").is_symlink() and tree(tmp_path / "real") == {"b": b"new"}
    monkeypatch.chdir(tmp_path / "real")
    with whole_files(".", "c") as new:
        (new / "c").write_text("c")
    assert tree(tmp_path / "real") == {"b": b"new", "c": b"c"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("there", [False, True])
def test_a_set_of_files_comes_together_and_others_stay(there: bool, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "a").write_text("old")
        (out / "mine").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), whole_files(out, "a") as new:
        (new / "a").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == before
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with whole_files(out, "a") as new:
        for name in ("a", "b", "c"):
            (new / name).write_text("new")
    assert order == (["b", "c", "a"] if there else [])
    assert tree(out) == {"a": b"new", "b": b"new", "c": b"new"} | ({"mine": b"mine"} if there else {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sweeping_leaves_what_is_named_otherwise(tmp_path: Path) -> None:
    for name in (".x.new-12ab", ".x.old-12ab", "x.new-12ab", ".x.new-", ".x.new-12ab.txt", ".new-12ab"):
        (tmp_path / name).write_text(name)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".new-12ab",
        ".x.new-",
        ".x.new-12ab.txt",
        "x",
        "x.new-12ab",
    ]
    assert (tmp_path / "x").read_text() == ".x.old-12ab"


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("no more of that"), ValueError("x"), KeyError("y")):
        with pytest.raises(type(error), match=re.escape(str(error))), writing(tmp_path):
            raise error


# -- a full disk -------------------------------------------------------------------------------------------------------


def limited(path: Path) -> None:
    """In a process of its own: no file grows beyond 100 bytes. Prints one line an attempt."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    tensors = {"x": torch.ones(1000)}
    attempts: list[Callable[[], object]] = [
        lambda: write_file(path / "file", "x" * 1000),
        lambda: fill(whole_directory(path / "directory"), lambda new: save_file(tensors, new / "t")),
        lambda: fill(whole_directory(path / "directory"), lambda new: torch.save(tensors, new / "t")),
        lambda: fill(whole_files(path / "files", "t"), lambda new: (new / "t").write_text("x" * 1000)),
    ]
    for attempt in attempts:
        try:
            attempt()
        except OSError as error:
            print(f"{error.filename}: {error.strerror}")


def fill(context, write: Callable[[Path], object]) -> None:
    with context as new:
        write(new)


def test_a_full_disk_is_one_error_and_what_was_there_is_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for name in ("directory", "files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t").write_text("old")
    before = tree(tmp_path)
    code = (
        f"from pathlib import Path; from tests.continual.test_atomic import limited; limited(Path({str(tmp_path)!r}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    large = f"File too large; raise the limit on the size of a file (ulimit -f), {WHOLE}"
    assert said == [
        f"{tmp_path}/file: {large}",
        f"{tmp_path}/directory: {large}",
        f"{tmp_path}/directory: the file could not be written; free some space or make it writable, {WHOLE}",
        f"{tmp_path}/files: {large}",
    ]
    assert tree(tmp_path) == before


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KB, where the system lets the tests mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs; the tests under a limit on file sizes run everywhere")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(small: Path, tmp_path: Path) -> None:
    """Learner, export and merge: the older ones load as they were, and with room again the new ones come."""
    model = peft_model()
    learner = ContinualLora(model)
    with learner.task("one", batches(1)):
        train(model, 1, steps=1)
    attempts: list[tuple[str, Callable[[Path], object]]] = [
        ("learner", learner.save),
        ("adapter", learner.export),
        ("merged", lambda out: merge_adapters([small / "adapter"], out)),
    ]
    for name, write in attempts:
        write(small / name)
    with learner.task("two", batches(2)):
        train(model, 2, steps=1)
    before = tree(small)
    with (small / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(bytes(4096)):
            pass
    for name, write in attempts:
        with pytest.raises(OSError, match=re.escape(f"No space left on device; free some space, {WHOLE}")) as error:
            write(small / name)
        assert error.value.filename == str(small / name) and error.value.errno == errno.ENOSPC
    (small / "filler").unlink()
    assert tree(small) == before
    assert ContinualLora.load(peft_model(), small / "learner").task_index == 1
    for name, write in attempts:
        write(small / name)
    assert ContinualLora.load(peft_model(), small / "learner").task_index == 2
    assert all(tree(small)[file] != before[file] for file in before if file.endswith(".safetensors"))
