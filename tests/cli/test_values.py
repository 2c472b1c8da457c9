from __future__ import annotations

import pytest
import typer

from mbf.cli import values


def test_lists() -> None:
    assert values.words("--method", "slao, seqlora") == ["slao", "seqlora"]
    assert values.numbers("--order", "3,1") == [3, 1]


def test_settings_are_yaml() -> None:
    pairs = ["train.epochs=3", "a=true", "b=[q_proj, k_proj]", "c=1/i", "d=", "e=x=y"]
    wanted = {"train.epochs": 3, "a": True, "b": ["q_proj", "k_proj"], "c": "1/i", "d": None, "e": "x=y"}
    assert values.settings("--set", pairs) == wanted


@pytest.mark.parametrize("pair", ["epochs", "=3", "x=[1"])
def test_no_setting(pair: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"key=value|YAML"):
        values.settings("--set", [pair])


def test_methods_with_labels_and_options() -> None:
    assert values.methods("--methods", "slao, olora") == ["slao", "olora"]
    text = "slao,mean={name: slao, schedule: 1/i},x={name: olora, l1: 1.0}, y = {name: a, b: [1, 2], c: 'd, }'}"
    assert values.methods("--methods", text) == [
        "slao",
        {"name": "slao", "schedule": "1/i", "label": "mean"},
        {"name": "olora", "l1": 1.0, "label": "x"},
        {"name": "a", "b": [1, 2], "c": "d, }", "label": "y"},
    ]
    assert values.methods("--methods", "slao={start: zero}") == [{"name": "slao", "start": "zero", "label": "slao"}]


@pytest.mark.parametrize("text", ["", "slao,", "x=slao", "x={name: slao", "={name: slao}", "a,,b"])
def test_no_methods(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"label=|YAML"):
        values.methods("--methods", text)
