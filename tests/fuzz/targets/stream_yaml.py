"""The YAML that describes a stream."""

from __future__ import annotations

from contextlib import suppress

from mbf.streams.spec import StreamSpec, read_spec
from mbf.streams.task import StreamError

from ._files import written

WORDS = [b"&a ", b"*a", b"<<: *a", b"- ", b"? ", b": ", b"!!python/object/apply:os.system ", b"!!binary ", b"---\n"]
WORDS += [b"[" * 60, b"0x", b"2026-13-45", b"tasks:", b"|\n", b"{", b"%YAML 9.9\n", b".nan"]


def seeds() -> list[bytes]:
    return [
        b"name: mine\ntasks:\n  - {name: a, path: a, labels: {0: no, 1: yes}}\n  - {name: b, hub: x/y, text: [p, q]}\n"
        b"orders: [[a, b], [b, a]]\n",
        b"tasks: [&t {name: a, path: /data, splits: {train: ../x.jsonl}}]\norders: {3: [a]}\n",
        b"defaults: &d {noun: a}\nmore: [&e {<<: *d, noun: b}]\ntasks: [{<<: *e, name: a, path: a}]\n",
        b"defaults: &d {noun: topic}\ntasks:\n- <<: *d\n  name: a\n  path: a\n  kind: generation\n",
    ]


def one(data: bytes) -> None:
    with suppress(StreamError):
        assert isinstance(read_spec(written(data, "stream.yaml")), StreamSpec)
