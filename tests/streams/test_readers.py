"""A user's own streams: files, the hub, the SAPT layout, YAML; and what is said when they are wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from mbf.streams import StreamError, StreamSpec, load_stream
from mbf.streams.readers import closed_set

COLOURS = [("grass", "green"), ("sky", "blue"), ("leaf", "green"), ("sea", "blue")]


def write(path: Path, rows: list[tuple[Any, Any]], columns: tuple[str, str] = ("text", "label")) -> None:
    """Write rows as the file's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [dict(zip(columns, row, strict=True)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in data))
    elif path.suffix == ".csv":
        Dataset.from_list(data).to_csv(path, index=False)
    else:
        Dataset.from_list(data).to_parquet(path)


def write_task(folder: Path, suffix: str = ".jsonl", validation: bool = True) -> None:
    write(folder / f"train{suffix}", COLOURS)
    write(folder / f"test{suffix}", [("moss", "green"), ("jeans", "blue")])
    if validation:
        write(folder / f"validation{suffix}", [("frog", "green")])


def write_sapt(folder: Path, rows: dict[str, list[tuple[str, Any]]], definition: str = "Name the colour.") -> None:
    folder.mkdir(parents=True)
    for split, examples in rows.items():
        content = {"Definition": [definition], "Instances": [{"input": x, "output": y} for x, y in examples]}
        (folder / f"{split}.json").write_text(json.dumps(content))


def load_one(cache: Path, **task: Any) -> Any:
    [loaded] = load_stream({"tasks": [{"name": "colours", **task}]}, cache=cache).tasks.values()
    return loaded


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_of_tasks(tmp_path: Path, suffix: str) -> None:
    write_task(tmp_path / "mine" / "b_colours", suffix)
    write_task(tmp_path / "mine" / "a_colours", suffix, validation=False)
    (tmp_path / "mine" / "notes").mkdir()
    stream = load_stream(tmp_path / "mine", cache=tmp_path / "cache")
    assert stream.name == "mine"
    assert stream.orders == {1: ("a_colours", "b_colours")}
    task = stream.tasks["b_colours"]
    assert (task.kind, task.labels, task.metric) == ("classification", ("blue", "green"), "accuracy")
    assert task.train["text"] == [text for text, _ in COLOURS]
    assert task.train["answer"] == [colour for _, colour in COLOURS]
    assert set(task.train["question"]) == {"\nWhat is the label of the text? Answer:"}
    assert (task.validation.num_rows, stream.tasks["a_colours"].validation.num_rows) == (1, 0)
    assert stream.tasks["a_colours"].validation.column_names == task.train.column_names


def test_a_yaml_file_with_everything(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.jsonl", [(1, 0), (2, 1)], ("number", "even"))
    write(tmp_path / "data" / "b.csv", [(3, 0), (4, 1)], ("number", "even"))
    spec = {
        "name": "parity",
        "tasks": [
            {
                "name": "even",
                "path": "data",
                "splits": {"train": "a.jsonl", "test": "b.csv"},
                "text": ["number", "number"],
                "label": "even",
                "labels": {0: "no", 1: "yes"},
                "noun": "evenness",
                "licence": "CC0-1.0",
            }
        ],
        "orders": [["even"]],
    }
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(spec))
    stream = load_stream(tmp_path / "stream.yaml", cache=tmp_path / "cache")
    task = stream.tasks["even"]
    assert (stream.name, stream.orders) == ("parity", {1: ("even",)})
    assert task.train.to_list() == [
        {
            "text": "1\n1",
            "question": "\nWhat is the evenness of the text? Answer:",
            "answer": "no",
            "references": ["no"],
        },
        {
            "text": "2\n2",
            "question": "\nWhat is the evenness of the text? Answer:",
            "answer": "yes",
            "references": ["yes"],
        },
    ]
    assert task.test["answer"] == ["no", "yes"]
    assert (task.labels, task.licence) == (("no", "yes"), "CC0-1.0")


