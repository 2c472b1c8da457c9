"""Tables that somebody else wrote: good ones as they are, bad ones refused with the line and the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from mbf.streams import StreamError, load_stream, tables
from mbf.streams.tables import read_table


def read(tmp_path: Path, name: str, content: bytes) -> list[dict[str, Any]]:
    (tmp_path / name).write_bytes(content)
    return [values for _, values in read_table(tmp_path / name).rows]


def test_jsonl_as_it_is(tmp_path: Path) -> None:
    content = '\ufeff{"text": "Åse\\u2028", "label": 0}\r\n\n  \n{"label": true, "text": 1.50}'.encode()
    assert read(tmp_path, "a.jsonl", content) == [{"text": "Åse\u2028", "label": 0}, {"label": True, "text": 1.5}]
    assert read_table(tmp_path / "a.jsonl").columns == ["text", "label"]


def test_csv_as_it_is_written(tmp_path: Path) -> None:
    content = '\ufefftext,label\r\n"a, ""b""\r\nc",007\r\n\r\n2020-01-01,1.50\r\n'.encode()
    found = read(tmp_path, "a.csv", content)
    assert found == [{"text": 'a, "b"\r\nc', "label": "007"}, {"text": "2020-01-01", "label": "1.50"}]


def test_parquet_with_names_of_labels(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list([{"text": "a", "label": 1}], features=features).to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert (table.columns, table.rows) == (["text", "label"], [(1, {"text": "a", "label": 1})])
    assert table.names == {"label": ["no", "yes"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": 1}\n{"text": ', "line 2: is no JSON: Expecting value at character 10; JSONL has one"),
        ("a.jsonl", b'{"text": 1} {"text": 2}', "line 1: is no JSON: Extra data"),
        ("a.jsonl", b'[{"text": 1}]', "line 1: found a list, wanted an object such as"),
        ("a.jsonl", b"\n\n7", "line 3: found 7, wanted an object such as"),
        ("a.jsonl", b'{"text": NaN}', "line 1: found NaN, which is no value of JSON; write it as text"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: Exceeds the limit"),
        ("a.jsonl", b"[" * 200_000, "line 1: is nested too deep; wanted an object with plain values"),
        ("a.jsonl", b'{"text": "\xe9"}', "line 1: byte 11 (0xe9) is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", '{"text": 1}'.encode("utf-16"), "line 1: is UTF-16, wanted UTF-8; save the file as UTF-8"),
        ("a.jsonl", b'{"text": 1}\n\0\0', "line 2: has a NUL byte, so it is no text or is damaged; restore it"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: has 1 fields, wanted 2 as the first line has; put a text with commas"),
        ("a.csv", b"a,b,a\n1,2,3\n", "column 'a' is there twice; rename one"),
        ("a.csv", b'a,b\n"x,2\n', "line 2: is no CSV: unexpected end of data; close every double quote"),
        ("a.csv", b'a,b\n"x"y,2\n', "line 2: is no CSV: ',' expected after '\"'; close every double quote"),
        ("a.csv", "a,b\n1,é".encode("latin-1"), "line 2: byte 3 (0xe9) is not UTF-8; save the file as UTF-8"),
        ("a.parquet", b"PAR1 no", "is no Parquet that can be read: "),
    ],
)
def test_what_is_said_of_a_bad_file(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(StreamError, match=re.escape(said)) as error:
        read(tmp_path, name, content)
    assert str(error.value).startswith(f"{tmp_path / name}")
    assert "\n" not in str(error.value)
    assert (tmp_path / name).read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_line_of_fifty_megabytes_is_not_read(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n{"text": "' + b"x" * 50_000_000 + b'"}\n'
    with pytest.raises(StreamError, match=r"a\.jsonl, line 2: is longer than 16777216 bytes; cut its text"):
        read(tmp_path, "a.jsonl", content)


def test_a_field_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE", 100)
    content = b'text,label\n"' + b"x\n" * 100 + b'",1\n'  # over lines, each of which is short
    with pytest.raises(StreamError, match=r"is no CSV: field larger than field limit \(100\)"):
        read(tmp_path, "a.csv", content)


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.99])
def test_truncated_parquet(tmp_path: Path, cut: float) -> None:
    parquet.write_table(pyarrow.table({"text": ["a"] * 100, "label": ["b"] * 100}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    with pytest.raises(StreamError, match=r"a\.parquet: is no Parquet that can be read: .*; write it anew"):
        read(tmp_path, "a.parquet", content[: int(cut * len(content))])


def test_parquet_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_PARQUET", 1000)
    parquet.write_table(pyarrow.table({"text": ["a" * 100_000]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(StreamError, match=r"a\.parquet: unpacks to \d+ bytes, wanted at most 1000; split it"):
        read_table(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": {"a": 1}, "label": "x"}', "'text' is an object, wanted text or a number; name another column"),
        ('{"text": ["a"], "label": "x"}', "'text' is a list, wanted text or a number; name another column"),
        ('{"text": "a", "label": ["x", ["y"]]}', "'label' is a list, wanted text or a number; name another column"),
        ('{"text": "a", "label": []}', "'label' is an empty list; give an answer, or remove the row"),
        ('{"text": "a"}', "'label' has no value; fill it in, or remove the row"),
        ('{"text": "\\ud800", "label": "x"}', "'text' has half a character (\\ud800); write it whole"),
        ('{"text": "a\\u0000", "label": "x"}', "'text' has a NUL character; remove it"),
        ('{"text": 1e999, "label": "x"}', "'text' is inf, wanted text or a finite number; mend or remove the row"),
    ],
)
def test_what_is_said_of_a_bad_value(tmp_path: Path, row: str, said: str) -> None:
    for split in ("train", "test"):
        good = '{"text": "b", "label": "x"}\n'
        file = tmp_path / "s" / "t" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(good + (row if split == "train" else good))
    with pytest.raises(StreamError, match=re.escape(said)) as error:
        load_stream(tmp_path / "s")
    assert f"task 't', split 'train': {tmp_path}/s/t/train.jsonl, line 2: " in str(error.value)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["s", "t", "test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"Instances": [7]}', "instance 1: wanted 'input' and 'output', found 7; fill it in, or remove it"),
        (b'{"Instances": [{"input": {}, "output": "a"}]}', "instance 1: 'input' is an object, wanted text or a number"),
        (b'{"Instances": [{"input": "a", "output": [[]]}]}', "instance 1: 'output' is a list, wanted text or a number"),
        (b'{"Definition": {}, "Instances": []}', "'Definition' is an object, wanted text or a number"),
        (b'{"Instances": "\xff"}', "byte 15 is not UTF-8; save the file as UTF-8"),
        (b"[" * 200_000, "is nested too deep; wanted the SAPT layout"),
        (b"{", "is not JSON: "),
    ],
)
def test_what_is_said_of_a_bad_sapt_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t").mkdir()
    for split in ("train", "test"):
        (tmp_path / "t" / f"{split}.json").write_bytes(content)
    with pytest.raises(StreamError, match=re.escape(said)) as error:
        load_stream(tmp_path)
    assert f"task 't': {tmp_path}/t/train.json" in str(error.value)


def test_labels_of_sapt_that_are_no_list(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for split in ("train", "test"):
        (tmp_path / "t" / f"{split}.json").write_text('{"Instances": [{"input": "a", "output": "b"}]}')
    (tmp_path / "t" / "labels.json").write_text('{"b": 1}')
    with pytest.raises(StreamError, match=r"labels\.json holds dict, wanted a list of labels"):
        load_stream(tmp_path)
