"""Read tables that somebody else wrote, JSONL, CSV and Parquet: bounded, as UTF-8, each row known by its line."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mbf.streams.task import StreamError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MAX_LINE = 16 << 20
"""Bytes of a line of JSONL, characters of a field of CSV: far more than any prompt takes."""

MAX_PARQUET = 4 << 30
"""Bytes of a Parquet file's rows in memory, every text written out and every value an object."""

_VALUE = 64
"""Bytes that Python takes for a value beside its text."""

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Table(NamedTuple):
    """A table in memory.

    Attributes:
        place: what an error calls a row when its number follows, such as ``data.jsonl, line``.
        columns: in the order in which they are met.
        rows: (number, values by column); a column that a row lacks is null.
        names: of columns of numbers, what these stand for (ClassLabel).
    """

    place: str
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]]
    names: dict[str, list[str]]


def read_table(path: Path) -> Table:
    """The table in a file, by its ending.

    JSONL is one object a line, in UTF-8 with or without a byte order mark; empty lines are passed over, and a key that
    a row lacks counts as null. CSV has commas, double quotes and a first row of names; all its values are text, as
    they are written.

    Raises:
        StreamError: what the file has is something else; names the line.
    """
    return READERS[path.suffix](path)


def read_jsonl(path: Path) -> Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        values = _parsed(line, where)
        if not isinstance(values, dict):
            raise StreamError(f'{where}: found {_kind(values)}, wanted an object such as {{"text": …, "label": …}}')
        columns |= dict.fromkeys(values)
        rows.append((number, values))
    return Table(f"{path}, line", [*columns], rows, {})


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise StreamError(
            f"{where}: is no JSON: {error.msg} at character {error.pos + 1}; JSONL has one whole object a line"
        ) from None
    except RecursionError:
        raise StreamError(f"{where}: is nested too deep; wanted an object with plain values") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise StreamError(f"{where}: {error}; write it as text") from None


def _no_number(word: str) -> None:
    raise ValueError(f"found {word}, which is no value of JSON")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1; no more than one line is held at a time."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise StreamError(f"{path}, line {number}: is longer than {MAX_LINE} bytes; cut its text, or split it")
            yield number, _decoded(line.removeprefix(_BOM) if number == 1 else line, f"{path}, line {number}")