def test_a_hub_data_set_brings_the_names_of_its_labels(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cold", "warm"])})
    for split, rows in (("train", [("ice", 0), ("fire", 1)]), ("test", [("snow", 0)])):
        (tmp_path / "hub").mkdir(exist_ok=True)
        data = Dataset.from_list([{"text": text, "label": label} for text, label in rows], features=features)
        data.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    task = load_one(tmp_path / "cache", hub=str(tmp_path / "hub"))
    assert task.labels == ("cold", "warm")
    assert task.train["answer"] == ["cold", "warm"]
    renamed = load_one(tmp_path / "cache", hub=str(tmp_path / "hub"), labels={0: "freezing", "warm": "hot"})
    assert renamed.train["answer"] == ["freezing", "hot"]
    with pytest.raises(StreamError, match=r"has the splits \['train', 'test'\].*found no \['dev'\]"):
        load_one(tmp_path / "cache", hub=str(tmp_path / "hub"), splits={"train": "train", "test": "dev"})


def test_sapt_with_a_list_of_labels_is_a_classification(tmp_path: Path) -> None:
    rows = {"train": [("grass", "green")], "dev": [("sky", ["blue"])], "test": [("sea", "blue")]}
    write_sapt(tmp_path / "root" / "task002", rows)
    (tmp_path / "root" / "task002" / "labels.json").write_text('["green", "blue", "red"]')
    task = load_stream(tmp_path / "root").tasks["task002"]
    assert (task.kind, task.labels) == ("classification", ("green", "blue", "red"))
    assert task.train[0] == {
        "text": "grass",
        "question": "\nName the colour.\nAnswer:",
        "answer": "green",
        "references": ["green"],
    }
    assert task.validation["answer"] == ["blue"]


def test_sapt_without_one_is_told_by_its_answers(tmp_path: Path) -> None:
    closed = {"train": COLOURS, "test": [("moss", "green")]}
    several = {"train": [("Greet", ["hello", "hi there"]), ("Part", "bye")], "test": [("Ask", "how are you")]}
    write_sapt(tmp_path / "root" / "closed", closed)
    write_sapt(tmp_path / "root" / "open", several, definition="")
    stream = load_stream(tmp_path / "root")
    assert stream.tasks["closed"].labels == ("blue", "green")
    task = stream.tasks["open"]
    assert (task.kind, task.labels, task.metric) == ("generation", (), "rougeL")
    assert task.train[0] == {
        "text": "Greet",
        "question": "\nAnswer:",
        "answer": "hello",
        "references": ["hello", "hi there"],
    }


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        ([["a"], ["b"], ["a"], ["b"]], [["a"]], ["a", "b"]),
        ([["a"], ["b"], ["a"]], [["a"]], []),  # less than twice each
        ([["a"], ["a"]], [["b"]], []),  # an answer that training has not
        ([["a", "b"], ["a"]], [["a"]], []),  # several answers
        ([[str(n % 65)] for n in range(200)], [["0"]], []),  # too many
    ],
)
def test_closed_set(train: list[list[str]], test: list[list[str]], labels: list[str]) -> None:
    assert closed_set({"train": train, "test": test}) == labels


def test_rows_are_drawn_by_the_seed_and_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path / "s" / "t" / "train.jsonl", [(f"{n:03}", "ab"[n % 2]) for n in range(100)])
    write(tmp_path / "s" / "t" / "test.jsonl", [("x", "a")])

    def texts(seed: int) -> list[str]:
        stream = load_stream(tmp_path / "s", train_rows=10, seed=seed, cache=tmp_path / "cache")
        return list(stream.tasks["t"].train["text"])

    assert len(texts(0)) == 10
    assert texts(0) == texts(0) == sorted(texts(0))
    assert texts(0) != texts(1)


