"""A learner's header and its state file, with sha256 that fit, as ``ContinualLora.load`` reads them.

The first byte says which: even, the header alone (``_json.document``); odd, the bytes of ``learner.safetensors``, which
are written to a directory and read from there (``_json.tensors_file``), with and without a description in the header.
What is accepted must be what was asked for, and what is refused must say where.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from mbf.continual.atomic import sha256_of
from mbf.continual.header import HEADER, PARTS, STATE, CheckpointError, Header, check_state, read_header
from mbf.methods._state import Factors, gather, spread
from mbf.peft.stored import read_tensors
from tests.fuzz.targets._files import written
from tests.fuzz.targets._json import document, tensors_file

PATH = Path("/learner") / HEADER
GOOD = {
    "format": "mbf-learner",
    "version": 1,
    "method": "slao",
    "options": {"basis": "qr", "schedule": "paper"},
    "callable_options": [],
    "adapter": "default",
    "history": [{"index": 1, "name": "one", "steps": 3, "seconds": 0.5}],
    "layers": {"model.q_proj": [2, 4, 3, 2.0]},
    "state": {"ft.A.0": ["float32", 2, 4], "ft.B.0": ["float32", 3, 2]},
    "sha256": dict.fromkeys(PARTS, "0" * 64),
}


def state() -> bytes:
    factors = Factors([torch.ones(2, 4)], [torch.zeros(3, 2)])
    return save(spread({"ft": factors, "n": 3, "w": [torch.ones(2), torch.ones(1)], "t": torch.ones(2).half()}))


def seeds() -> list[bytes]:
    return [
        b"\x00" + json.dumps(GOOD).encode(),
        b"\x80",
        b"\x80abcdef",
        b"\x01\x00" + state(),
        b"\x03\x00" + state(),
        b"\x03\x80",
        b"\x03\x80abcdef",
    ]


def one(data: bytes) -> None:
    if not data:
        return
    if data[0] % 2:
        _state_file(data)
    else:
        _header(data)


def _header(data: bytes) -> None:
    try:
        parsed = document(data, GOOD)
    except (ValueError, RecursionError):
        return
    try:
        header = Header.parse(parsed, PATH)
    except CheckpointError as error:
        assert str(PATH) in str(error)
        return
    assert sorted(header.sha256) == sorted(PARTS)
    assert all(len(layer) == 4 and min(layer[:3]) > 0 for layer in header.layers.values())
    assert [record.index for record in header.history] == list(range(1, len(header.history) + 1))
    assert not set("/.\\") & set(header.adapter)


@cache
def _root() -> Path:
    """A checkpoint whose state file is written anew for every input."""
    for name in PARTS:
        path = written(b"", f"learner/{name}")
    return path.parent


def _state_file(data: bytes) -> None:
    root = _root()
    written(tensors_file(data[1:], state()), f"learner/{STATE}")
    header = {**GOOD, "sha256": {name: sha256_of(root / name) for name in PARTS}}
    if data[0] & 2:
        del header["state"]
    (root / HEADER).write_text(json.dumps(header))
    checked = read_header(root)
    try:
        tensors = read_tensors(root / STATE)
        check_state(tensors, checked, root / STATE)
    except ValueError as error:
        assert str(root / STATE) in str(error)
        return
    try:
        kept = gather(tensors)
    except ValueError as error:
        assert str(error)
        return
    again = spread(kept)
    assert set(again) == set(tensors)
    assert all(torch.isfinite(t).all() for t in again.values() if t.is_floating_point())
