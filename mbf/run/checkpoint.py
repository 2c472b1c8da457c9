"""Checkpoints of a task in training: which are whole, and what they hold beside what the Trainer saves.

A Trainer checkpoint is several files, and a process may be killed between any two. So when the Trainer has written
one, ``seal`` adds the method's state and, last and in one step, a manifest with the sha256 of every file; a checkpoint
without a fitting manifest never was.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mbf.continual.atomic import sha256_of
from mbf.run.directory import read_json, write_json

MANIFEST = "manifest.json"
METHOD = "method.safetensors"


@dataclass(frozen=True)
class TaskCheckpoint:
    """A whole checkpoint: where it is, its optimiser step, and the seconds of training behind it."""

    path: Path
    step: int
    seconds: float

    def method_state(self) -> dict[str, Tensor]:
        """What the method kept when it was written."""
        return load_file(self.path / METHOD)


def seal(path: Path, step: int, seconds: float, method_state: Mapping[str, Tensor]) -> None:
    """Complete the Trainer's checkpoint at ``path``; it takes the place of those beside it."""
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method_state.items()}, path / METHOD
    )
    write_json(path / MANIFEST, {"step": step, "seconds": seconds, "sha256": _hashes(path)})
    for older in path.parent.glob("checkpoint-*"):
        if older != path:
            shutil.rmtree(older)


def newest(directory: Path) -> TaskCheckpoint | None:
    """The newest whole checkpoint in ``directory``; those that are not whole are removed."""
    found = None
    for path in directory.glob("checkpoint-*"):
        manifest = read_json(path / MANIFEST)
        if manifest is None or manifest["sha256"] != _hashes(path):
            shutil.rmtree(path)
        elif found is None or manifest["step"] > found.step:
            found = TaskCheckpoint(path, manifest["step"], manifest["seconds"])
    return found


def _hashes(path: Path) -> dict[str, str]:
    """sha256 by relative path of every file but the manifest and what an interrupted write of it left."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and MANIFEST not in file.name)
    return {str(file.relative_to(path)): sha256_of(file) for file in files}
