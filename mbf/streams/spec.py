"""What a user writes to describe a stream of their own data: in YAML, as a dict, or as these classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mbf.streams.task import SPLITS, Kind, Metric, Split, StreamError
from mbf.streams.yaml_file import YamlError, parse_yaml_file


def _printable(name: str) -> str:
    if not name or not name.isprintable():
        raise ValueError(f"found the name {name!r}, which cannot be shown in a line; take out line breaks and the like")
    return name


_Name = Annotated[str, AfterValidator(_printable)]


class TaskSpec(BaseModel):
    """One task: where its rows are and what their columns mean.

    Attributes:
        name: unique in the stream.
        path: folder with a file per split (``train.jsonl``; also csv, parquet, or json in the SAPT layout), or the
            folder that ``splits`` are relative to. Relative to the YAML file. Either this or ``hub``.
        hub: id of a data set on the hub, or whatever else ``datasets.load_dataset`` takes.
        config: the hub data set's configuration.
        splits: our split → file in ``path``, or split of the hub data set. Default: the files that are there; on the
            hub the splits of the same names. Validation may be missing.
        text: column, or columns that are joined by line breaks.
        label: column of the answer.
        labels: the answers in the order to show them, or the column's value → the answer. Default: the names that a
            hub data set gives, else the values that occur in training.
        noun: what a label is, in the prompt's "What is the <noun> of the text?".
        kind: "classification" or "generation". Default: classification where ``labels`` are given or the answers of
            the training rows are a small closed set, see ``readers.closed_set``.
        metric: "accuracy" or "rougeL". Default: accuracy for classification, Rouge-L for generation.
        licence: of the data, for the record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    path: Path | None = None
    hub: str | None = None
    config: str | None = None
    splits: dict[Split, str] = {}
    text: str | list[str] = "text"
    label: str = "label"
    labels: list[str] | dict[str | int, str] | None = None
    noun: str = "label"
    kind: Kind | None = None
    metric: Metric | None = None
    licence: str = ""

    @field_validator("text", mode="before")
    @classmethod
    def _some_column(cls, text: Any) -> Any:
        if text == []:
            raise ValueError("found [], wanted a column, or a list of at least one; leave it out for 'text'")
        return text

    @field_validator("labels", mode="before")
    @classmethod
    def _no_booleans(cls, labels: Any) -> Any:
        pairs = labels.items() if isinstance(labels, dict) else enumerate(labels) if isinstance(labels, list) else ()
        for key, value in pairs:
            if isinstance(key, bool) or isinstance(value, bool):
                raise ValueError(
                    f"found {value!r} for {key!r}, wanted text; YAML reads yes and no so: put them in quotes"
                )
        return labels

    @model_validator(mode="after")
    def _one_place(self) -> TaskSpec:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"task {self.name!r} needs either 'path' or 'hub'; give exactly one of them")
        if self.kind == "generation" and self.labels:
            raise ValueError(f"task {self.name!r} has kind 'generation' and 'labels'; leave one of them out")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that make the text."""
        return [self.text] if isinstance(self.text, str) else self.text


class StreamSpec(BaseModel):
    """A stream: its tasks, and the orders in which they are learned (default: one, as they are listed)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name = "stream"
    tasks: list[TaskSpec] = Field(min_length=1)
    orders: dict[int, list[str]] | list[list[str]] = {}

    @model_validator(mode="after")
    def _distinct_names(self) -> StreamSpec:
        counts = Counter(task.name for task in self.tasks)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"tasks {twice} are listed twice; give every task a name of its own")
        return self

    def numbered_orders(self) -> dict[int, tuple[str, ...]]:
        """The orders by number, from 1."""
        orders = self.orders if isinstance(self.orders, dict) else dict(enumerate(self.orders, 1))
        return {n: tuple(order) for n, order in orders.items()} or {1: tuple(task.name for task in self.tasks)}


def parse_spec(data: Any, where: str) -> StreamSpec:
    """``data`` checked, or StreamError that says ``where`` and names every key that is wrong."""
    try:
        return StreamSpec.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, issue['loc'])) or 'stream'}: {issue['msg'].removeprefix('Value error, ')}"
            for issue in error.errors()
        )
        raise StreamError(f"{where} does not describe a stream: {problems}; see docs/data.md") from error


def read_spec(path: Path) -> StreamSpec:
    """The spec in a YAML file, with relative paths made relative to the file."""
    try:
        data = parse_yaml_file(path)
    except YamlError as error:
        raise StreamError(f"{path} is not YAML: {error}; mend the file") from None
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {error.strerror}; name a file that can") from None
    spec = parse_spec({"name": path.stem, **data} if isinstance(data, dict) else data, str(path))
    tasks = [t.model_copy(update={"path": path.parent / t.path}) if t.path is not None else t for t in spec.tasks]
    return spec.model_copy(update={"tasks": tasks})


def folder_spec(root: Path) -> StreamSpec:
    """The spec of ``<root>/<task>/<split>.<format>``: every folder with a training file is a task, by name."""
    tasks = [
        TaskSpec(name=folder.name, path=folder) for folder in sorted(root.iterdir()) if any(folder.glob("train.*"))
    ]
    if not tasks:
        raise StreamError(
            f"{root} holds no task; wanted is {root}/<task>/train.jsonl (or csv, parquet, json in the SAPT layout), "
            f"and likewise {', '.join(SPLITS[1:])}"
        )
    return StreamSpec(name=root.resolve().name, tasks=tasks)