def test_rows_that_are_held_out_leave_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_task(tmp_path / "s" / "t")
    write(tmp_path / "s" / "t" / "test.jsonl", [("moss", "green"), ("sky", "blue"), ("frog", "green")])
    with caplog.at_level(logging.WARNING):
        task = load_stream(tmp_path / "s", cache=tmp_path / "cache").tasks["t"]
    assert task.train["text"] == ["grass", "leaf", "sea"]
    assert task.validation.num_rows == 0
    assert "task t: left out 1 of 4 train rows" in caplog.text


def test_csv_keeps_words_that_look_like_missing_values(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "t"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(f"text,label\n{split} one,NA\n{split} null,null\n")
    task = load_stream(tmp_path / "s", cache=tmp_path / "cache").tasks["t"]
    assert task.train["answer"] == ["NA", "null"]


def test_what_is_said_about_wrong_data(tmp_path: Path) -> None:
    cache, data = tmp_path / "cache", tmp_path / "data"
    write_task(data)
    with pytest.raises(StreamError, match=r"no column 'body'; the columns are \['text', 'label'\]"):
        load_one(cache, path=data, text="body")
    with pytest.raises(StreamError, match=r"split 'train', row 2: label 'blue' is not among"):
        load_one(cache, path=data, labels=["green"])
    with pytest.raises(StreamError, match="no file for split 'test'"):
        load_one(cache, path=data, splits={"train": "train.jsonl"})
    write(data / "test.jsonl", [("grass", ""), ("x", "blue")])
    with pytest.raises(StreamError, match="split 'test', row 1: the answer is empty"):
        load_one(cache, path=data, kind="generation")
    write(data / "test.jsonl", [("grass", None), ("x", "blue")])
    with pytest.raises(StreamError, match=r"split 'test': .*test\.jsonl, line 1: 'label' has no value; fill it in"):
        load_one(cache, path=data)
    (data / "test.jsonl").write_text("{broken")
    with pytest.raises(StreamError, match=r"test\.jsonl, line 1: is no JSON: Expecting property name"):
        load_one(cache, path=data)
    write(data / "train.jsonl", [("moss", "green")])
    write(data / "test.jsonl", [("moss", "green")])
    with pytest.raises(StreamError, match="split 'train' has no rows"):
        load_one(cache, path=data)


@pytest.mark.parametrize("rows", [1, 2, None])
def test_a_wrong_row_has_its_number_in_the_data_however_few_are_drawn(tmp_path: Path, rows: int | None) -> None:
    data = tmp_path / "data"
    write(data / "train.jsonl", [*COLOURS, ("coal", "black"), *COLOURS])
    write(data / "test.jsonl", [("grass", "green")])
    stream = {"tasks": [{"name": "t", "path": data, "labels": ["green", "blue"]}]}
    for seed in range(4):
        with pytest.raises(StreamError, match=rf"split 'train', row {len(COLOURS) + 1}: label 'black' is not among"):
            load_stream(stream, train_rows=rows, seed=seed, cache=tmp_path / "cache")


def test_space_around_a_label_makes_no_other_label(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data / "train.jsonl", [(text, f" {label}" if n else label) for n, (text, label) in enumerate(COLOURS)])
    write(data / "test.jsonl", [("moss", "green\n"), ("jeans", "blue")])
    task = load_one(tmp_path / "cache", path=data)
    assert task.labels == ("blue", "green") and task.test["answer"] == ["green", "blue"]
    assert load_one(tmp_path / "cache", path=data, labels=[" green", "blue"]).labels == ("green", "blue")


def test_a_stray_label_that_makes_a_generation_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    write(data / "train.jsonl", COLOURS)
    write(data / "test.jsonl", [*((f"t{n}", "green") for n in range(12)), ("coal", "Black")])
    with caplog.at_level(logging.WARNING):
        assert load_one(tmp_path / "cache", path=data).kind == "generation"
    assert "1 of 13 held-out rows answer otherwise ('Black'), so it is taken as generation" in caplog.text


def test_two_files_for_a_split_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_task(data)
    write(data / "train.csv", COLOURS)
    with pytest.raises(StreamError, match=r"split 'train': .*data has train.csv and train.jsonl; leave one, or name"):
        load_one(tmp_path / "cache", path=data)
    splits = {"train": "train.jsonl", "test": "test.jsonl"}
    assert len(load_one(tmp_path / "cache", path=data, splits=splits).train) == len(COLOURS)


def test_every_reference_of_a_classification_is_a_label(tmp_path: Path) -> None:
    rows = {"train": COLOURS, "test": [("moss", ["green", "Green."])]}
    write_sapt(tmp_path / "s" / "t", rows)
    (tmp_path / "s" / "t" / "labels.json").write_text('["green", "blue"]')
    with pytest.raises(StreamError, match=r"split 'test', row 1: label 'Green\.' is not among"):
        load_stream(tmp_path / "s")


def test_what_is_said_about_wrong_sapt_folders(tmp_path: Path) -> None:
    write_sapt(tmp_path / "a" / "t", {"train": [("x", "y")]})
    with pytest.raises(StreamError, match=r"no .*test\.json"):
        load_stream(tmp_path / "a")
    (tmp_path / "a" / "t" / "test.json").write_text('{"Instances": [{"input": "x"}]}')
    with pytest.raises(StreamError, match="instance 1: wanted 'input' and 'output'"):
        load_stream(tmp_path / "a")
    (tmp_path / "a" / "t" / "test.json").write_text("[]")
    with pytest.raises(StreamError, match="no list 'Instances'"):
        load_stream(tmp_path / "a")


def test_a_folder_is_called_by_its_name_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "mine" / "colours")
    monkeypatch.chdir(tmp_path / "mine")
    assert load_stream(".").name == "mine"


