"""A stream of tasks, and the one way in which rows become a task: checked, disjoint, fingerprinted."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Kind = Literal["classification", "generation"]
Metric = Literal["accuracy", "rougeL"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class StreamError(ValueError):
    """A stream, or a task of it, is not what it should be."""


class Row(NamedTuple):
    """One example: ``text`` + ``question`` is the prompt, " " + ``answer`` what follows it.

    ``references`` are all acceptable answers, of which ``answer`` is the first.
    """

    text: str
    question: str
    answer: str
    references: tuple[str, ...]


class Example(NamedTuple):
    """A row of a user's data, before its task is known to be a classification or not.

    ``definition`` holds the data's own words for what is asked, if it has any.
    """

    text: str
    definition: str
    answers: tuple[str, ...]


class Content(NamedTuple):
    """What a reader found: the examples of each split, and the labels if the data itself lists them."""

    splits: dict[Split, list[Example]]
    labels: list[str] | None


@dataclass(frozen=True)
class Task:
    """One task with its data.

    Attributes:
        name: unique in its stream.
        kind: "classification" (answers are among ``labels``) or "generation".
        labels: the answers of a classification; () for generation.
        noun: what a label is, as the prompt says it: "topic".
        train, validation, test: ``datasets.Dataset`` with the columns text, question, answer (all str) and references
            (list of str; the acceptable answers). ``validation`` may have no rows, the others have some.
        metric: "accuracy" or "rougeL".
        licence: of the data.
        source: where the data comes from, for people.
        fingerprint: sha256 of all rows of the three splits.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    noun: str
    train: Dataset
    validation: Dataset
    test: Dataset
    metric: Metric
    licence: str
    source: str
    fingerprint: str


@dataclass(frozen=True)
class Stream:
    """Tasks to be learned one after another.

    Attributes:
        name: of the stream.
        tasks: by name.
        orders: the orders in which they are learned, numbered from 1; each holds every task once.
    """

    name: str
    tasks: dict[str, Task]
    orders: dict[int, tuple[str, ...]]


def make_task(
    name: str,
    splits: Mapping[Split, Sequence[Row]],
    *,
    labels: Sequence[str],
    noun: str,
    metric: Metric | None = None,
    licence: str = "",
    source: str = "",
) -> Task:
    """A task from the rows of its splits; without ``labels`` it is a generation task.

    Training and validation rows whose prompt is also a test row are left out, and so are training rows whose prompt is
    also a validation row; a warning says how many.

    Raises:
        StreamError: an empty train or test split, an empty answer, or an answer that is not among the labels.
    """
    from datasets import Dataset, Features, List, Value

    rows = {split: list(splits.get(split, ())) for split in SPLITS}
    check_answers(name, rows, labels)
    _drop_leaks(name, rows)
    for split in ("train", "test"):
        if not rows[split]:
            raise StreamError(f"task {name!r}: split {split!r} has no rows; give it some, or leave the task out")
    text = Value("string")
    features = Features({"text": text, "question": text, "answer": text, "references": List(text)})
    data = {
        # By column: from_list makes a table without columns of no rows.
        split: Dataset.from_dict({name: [getattr(row, name) for row in rows[split]] for name in features}, features)
        for split in SPLITS
    }
    kind: Kind = "classification" if labels else "generation"
    return Task(
        name=name,
        kind=kind,
        labels=tuple(labels),
        noun=noun,
        metric=metric or ("accuracy" if labels else "rougeL"),
        licence=licence,
        source=source,
        fingerprint=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        **data,
    )


def sample(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """At most ``count`` rows, drawn by the seed and kept in their order; all of them for None."""
    if count is None or len(rows) <= count:
        return list(rows)
    return [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), count))]


def check_orders(name: str, tasks: Sequence[str], orders: Mapping[int, Sequence[str]]) -> None:
    """Raise StreamError unless every order is a permutation of the tasks."""
    for number, order in orders.items():
        if sorted(order) != sorted(tasks):
            raise StreamError(
                f"stream {name!r}, order {number}: it lists {list(order)}; every task must come exactly once: "
                f"{list(tasks)}"
            )


def check_answers(name: str, rows: Mapping[Split, Sequence[Row]], labels: Sequence[str]) -> None:
    """Raise StreamError at the first row whose answer is empty or not among the labels, if there are labels."""
    known = set(labels)
    for split, examples in rows.items():
        for number, row in enumerate(examples, 1):
            if not row.answer.strip():
                raise StreamError(
                    f"task {name!r}, split {split!r}, row {number}: the answer is empty; fill it in or remove the row"
                )
            foreign = next((label for label in (row.answer, *row.references) if label not in known), None)
            if known and foreign is not None:
                raise StreamError(
                    f"task {name!r}, split {split!r}, row {number}: label {foreign!r} is not among the task's "
                    f"labels {sorted(known)}; add it there or remove the row"
                )


def _drop_leaks(name: str, rows: dict[Split, list[Row]]) -> None:
    """Remove from train what is in validation or test, and from validation what is in test, by prompt."""
    later = {(row.text, row.question) for row in rows["test"]}
    held_out_first: tuple[Split, ...] = ("validation", "train")
    for split in held_out_first:
        kept = [row for row in rows[split] if (row.text, row.question) not in later]
        if dropped := len(rows[split]) - len(kept):
            logger.warning(
                "task %s: left out %d of %d %s rows whose prompt is held out too",
                name,
                dropped,
                len(rows[split]),
                split,
            )
        later |= {(row.text, row.question) for row in kept}
        rows[split] = kept
