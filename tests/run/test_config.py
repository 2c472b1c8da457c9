"""The configuration: what a user may write, and the one line that each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbf.run import ConfigError, RunConfig, load_config
from mbf.run.config import differences, parse_config
from mbf.streams import StreamError, load_stream


def complaint(tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


def test_defaults_are_those_of_the_probe() -> None:
    config = RunConfig.from_stream("quickstart")
    assert [spec.name for spec in config.methods] == ["slao"] and config.orders == [1] and config.seeds == [0]
    assert (config.lora.r, config.lora.alpha, config.train.lr, config.train.text_tokens) == (8, 16, 1e-3, 48)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stream: s\ntrain: {epoch: 2}", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("stream: s\nmetods: [slao]", "metods: unknown key; did you mean 'methods'?"),
        ("stream: s\neval: {zzz: 2}", "eval.zzz: unknown key; known: rows, batch_size, every"),
        ("stream: s\ntrain: {lr: fast}", "train.lr: found 'fast', wanted a valid number"),
        ("stream: s\ntrain: {lr: .inf}", "train.lr: found inf, wanted a finite number"),
        ("stream: s\nlora: {alpha: .nan}", "lora.alpha: found nan, wanted a finite number"),
        ("stream: s\ntrain: {epochs: 0}", "train.epochs: found 0, wanted greater than or equal to 1"),
        ("stream: s\ntrain: 3", "train: found 3, wanted"),
        ("stream: s\nlora: {target_modules: [1]}", "lora.target_modules: found [1], wanted a list of module names"),
        ("stream: s\nlora: {dropout: 1}", "lora.dropout: found 1, wanted less than 1"),
        ("stream: 3", "stream: found 3, wanted a packaged stream's name"),
        ("model: m", "stream: is missing; add it"),
        ("stream: s\nseeds: [20240101]", "seeds.0: found 20240101, wanted less than or equal to 429495"),
        ("stream: s\norders: [0]", "orders.0: found 0, wanted greater than or equal to 1"),
        ("stream: s\nseeds: [1, 1]", "seeds: 1 is there more than once"),
        ("stream: s\nmethods: [slao, slao]", "methods: slao is there more than once; give each a label of its own"),
        ("stream: s\nmethods: [slow]", "method 'slow' is unknown"),
        (
            "stream: s\nmethods: [{name: slao, basis: svd}]",
            "methods.0: slao: basis: found 'svd', wanted 'qr' or 'rsvd'",
        ),
        ("stream: s\nmethods: [{name: slao, base: qr}]", "methods.0: slao: base: unknown key; did you mean 'basis'?"),
        ("stream: s\nmethods: [{name: slao, label: a/b}]", "methods.0.label: found 'a/b', wanted letters"),
        ("stream: s\nmethods: [3]", "methods.0: found 3, wanted a method's name"),
        ("stream: s\nmethods: []", "methods: found [], wanted"),
        ("- a\n- b", "found list, wanted keys and values"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str, wanted: str) -> None:
    message = complaint(tmp_path, text)
    assert wanted in message
    assert "\n" not in message


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    lines = complaint(tmp_path, "stream: s\ntrain: {lr: x, epochs: -1}\nfuze: true").splitlines()
    assert len(lines) == 3


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stream: s")
    with pytest.raises(ConfigError, match=r"min\.yaml: no such file; did you mean .*mine\.yaml"):
        load_config(tmp_path / "min.yaml")


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads ``1e-4`` as a string."""
    file = tmp_path / "run.yaml"
    file.write_text("stream: s\ntrain: {lr: 1e-4}\nmethods: seqlora\nseeds: 3")
    config = load_config(file)
    assert config.train.lr == 1e-4
    assert config.methods[0].name == "seqlora" and config.seeds == [3]


def test_settings_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stream: s\ntrain: {lr: 0.5, epochs: 3}")
    config = load_config(file, {"train.lr": 0.25, "eval.rows": 7, "methods": ["slao", "seqlora"]})
    assert (config.train.lr, config.train.epochs, config.eval.rows, len(config.methods)) == (0.25, 3, 7, 2)
    with pytest.raises(ConfigError, match=r"train.lrr: unknown key; did you mean 'lr'"):
        load_config(file, {"train.lrr": 0.25})
    with pytest.raises(ConfigError, match=r"stream.name: 'stream' holds 's', wanted a section"):
        load_config(file, {"stream.name": "x"})


def test_a_stream_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "run.yaml").write_text("stream: mine")
    assert load_config(tmp_path / "run.yaml").stream == str(tmp_path / "mine")


def test_the_tasks_of_a_stream_in_place_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "stream: {tasks: [{name: a, path: mine/a}, {name: b, path: /b}, {name: c, hub: c}]}"
    )
    stream = load_config(tmp_path / "run.yaml").stream
    assert isinstance(stream, dict)
    assert [task.get("path") for task in stream["tasks"]] == [str(tmp_path / "mine" / "a"), "/b", None]


def test_a_stream_s_path_does_not_depend_on_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert RunConfig.from_stream("mine").stream == str(tmp_path / "mine")
    assert RunConfig.from_stream("quickstart").stream == "quickstart"  # the packaged one


def test_a_stream_s_own_yaml_is_a_stream(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("tasks: [{name: a, path: a}]")
    config = load_config(tmp_path / "mine.yaml")
    assert config.stream == str(tmp_path / "mine.yaml") and config.stream_name == "mine"


def test_options_survive_the_round_trip() -> None:
    config = RunConfig.from_stream("s", methods=["seqlora", {"name": "slao", "label": "slao-rsvd", "basis": "rsvd"}])
    again = RunConfig.model_validate(config.plain())
    assert again == config and again.sha256() == config.sha256()
    assert again.methods[1].options == {"basis": "rsvd"}


def test_the_hash_is_of_what_decides_the_results() -> None:
    config = RunConfig.from_stream("s")
    assert config.sha256() == RunConfig.from_stream("s", output="elsewhere").sha256()
    assert config.sha256() != RunConfig.from_stream("s", train={"lr": 1e-4}).sha256()


def test_differences_name_the_keys() -> None:
    a, b = RunConfig.from_stream("s"), RunConfig.from_stream("s", train={"lr": 0.5}, seeds=[1])
    assert differences(a.plain(), b.plain()) == ["seeds: [0] -> [1]", "train.lr: 0.001 -> 0.5"]


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody/" + "b/" * 3000, "\0"])
def test_a_name_that_no_file_can_have_is_a_name(name: str) -> None:
    assert parse_config({"stream": name}).stream == name
    with pytest.raises(StreamError, match="there is no stream"):
        load_stream(name)
    with pytest.raises(StreamError, match=r"task 't'.*(cannot be read|no file for split 'train')"):
        load_stream({"tasks": [{"name": "t", "path": name}]})


@pytest.mark.parametrize("name", ["", "two\nlines", "\ud800", "nul\0"])
def test_a_name_that_cannot_be_shown_is_refused_before_anything_is_learned(name: str) -> None:
    task = {"name": "t", "path": "."}
    for data in ({"name": name, "tasks": [task]}, {"tasks": [task | {"name": name}]}):
        with pytest.raises(StreamError, match=r"name: .*found the name .*, which cannot be shown in a line; take out"):
            load_stream(data)
