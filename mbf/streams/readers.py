"""From what a reader finds in a user's data to a task: which labels, which question, how many rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from mbf.streams.columns import read_columns
from mbf.streams.prompts import instruction, question
from mbf.streams.sapt import read_sapt
from mbf.streams.spec import TaskSpec
from mbf.streams.task import Content, Example, Row, Split, StreamError, Task, check_answers, make_task, sample

logger = logging.getLogger(__name__)

CLOSED_SET = 64


def read_task(
    spec: TaskSpec,
    *,
    train_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> Task:
    """The task that ``spec`` describes, with at most so many rows, drawn by the seed.

    Raises:
        StreamError: a missing file, split or column, an empty value, or a label outside the set.
    """
    try:
        if spec.path is not None and any(spec.path.glob("train.json")):
            content = read_sapt(spec)
        else:
            content = read_columns(spec, cache)
    except OSError as error:  # a name that no file can have, a folder that may not be looked into
        if spec.path is None:
            raise
        reason = f"{error.strerror}: {error.filename}"
        raise StreamError(f"task {spec.name!r} cannot be read ({reason}); name files that can") from None
    content = _stripped(content)
    labels = _labels(spec, content)
    rows = {
        split: [_row(example, bool(labels), spec.noun) for example in examples]
        for split, examples in content.splits.items()
    }
    check_answers(spec.name, rows, labels)  # of all rows: those that are drawn have other numbers
    limits: dict[Split, int | None] = {"train": train_rows, "validation": test_rows, "test": test_rows}
    return make_task(
        spec.name,
        {split: sample(examples, limits[split], seed) for split, examples in rows.items()},
        labels=labels,
        noun=spec.noun,
        metric=spec.metric,
        licence=spec.licence,
        source=str(spec.hub or spec.path),
    )


def closed_set(answers: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """The labels, sorted, if the acceptable answers of every row look like labels; else [].

    They do where every row has a single answer, training has at most 64 different ones and each twice on average, and
    the other splits have no others.
    """
    if any(len(row) != 1 for rows in answers.values() for row in rows):
        return []
    known = {row[0] for row in answers.get("train", ())}
    few = len(known) <= CLOSED_SET and 2 * len(known) <= len(answers.get("train", ()))
    return sorted(known) if few and all(row[0] in known for rows in answers.values() for row in rows) else []


def _labels(spec: TaskSpec, content: Content) -> list[str]:
    """The task's labels, [] for generation."""
    if spec.kind == "generation":
        return []
    if isinstance(spec.labels, dict):
        return list(dict.fromkeys(label.strip() for label in spec.labels.values()))
    given = spec.labels or content.labels
    if given is not None:
        return [label.strip() for label in given]
    if spec.kind == "classification":
        return sorted({example.answers[0] for example in content.splits.get("train", [])})
    answers: dict[str, list[tuple[str, ...]]] = {
        split: [example.answers for example in rows] for split, rows in content.splits.items()
    }
    labels = closed_set(answers)
    _warn_of_strays(spec.name, answers, labels)
    kind = f"classification with labels {labels}" if labels else "generation, its answers are no small closed set"
    logger.info("task %s: taken as %s; say 'kind' or 'labels' to change that", spec.name, kind)
    return labels


def _warn_of_strays(name: str, answers: Mapping[str, Sequence[Sequence[str]]], labels: Sequence[str]) -> None:
    """A few labels that training has not make generation of what else is a classification."""
    known = closed_set({"train": answers.get("train", ())})
    if labels or not known:
        return
    held_out = [row for split, rows in answers.items() if split != "train" for row in rows]
    strays = [row for row in held_out if len(row) != 1 or row[0] not in known]
    if 10 * len(strays) <= len(held_out):
        found = sorted({answer for row in strays for answer in row if answer not in known})
        logger.warning(
            "task %s: training looks like a classification, but %d of %d held-out rows answer otherwise (%s), so it is "
            "taken as generation; mend these rows, or say 'kind' or 'labels'",
            name,
            len(strays),
            len(held_out),
            ", ".join(map(repr, found[:5])) or "several answers each",
        )


def _stripped(content: Content) -> Content:
    """Answers without space around them: " yes" is no label beside "yes"."""
    splits = {
        split: [example._replace(answers=tuple(answer.strip() for answer in example.answers)) for example in examples]
        for split, examples in content.splits.items()
    }
    return Content(splits, None if content.labels is None else [label.strip() for label in content.labels])


def _row(example: Example, classification: bool, noun: str) -> Row:
    ask = question(noun) if classification and not example.definition else instruction(example.definition)
    return Row(example.text, ask, example.answers[0], example.answers)
