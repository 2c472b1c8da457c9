"""What a package index answers, in JSON and in HTML."""

from __future__ import annotations

import json
from contextlib import suppress

import requests

from mbf.streams.fetch import files_of

WORDS = [
    b"file:///etc/passwd",
    b"javascript:",
    b"//host",
    b"http://[",
    b"<a href=",
    b"#sha256=",
    b'"files"',
    b"[" * 3000,
]


def seeds() -> list[bytes]:
    files = [{"filename": "a-1.whl", "url": "../a-1.whl", "hashes": {"sha256": "0" * 64}}]
    page = b'<!doctype html><a href="../files/a-1.whl#sha256=00">a</a><a>b</a><a href="https://host/b.tar.gz">b</a>'
    return [json.dumps({"files": files}).encode(), page]


def one(data: bytes) -> None:
    for kind in ("application/vnd.pypi.simple.v1+json", "text/html"):
        with suppress(requests.RequestException):
            for name, address in files_of(data, kind, "https://host/simple/a/").items():
                assert isinstance(name, str) and isinstance(address, str)
