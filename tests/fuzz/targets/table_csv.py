"""Rows of a stream with commas between the values."""

from __future__ import annotations

from . import _rows

WORDS = [b",", b'""', b'"\n', b"\r", b"text,label\n", b"text,text\n"]


def seeds() -> list[bytes]:
    return [
        b"text,label\na,yes\nb,no\n",
        '\ufefftext,label\r\n"a, ""b""\r\nc",0\r\n,\r\n'.encode(),
        b"label\n1\n2\n",
    ]


def one(data: bytes) -> None:
    _rows.read(data, "rows.csv")
