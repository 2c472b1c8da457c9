"""Tables that somebody else wrote: good ones as they are, bad ones refused with the line and the way out."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from mbf.run.config import ConfigError, read_yaml
from mbf.streams import StreamError, load_stream, sapt, tables
from mbf.streams.spec import read_spec
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
    with pytest.raises(StreamError, match=r"a\.parquet: unpacks to \d+ bytes or more, wanted at most 1000; split it"):
        read_table(tmp_path / "a.parquet")


def repeated(text: str, rows: int) -> bytes:
    """A Parquet file that has the text once, for any number of rows."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column.cast(pyarrow.dictionary(pyarrow.int32(), "string"))}), file)
    return file.getvalue()


def test_a_text_that_is_there_once_for_a_million_rows(tmp_path: Path) -> None:
    """Ten gigabytes in two kilobytes: refused before they are made."""
    (tmp_path / "a.parquet").write_bytes(repeated("x" * 10_000, 1_000_000))
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(StreamError, match=r"a\.parquet: unpacks to 4\d{9} bytes or more, wanted at most 4294967296; "):
        read_table(tmp_path / "a.parquet")
    assert pyarrow.default_memory_pool().max_memory() - before < 1 << 28


@pytest.mark.parametrize(
    "values",
    [
        ["x" * 10_000] * 100,
        [b"x" * 10_000] * 100,
        pyarrow.array([b"x" * 10_000] * 100, pyarrow.binary(10_000)),
        pyarrow.array(["x" * 10_000] * 100).dictionary_encode(),
        [["x" * 5_000, "x" * 5_000]] * 100,
        [{"a": ["x" * 10_000]}] * 100,
        [1] * 10_000,
        [None] * 10_000,
        [[1] * 10_000],
        [{"a": None}] * 10_000,
    ],
    ids=["text", "bytes", "fixed", "dictionary", "lists", "objects", "numbers", "nulls", "long list", "null objects"],
)
def test_repeated_values_are_weighed_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Any) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": values}), path, compression="zstd")
    rows = pyarrow.array(values) if isinstance(values, list) else values
    assert [row["text"] for _, row in read_table(path).rows] == rows.to_pylist()
    monkeypatch.setattr(tables, "_claimed", lambda found: 0)
    monkeypatch.setattr(tables, "MAX_PARQUET", 600_000)
    with pytest.raises(StreamError, match=r"unpacks to \d+ bytes or more, wanted at most 600000; split it"):
        read_table(path)


def test_parquet_of_many_groups_and_kinds(tmp_path: Path) -> None:
    content = {
        "text": [f"{number % 7}" * 300 if number % 5 else None for number in range(5000)],
        "label": [[f"{number}" * 50, "no"] for number in range(5000)],
        "kind": pyarrow.array([f"{number % 3}" for number in range(5000)]).dictionary_encode(),
        "large": pyarrow.array([f"{number}" for number in range(5000)], pyarrow.large_string()),
    }
    table = pyarrow.table(content)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1300)
    found = read_table(tmp_path / "a.parquet")
    assert found.columns == table.column_names
    assert found.rows == list(enumerate(table.to_pylist(), 1))


def test_a_header_of_many_names(tmp_path: Path) -> None:
    header = ",".join(f"c{number}" for number in range(100_000)).encode()
    before = time.process_time()
    assert read(tmp_path, "a.csv", header + b"\n") == []
    with pytest.raises(StreamError, match="column 'c7' is there twice; rename one"):
        read(tmp_path, "a.csv", header + b",c7\n")
    assert time.process_time() - before < 10


@pytest.mark.parametrize("features", ['{"text": ["x"]}', '{"text": ' + "[" * 400 + "]" * 400 + "}", "7"])
def test_parquet_with_metadata_of_no_meaning(tmp_path: Path, features: str) -> None:
    table = pyarrow.table({"text": ["a"]}).replace_schema_metadata(
        {"huggingface": '{"info": {"features": ' + features + "}}"}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(StreamError, match=r"a\.parquet: is no Parquet that can be read: .*; write it anew"):
        read_table(tmp_path / "a.parquet")


def test_a_name_twice_in_parquet(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(StreamError, match=r"a\.parquet: column 'text' is there twice; rename one"):
        read_table(tmp_path / "a.parquet")


def test_configurations_that_never_end() -> None:
    endless = Path("/dev/zero")
    with pytest.raises(StreamError, match="has more than 1048576 bytes"):
        read_spec(endless)
    with pytest.raises(ConfigError, match="has more than 1048576 bytes"):
        read_yaml(endless)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": {"a": 1}, "label": "x"}', "'text' is an object, wanted text or a number; name another column"),
        ('{"text": ["a"], "label": "x"}', "'text' is a list, wanted text or a number; name another column"),
        ('{"text": "a", "label": ["x", ["y"]]}', "'label' is a list, wanted text or a number; name another column"),
        ('{"text": "a", "label": [null]}', "'label' has no value; fill it in, or remove the row"),
        ('{"text": "a", "label": ["x", null]}', "'label' has no value; fill it in, or remove the row"),
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
        (b'{"Instances": [{"input": "a", "output": ["x", null]}]}', "instance 1: 'output' has no value; fill it in"),
        (b'{"Definition": null, "Instances": []}', "'Definition' has no value; fill it in, or remove the row"),
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


def test_a_sapt_file_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sapt, "MAX_JSON", 1000)
    with pytest.raises(
        StreamError, match=r"train\.json is longer than 1000 bytes; split the task, or write its rows as"
    ):
        sapt._json("t", endless(tmp_path / "train.json"))


def endless(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path
