"""Inputs for readers of JSON and safetensors: bytes as they come, or a good document with parts of it exchanged."""

from __future__ import annotations

import copy
import json
from typing import Any

_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 70, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "a", "\0", "../../etc/passwd", "/", "é\ud800", "9" * 50, "LORA", "IA3", "slao", "none", "(", "a" * 300),
    *([], [0], ["a"], [[]], [None] * 3, {}, {"a": 1}, {"": None}, {"../x": "y"}, {"a": {"b": {}}}),
]


def document(data: bytes, seed: Any) -> Any:
    """What a reader gets to see after parsing: of a first byte below 128 the rest of ``data`` as JSON, else ``seed``
    with as many changes as ``data`` has triples of bytes (where, which change, to what).

    Raises:
        ValueError, RecursionError: the rest is no JSON.
    """
    if not data or data[0] < 128:
        return json.loads(data[1:])
    root = [copy.deepcopy(seed)]
    for at in range(1, len(data) - 2, 3):
        _change(root, data[at], data[at + 1], data[at + 2])
    return root[0]


def tensors_file(data: bytes, seed: bytes) -> bytes:
    """A safetensors file: of a first byte below 128 the rest of ``data``, else ``seed`` with a header changed as
    ``document`` changes one, and of the length that its first eight bytes say."""
    if not data or data[0] < 128:
        return data[1:]
    size = int.from_bytes(seed[:8], "little")
    text = json.dumps(document(data, json.loads(seed[8 : 8 + size]))).encode()
    payload = bytearray(seed[8 + size :])
    if len(data) > 7 and data[1] & 1:  # one value in some tensor
        payload[data[2] % len(payload)] = data[3]
    return len(text).to_bytes(8, "little") + text + payload


def _change(root: list[Any], where: int, how: int, value: int) -> None:
    places = _places(root)
    holder, key = places[where % len(places)]
    new = copy.deepcopy(_VALUES[value % len(_VALUES)])
    match how % 6:
        case 0 if holder is not root:
            del holder[key]
        case 1 if isinstance(holder[key], dict):
            holder[key][str(new)[:50]] = copy.deepcopy(_VALUES[how % len(_VALUES)])
        case 2 if isinstance(holder[key], list):
            holder[key].append(new)
        case 3 if isinstance(holder[key], str):
            holder[key] = holder[key][: value % 9] + chr(value)
        case 4 if isinstance(holder[key], int):
            holder[key] = holder[key] + value % 16 - 8
        case 5 if isinstance(holder, dict):
            at = where % (len(key) + 1)
            holder[key[:at] + ".ABn012"[value % 7] + key[at + value % 2 :]] = holder.pop(key)
        case _:
            holder[key] = new


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """(holder, key or index) of every value."""
    found, todo = [], [root]
    while todo:
        holder: Any = todo.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                todo.append(holder[key])
    return found
