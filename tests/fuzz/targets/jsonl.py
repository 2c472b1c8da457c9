"""Rows of a stream, an object a line."""

from __future__ import annotations

from . import _rows

WORDS = [b'{"text": ', b'"label": ', b"null", b"NaN", b"Infinity", b"1e999", b"[", b"{", b'"\\ud800"', b"[" * 3000]


def seeds() -> list[bytes]:
    return [
        b'{"text": "a", "label": ["x", null]}\n',
        b'{"text": "a", "label": "yes"}\n{"text": "b", "label": "no"}\n',
        '\ufeff{"text": "Åse", "label": 0}\r\n\r\n{"label": [1, 2.5, true], "text": 7}'.encode(),
        b'{"text": "a", "label": null}\n{"text": {"x": [1]}, "label": []}\n{}\n',
    ]


def one(data: bytes) -> None:
    _rows.read(data, "rows.jsonl")
