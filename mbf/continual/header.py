"""``learner.json``: what a checkpoint says of itself, and of its other parts, checked by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from mbf.continual.atomic import sha256_of
from mbf.continual.metrics import MALFORMED, first_error
from mbf.methods import available
from mbf.peft.stored import CONFIG
from mbf.peft.stored import WEIGHTS as ADAPTER

FORMAT = "mbf-learner"
VERSION = 1
NAME = r"^[^./\\\s]+$"  # of an adapter
HEADER = "learner.json"
STATE = "learner.safetensors"
CARD = "README.md"  # PEFT's, or the user's
PARTS = (CONFIG, ADAPTER, STATE)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another format, or of another model."""


class _Record(BaseModel):
    """A ``TaskRecord`` as it is stored."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    index: PositiveInt
    name: str
    steps: NonNegativeInt
    seconds: NonNegativeFloat


class Header(BaseModel):
    """``learner.json``.

    Attributes:
        layers: [r, d_in, d_out, s] by name.
        state: [dtype, *shape] of the method's tensors by name; None in a checkpoint that is older than this.
        sha256: of the other parts by name.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    format: Literal["mbf-learner"]
    version: int
    method: str
    options: dict[str, Any]
    callable_options: list[str]
    adapter: str = Field(pattern=NAME)
    history: list[_Record]
    layers: dict[str, list[int | float]] = Field(min_length=1)
    state: dict[str, list[str | int]] | None = None
    sha256: dict[str, str]

    @classmethod
    def parse(cls, data: Any, path: Path) -> Header:
        """The header that ``data``, of the file ``path``, is.

        Raises:
            CheckpointError: it is none, or of another version, or of a method that is not known here.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a learner's header: format must be {FORMAT!r}; name what save wrote")
        if data.get("version") != VERSION:
            raise CheckpointError(f"{path} has version {data.get('version')!r}, this mbf reads {VERSION}; update mbf")
        try:
            header = cls.model_validate(data)
        except MALFORMED as error:
            raise CheckpointError(f"{path} is damaged ({first_error(error)}); restore it from a copy") from None
        if header.method not in available():
            raise CheckpointError(
                f"{path}: method {header.method!r} is not registered here; mbf.methods.register it first"
            )
        if sorted(header.sha256) != sorted(PARTS):
            raise CheckpointError(
                f"{path}: sha256 is of {', '.join(sorted(header.sha256)) or 'nothing'}, wanted that of "
                f"{', '.join(sorted(PARTS))}; restore it from a copy"
            )
        for name, layer in header.layers.items():
            if len(layer) != 4 or not all(isinstance(size, int) and size > 0 for size in layer[:3]):
                raise CheckpointError(
                    f"{path}: layer {name} is {layer}, wanted [r, d_in, d_out, scale]; restore it from a copy"
                )
        if [record.index for record in header.history] != list(range(1, len(header.history) + 1)):
            raise CheckpointError(f"{path}: the tasks of the history are not numbered from 1; restore it from a copy")
        return header


def read_header(root: Path) -> Header:
    """The checked header of a checkpoint, whose parts are those that it was written with.

    Raises:
        CheckpointError: no checkpoint, another format or a newer version, or a part whose sha256 differs.
    """
    path = root / HEADER
    if not path.is_file():
        raise CheckpointError(
            f"{root} holds no learner ({HEADER} is missing); pass a directory that learner.save wrote"
        )
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None
    header = Header.parse(data, path)
    for name, digest in header.sha256.items():
        if not (root / name).is_file():
            raise CheckpointError(f"{root}: {name} is missing; restore it from a copy")
        if (found := sha256_of(root / name)) != digest:
            raise CheckpointError(
                f"{root / name} is damaged: sha256 is {found[:12]}…, the header says {digest[:12]}…; restore it from "
                "a copy"
            )
    return header


def check_state(state: Mapping[str, Tensor], header: Header, file: Path) -> None:
    """Raise CheckpointError unless ``state``, of ``file``, has the names, dtypes and shapes that the header says."""
    if header.state is None:
        return
    found = described(state)
    if odd := sorted(name for name in found.keys() | header.state.keys() if found.get(name) != header.state.get(name)):
        raise CheckpointError(
            f"{file}: {odd[0]} is {found.get(odd[0], 'missing')}, the header says "
            f"{header.state.get(odd[0], 'nothing')}; restore it from a copy"
        )


def described(state: Mapping[str, Tensor]) -> dict[str, list[str | int]]:
    """[dtype, *shape] of each tensor by name, as ``Header.state`` has them."""
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in state.items()}
