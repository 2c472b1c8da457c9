"""Examples out of named columns: of JSONL, CSV and Parquet files, and of data sets of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf.streams.fetch import cache_dir
from mbf.streams.spec import TaskSpec
from mbf.streams.tables import READERS, Table, as_text, read_table
from mbf.streams.task import SPLITS, Content, Example, Split, StreamError

if TYPE_CHECKING:
    from datasets import Dataset


def read_columns(spec: TaskSpec, cache: str | os.PathLike[str] | None) -> Content:
    """The rows of the task's files or hub data set, with the labels that a hub data set names.

    Raises:
        StreamError: a missing file, split, column or value.
    """
    data = _load_hub(spec, cache) if spec.hub else _load_files(spec)
    splits = {split: examples_of(spec, split, table) for split, table in data.items()}
    return Content(splits, data["train"].names.get(spec.label) if spec.labels is None else None)


def _load_files(spec: TaskSpec) -> dict[Split, Table]:
    folder = spec.path or Path()
    files = {split: folder / file for split, file in spec.splits.items()} or _found(spec, folder)
    for split in ("train", "test"):
        if split not in files or not files[split].is_file():
            raise StreamError(
                f"task {spec.name!r}: no file for split {split!r} ({files.get(split, folder)}); wanted "
                f"{folder}/{split}.jsonl (or .csv, .parquet), or name the files under 'splits'"
            )
    data: dict[Split, Table] = {}
    for split, path in files.items():
        if path.suffix not in READERS or not path.is_file():
            raise StreamError(
                f"task {spec.name!r}, split {split!r}: found {path}, wanted a file ending in {', '.join(READERS)}"
            )
        try:
            data[split] = read_table(path)
        except StreamError as error:
            raise StreamError(f"task {spec.name!r}, split {split!r}: {error}") from None
    return data


def _found(spec: TaskSpec, folder: Path) -> dict[Split, Path]:
    """The file of each split that the folder has."""
    files: dict[Split, Path] = {}
    for split in SPLITS:
        paths = [path for path in sorted(folder.glob(f"{split}.*")) if path.suffix in READERS]
        if len(paths) > 1:
            raise StreamError(
                f"task {spec.name!r}, split {split!r}: {folder} has {' and '.join(path.name for path in paths)}; leave "
                "one, or name the files under 'splits'"
            )
        if paths:
            files[split] = paths[0]
    return files


def _load_hub(spec: TaskSpec, cache: str | os.PathLike[str] | None) -> dict[Split, Table]:
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(str(spec.hub), spec.config, cache_dir=str(cache_dir(cache) / "datasets"))
    except Exception as error:  # datasets, hub and network raise many kinds
        cause = " ".join(str(error).split())
        raise StreamError(
            f"task {spec.name!r}: data set {spec.hub!r} could not be loaded: {cause}; check its id and the network, or "
            "give a folder as 'path'"
        ) from error
    wanted = spec.splits or {split: split for split in SPLITS if split in loaded}
    missing = [theirs for theirs in wanted.values() if theirs not in loaded]
    if missing or not {"train", "test"} <= set(wanted):
        raise StreamError(
            f"task {spec.name!r}: {spec.hub!r} has the splits {[*loaded]}; wanted train and test"
            f"{f', found no {missing}' if missing else ''}: say under 'splits' which to take, as 'test: validation'"
        )
    return {ours: _table(f"{spec.hub}, {theirs}", loaded[theirs]) for ours, theirs in wanted.items()}


def _table(where: str, data: Dataset) -> Table:
    names = {name: list(f.names) for name, f in data.features.items() if getattr(f, "names", None)}
    rows = [(number, dict(row)) for number, row in enumerate(data, 1)]
    return Table(f"{where}, row", data.column_names, rows, names)


def examples_of(spec: TaskSpec, split: str, table: Table) -> list[Example]:
    """The rows of ``table`` as the task takes them.

    Raises:
        StreamError: a missing column or value, or a value that is no text.
    """
    missing = [column for column in (*spec.columns, spec.label) if column not in table.columns]
    if missing:
        raise StreamError(
            f"task {spec.name!r}, split {split!r}: no column {', '.join(map(repr, missing))}; the columns are "
            f"{table.columns}: name yours under 'text' and 'label'"
        )
    names = table.names.get(spec.label)
    rename = {str(value): name for value, name in spec.labels.items()} if isinstance(spec.labels, dict) else None
    examples = []
    for number, row in table.rows:
        where = f"task {spec.name!r}, split {split!r}: {table.place} {number}"
        value = row.get(spec.label)
        empty = next((column for column in (*spec.columns, spec.label) if row.get(column) is None), None)
        if empty is not None:
            raise StreamError(f"{where}: {empty!r} has no value; fill it in, or remove the row")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise StreamError(f"{where}: {spec.label!r} is an empty list; give an answer, or remove the row")
        answers = [_answer(v, names, where, spec.label) for v in values]
        if rename is not None:
            answers = [rename.get(str(v), rename.get(a, a)) for v, a in zip(values, answers, strict=True)]
        text = "\n".join(as_text(row[column], where, column) for column in spec.columns)
        examples.append(Example(text, "", tuple(answers)))
    return examples


def _answer(value: Any, names: list[str] | None, where: str, column: str) -> str:
    """A label as text; of a ClassLabel the name that its number stands for."""
    if names is not None and isinstance(value, int) and value >= 0:
        if value >= len(names):
            raise StreamError(f"{where}: {column!r} is {value}, wanted one of {len(names)} names; mend the row")
        return names[value]
    return as_text(value, where, column)