def test_what_is_said_about_labels_that_yaml_reads_otherwise(tmp_path: Path) -> None:
    for labels, found in (
        ("{p: yes, q: no}", "True for 'p'"),
        ("{no: a}", "'a' for False"),
        ("[a, no]", "False for 1"),
    ):
        (tmp_path / "s.yaml").write_text(f"tasks: [{{name: t, path: ., labels: {labels}}}]")
        with pytest.raises(
            StreamError, match=rf"a stream: tasks\.0\.labels: found {found}, wanted text; .* in quotes;"
        ):
            load_stream(tmp_path / "s.yaml")


def test_what_is_said_about_wrong_specs(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"tasks\.0\.text: found \[\], wanted a column, or a list of at least one"):
        load_one(tmp_path, path=tmp_path, text=[])
    with pytest.raises(StreamError, match="did you mean 'quickstart'"):
        load_stream("quickstrat")
    with pytest.raises(StreamError, match="real-5, real-14; your own is a folder"):
        load_stream("zzz")
    with pytest.raises(StreamError, match=r"tasks\.0\.colour: Extra inputs"):
        load_one(tmp_path, path=tmp_path, colour="red")
    with pytest.raises(StreamError, match="needs either 'path' or 'hub'"):
        load_one(tmp_path)
    with pytest.raises(StreamError, match="holds no task"):
        load_stream(tmp_path)
    with pytest.raises(StreamError, match="are listed twice"):
        load_stream({"tasks": [{"name": "a", "hub": "x"}, {"name": "a", "hub": "y"}]})
    with pytest.raises(StreamError, match=r"order 1: it lists \['a', 'b'\]"):
        load_stream(StreamSpec.model_validate({"tasks": [{"name": "a", "hub": "x"}], "orders": [["a", "b"]]}))
    (tmp_path / "s.yaml").write_text("tasks: [")
    with pytest.raises(StreamError, match="is not YAML"):
        load_stream(tmp_path / "s.yaml")
