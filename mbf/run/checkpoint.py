"""Checkpoints of a task in training: which are whole, and what they hold beside what the Trainer saves.

A Trainer checkpoint is several files, and a process may be killed between any two. So when the Trainer has written
one, ``seal`` adds the method's state and, last and in one step, a manifest with the sha256 of every file; a checkpoint
without a fitting manifest never was.

The Trainer reads ``optimizer.pt``, ``scheduler.pt`` and ``rng_state*.pth`` by ``torch.load``, always with
``weights_only=True``, which makes tensors and plain containers and runs no code of the file. The manifest protects
against damage, not against somebody who can write to the directory and compute a sha256; ``weights_only`` does.
``training_args.bin``, a whole pickle that nothing reads back, is removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt
from safetensors.torch import save_file
from torch import Tensor

from mbf.continual.atomic import sha256_of, sync, sync_tree, writing
from mbf.continual.metrics import MALFORMED
from mbf.peft.stored import read_tensors
from mbf.run.directory import RunError, read_json, write_json

MANIFEST = "manifest.json"
METHOD = "method.safetensors"
_ARGUMENTS = "training_args.bin"


class Manifest(BaseModel):
    """``manifest.json``: the optimiser step, the seconds of training behind it, and sha256 by relative path."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    step: NonNegativeInt
    seconds: NonNegativeFloat
    sha256: dict[str, str]

    @classmethod
    def parse(cls, data: Any) -> Manifest | None:
        """The manifest that ``data`` is; None where it is none."""
        try:
            return cls.model_validate(data)
        except MALFORMED:
            return None


@dataclass(frozen=True)
class TaskCheckpoint:
    """A whole checkpoint: where it is, its optimiser step, and the seconds of training behind it."""

    path: Path
    step: int
    seconds: float

    def method_state(self) -> dict[str, Tensor]:
        """What the method kept when it was written.

        Raises:
            ValueError: the file cannot be read.
        """
        return read_tensors(self.path / METHOD)


def seal(path: Path, step: int, seconds: float, method_state: Mapping[str, Tensor]) -> None:
    """Complete the Trainer's checkpoint at ``path``; it takes the place of those beside it.

    Raises:
        OSError: it cannot be written; names ``path`` and the way out, and those beside it are whole.
    """
    with writing(path):
        (path / _ARGUMENTS).unlink(missing_ok=True)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method_state.items()}
        save_file(state, path / METHOD)
        sync_tree(path)
    write_json(path / MANIFEST, Manifest(step=step, seconds=seconds, sha256=_hashes(path)).model_dump())
    with writing(path):
        sync(path.parent)  # the older ones are removed only when this one is on the disk, and so is its name
    for older in path.parent.glob("checkpoint-*"):
        if older != path:
            shutil.rmtree(older)


def newest(directory: Path) -> TaskCheckpoint | None:
    """The newest whole checkpoint in ``directory``; those that are not whole are removed."""
    found = None
    for path in directory.glob("checkpoint-*"):
        manifest = _manifest(path)
        if manifest is None or manifest.sha256 != _hashes(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif found is None or manifest.step > found.step:
            found = TaskCheckpoint(path, manifest.step, manifest.seconds)
    return found


def _manifest(path: Path) -> Manifest | None:
    try:
        return Manifest.parse(read_json(path / MANIFEST))
    except RunError:
        return None


def _hashes(path: Path) -> dict[str, str]:
    """sha256 by relative path of every file but the manifest and what an interrupted write of it left."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and MANIFEST not in file.name)
    return {str(file.relative_to(path)): sha256_of(file) for file in files}
