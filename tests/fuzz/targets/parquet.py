"""Rows of a stream in Parquet."""

from __future__ import annotations

import io

import pyarrow
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from . import _rows

WORDS = [b"PAR1", b"\x15\x00", b"huggingface", b'{"info"', b"ClassLabel", b"\xff\xff\xff\x7f"]


def seeds() -> list[bytes]:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    named = io.BytesIO()
    Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 1}], features=features).to_parquet(named)
    repeated = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 50, "label": [1] * 50}), repeated)
    plain = []
    for compression in ("none", "zstd"):
        buffer = io.BytesIO()
        columns = {"text": ["a", None, "c"], "label": [[1], [2, 3], []], "more": [1.5, float("nan"), None]}
        parquet.write_table(pyarrow.table(columns), buffer, compression=compression)
        plain.append(buffer.getvalue())
    return [named.getvalue(), *plain, repeated.getvalue()]


def one(data: bytes) -> None:
    _rows.read(data, "rows.parquet")
