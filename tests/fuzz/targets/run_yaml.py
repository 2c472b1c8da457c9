"""The YAML of a run, and values given by ``--set``."""

from __future__ import annotations

from contextlib import suppress

from mbf.run.config import ConfigError, RunConfig, parse_config, read_yaml, set_keys
from mbf.streams.yaml_file import YamlError, parse_yaml

from . import stream_yaml
from ._files import written

WORDS = [*stream_yaml.WORDS, b"methods: ", b"slao", b"train: ", b"lora: ", b"r: ", b"-1", b"1e400", b"../../x"]


def seeds() -> list[bytes]:
    return [
        b"stream: quickstart\nmethods: [slao, {name: slao, label: x, basis: rsvd}]\norders: [1, 2]\nseeds: 3\n",
        b"stream: {tasks: [{name: a, path: a}]}\nlora: {r: 4, target_modules: all-linear}\ntrain: {lr: 1e-4}\n",
        b"1e-3",
        b"[q_proj, v_proj]",
    ]


def one(data: bytes) -> None:
    with suppress(ConfigError):
        config = parse_config(read_yaml(written(data, "run.yaml")), "run.yaml")
        assert isinstance(config, RunConfig)
        assert parse_config(config.plain()).sha256() == config.sha256()
    with suppress(ConfigError, YamlError):
        parse_config(set_keys({"stream": "quickstart"}, {"train.lr": parse_yaml(data.decode("utf-8", "replace"))}))