def _decoded(line: bytes, where: str) -> str:
    if line.startswith(_UTF_16):
        raise StreamError(f"{where}: is UTF-16, wanted UTF-8; save the file as UTF-8")
    if b"\0" in line:
        raise StreamError(f"{where}: has a NUL byte, so it is no text or is damaged; restore it, or save it as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StreamError(
            f"{where}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None


def read_csv(path: Path) -> Table:
    before = csv.field_size_limit(MAX_LINE)
    try:
        reader = csv.reader((line for _, line in _lines(path)), strict=True)
        columns = next(reader, [])
        _check_names(path, columns)
        rows: list[tuple[int, dict[str, Any]]] = []
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(columns) and fields:
                raise StreamError(
                    f"{where}: has {len(fields)} fields, wanted {len(columns)} as the first line has; put a text with "
                    "commas or line breaks in double quotes"
                )
            if fields:
                rows.append((reader.line_num, dict(zip(columns, fields, strict=True))))
    except csv.Error as error:
        raise StreamError(
            f"{path}, line {reader.line_num}: is no CSV: {error}; close every double quote, and double one in a text"
        ) from None
    finally:
        csv.field_size_limit(before)
    return Table(f"{path}, line", columns, rows, {})


def _check_names(path: Path, columns: list[str]) -> None:
    if twice := sorted(name for name, count in Counter(columns).items() if count > 1):
        raise StreamError(f"{path}: column {twice[0]!r} is there twice; rename one")


def read_parquet(path: Path) -> Table:
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    try:
        with _opened(path) as file:
            found = parquet.ParquetFile(file)
            schema = found.schema_arrow
            _check_names(path, schema.names)
            features = Features.from_arrow_schema(schema)
            # Weighed before any of it is made: a text that is there once may stand in a million rows.
            _check_size(path, _claimed(found))
            size = 0
            for weight in _weights(found, file):
                size += weight
                _check_size(path, size)
            values = [row for batch in found.iter_batches() for row in batch.to_pylist()]
    except StreamError:
        raise
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise StreamError(f"{path}: is no Parquet that can be read: {_first_line(error)}; write it anew") from None
    names = {name: list(f.names) for name, f in features.items() if getattr(f, "names", None)}
    return Table(f"{path}, row", list(schema.names), list(enumerate(values, 1)), names)


def _check_size(path: Path, size: int) -> None:
    if size > MAX_PARQUET:
        raise StreamError(f"{path}: unpacks to {size} bytes or more, wanted at most {MAX_PARQUET}; split it")


def _claimed(found: ParquetFile) -> int:
    """Bytes that the file's own words come to, which may be too few."""
    groups = (found.metadata.row_group(n) for n in range(found.metadata.num_row_groups))
    return sum(group.total_byte_size for group in groups) + _VALUE * found.metadata.num_rows


def _weights(found: ParquetFile, file: Any) -> Iterator[int]:
    """Bytes that the columns take in Python, some rows at a time.

    Plain texts come as the texts and a number for each row. Those within lists and objects Arrow writes out, so that
    few rows are taken then.
    """
    from pyarrow import parquet, types

    schema, leaves = found.schema_arrow, [found.schema.column(n) for n in range(len(found.schema))]
    nested = {field.name for field in schema if types.is_nested(field.type)}
    plain = {*schema.names} - nested
    texts = {leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"}
    coded, others = [*(texts & plain)], [*({*schema.names} - (texts & plain))]
    width = max((leaf.length for leaf in leaves if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY"), default=0)
    row = sys.getsizeof(dict.fromkeys(schema.names)) + sys.getsizeof((0, {}))
    file.seek(0)
    again = parquet.ParquetFile(file, metadata=found.metadata, read_dictionary=coded)
    for batch in chain(
        again.iter_batches(1 << 16, columns=coded) if coded else (),
        found.iter_batches(min(64 if nested else 1 << 16, (16 << 20) // (width + 1) + 1), columns=others)
        if others
        else (),
    ):
        yield sum(row // len(schema) * len(column) + _weight_of_values(column) for column in batch.columns)


def _weight_of_values(array: Any) -> int:
    import pyarrow
    from pyarrow import compute, types

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    size = _VALUE * len(array)
    if types.is_nested(array.type):
        inner = array.flatten()
        return size + sum(map(_weight_of_values, inner if isinstance(inner, list) else [inner]))
    if types.is_dictionary(array.type):
        kind = array.type.value_type
        if any(
            is_kind(kind)
            for is_kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        ):
            lengths = compute.binary_length(array.dictionary).take(array.indices)
            return size + (compute.sum(lengths).as_py() or 0)
    return size + int(array.nbytes)


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}


def as_text(value: Any, where: str, column: str) -> str:
    """A plain value as text.

    Raises:
        StreamError: it is null, a list or an object, no number, or text that is none.
    """
    if value is None:
        raise StreamError(f"{where}: {column!r} has no value; fill it in, or remove the row")
    if isinstance(value, float) and not math.isfinite(value):
        raise StreamError(f"{where}: {column!r} is {value}, wanted text or a finite number; mend or remove the row")
    if isinstance(value, dict | list | tuple | set | bytes | bytearray):
        raise StreamError(f"{where}: {column!r} is {_kind(value)}, wanted text or a number; name another column")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise StreamError(f"{where}: {column!r} has half a character ({half}); write it whole") from None
    if "\0" in text:
        raise StreamError(f"{where}: {column!r} has a NUL character; remove it")
    return text


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {error.strerror}; name a file that can") from None


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "binary data" if isinstance(value, bytes | bytearray) else f"{value!r}"[:80])


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).splitlines() or [type(error).__name__]
    return next(iter(lines))[:200]
