"""Read tables with named columns: JSONL, CSV and Parquet files, and data sets of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf.streams.fetch import cache_dir
from mbf.streams.spec import TaskSpec
from mbf.streams.task import SPLITS, Content, Example, Split, StreamError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_columns(spec: TaskSpec, cache: str | os.PathLike[str] | None) -> Content:
    """The rows of the task's files or hub data set, with the labels that a hub data set names.

    Raises:
        StreamError: a missing file, split, column or value.
    """
    data = _load_hub(spec, cache) if spec.hub else _load_files(spec, cache)
    splits = {split: _examples(spec, split, rows) for split, rows in data.items()}
    names = getattr(data["train"].features[spec.label], "names", None) if spec.labels is None else None
    return Content(splits, names)


def _load_files(spec: TaskSpec, cache: str | os.PathLike[str] | None) -> dict[Split, Dataset]:
    from datasets import load_dataset

    folder = spec.path or Path()
    files = {split: folder / file for split, file in spec.splits.items()} or {
        split: path for split in SPLITS for path in sorted(folder.glob(f"{split}.*")) if path.suffix in BUILDERS
    }
    for split in ("train", "test"):
        if split not in files or not files[split].is_file():
            raise StreamError(
                f"task {spec.name!r}: no file for split {split!r} ({files.get(split, folder)}); wanted "
                f"{folder}/{split}.jsonl (or .csv, .parquet), or name the files under 'splits'"
            )
    data: dict[Split, Dataset] = {}
    for split, path in files.items():
        if path.suffix not in BUILDERS or not path.is_file():
            raise StreamError(f"task {spec.name!r}, split {split!r}: {path} is not a file ending in {[*BUILDERS]}")
        # Without it, texts such as "NA" and "null" would come as missing values.
        plain: dict[str, Any] = {"keep_default_na": False} if path.suffix == ".csv" else {}
        try:
            data[split] = load_dataset(
                BUILDERS[path.suffix],
                data_files=str(path),
                split="train",
                cache_dir=str(cache_dir(cache) / "datasets"),
                **plain,
            )
        except Exception as error:  # datasets wraps whatever its readers raise
            cause = " ".join(str(error.__cause__ or error).split())
            raise StreamError(f"task {spec.name!r}, split {split!r}: {path} could not be read: {cause}") from error
    return data


def _load_hub(spec: TaskSpec, cache: str | os.PathLike[str] | None) -> dict[Split, Dataset]:
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(str(spec.hub), spec.config, cache_dir=str(cache_dir(cache) / "datasets"))
    except Exception as error:  # datasets, hub and network raise many kinds
        cause = " ".join(str(error).split())
        raise StreamError(f"task {spec.name!r}: data set {spec.hub!r} could not be loaded: {cause}") from error
    wanted = spec.splits or {split: split for split in SPLITS if split in loaded}
    missing = [theirs for theirs in wanted.values() if theirs not in loaded]
    if missing or not {"train", "test"} <= set(wanted):
        raise StreamError(
            f"task {spec.name!r}: {spec.hub!r} has the splits {[*loaded]}; wanted train and test"
            f"{f', found no {missing}' if missing else ''}: say under 'splits' which to take, as 'test: validation'"
        )
    return {ours: loaded[theirs] for ours, theirs in wanted.items()}


def _examples(spec: TaskSpec, split: str, rows: Dataset) -> list[Example]:
    missing = [column for column in (*spec.columns, spec.label) if column not in rows.column_names]
    if missing:
        raise StreamError(
            f"task {spec.name!r}, split {split!r}: no column {', '.join(map(repr, missing))}; the columns are "
            f"{rows.column_names}: name yours under 'text' and 'label'"
        )
    names = getattr(rows.features[spec.label], "names", None)  # of a ClassLabel
    rename = {str(value): name for value, name in spec.labels.items()} if isinstance(spec.labels, dict) else None
    examples = []
    for number, row in enumerate(rows, 1):
        value = row[spec.label]
        if value is None or any(row[column] is None for column in spec.columns):
            raise StreamError(f"task {spec.name!r}, split {split!r}, row {number}: a value is empty: {dict(row)}")
        values = value if isinstance(value, list) else [value]
        answers = [names[v] if names is not None and isinstance(v, int) and v >= 0 else str(v) for v in values]
        if rename is not None:
            answers = [rename.get(str(v), rename.get(a, a)) for v, a in zip(values, answers, strict=True)]
        if not answers:
            raise StreamError(f"task {spec.name!r}, split {split!r}, row {number}: {spec.label!r} is an empty list")
        examples.append(Example("\n".join(str(row[column]) for column in spec.columns), "", tuple(answers)))
    return examples
