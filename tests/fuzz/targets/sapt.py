"""A task in the SAPT layout: the same bytes as its splits and as its list of labels."""

from __future__ import annotations

from contextlib import suppress

from mbf.streams.sapt import read_sapt
from mbf.streams.spec import TaskSpec
from mbf.streams.task import StreamError

from ._files import written

WORDS = [b'"Definition": ', b'"Instances": ', b'"input": ', b'"output": ', b"null", b"[" * 3000, b'"\\ud800"', b"[]"]


def seeds() -> list[bytes]:
    return [
        b'{"Definition": ["Name it."], "Instances": [{"input": "a", "output": "yes"}, {"input": 1, "output": [2]}]}',
        b'{"Instances": []}',
        b'["yes", "no", 3]',
    ]


def one(data: bytes) -> None:
    for split in ("train", "test"):
        written(data, f"sapt/{split}.json")
    folder = written(data if data[:1] == b"[" else b"[]", "sapt/labels.json").parent
    with suppress(StreamError):
        content = read_sapt(TaskSpec(name="t", path=folder))
        for examples in content.splits.values():
            for example in examples:
                assert example.answers
                "\n".join((example.text, example.definition, *example.answers)).encode()
