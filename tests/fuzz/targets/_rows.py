"""What holds of every table that a reader takes: columns are text, values come out as text that can be written."""

from __future__ import annotations

from contextlib import suppress

from mbf.streams.columns import examples_of
from mbf.streams.spec import TaskSpec
from mbf.streams.tables import Table, read_table
from mbf.streams.task import StreamError

from ._files import written

SPEC = TaskSpec.model_validate({"name": "t", "path": ".", "labels": {0: "no", "yes": "yes"}})


def read(data: bytes, name: str) -> None:
    with suppress(StreamError):
        check(read_table(written(data, name)))


def check(table: Table) -> None:
    columns = set(table.columns)
    assert all(isinstance(name, str) for name in columns)
    assert all(row.keys() <= columns for _, row in table.rows)
    with suppress(StreamError):
        for example in examples_of(SPEC, "train", table):
            assert example.answers
            for text in (example.text, *example.answers):
                assert "\0" not in text.encode().decode()
