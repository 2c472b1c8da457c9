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
