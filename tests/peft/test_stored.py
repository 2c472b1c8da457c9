"""Patterns of layers in a stored adapter: ordinary ones are taken, those that take long to match are refused first."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from mbf.peft.config import describe_ranks
from mbf.peft.stored import CONFIG, PREFIX, WEIGHTS, check_config, check_factors, rank_of

PATH, FILE = Path("/adapter") / CONFIG, Path("/adapter") / WEIGHTS
# What a widespread way to choose the layers of a model of text and images writes.
OF_MANY_FAMILIES = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj)))"
)
ORDINARY = (
    "q_proj",
    r"model\.layers\.\d+\.q_proj",
    r".*\.(q|v)_proj",
    r"^model\.decoder\.layers\.(0|1)\.",
    r"layers\.([0-9]+)\.self_attn\..*",
    r".*layers\.\d+\.mlp\.experts\.\d+\..*",
    r"(?:\w+\.)*q_proj",
    r"^(?!.*(vision|audio)).*\.(q|v)_proj",
)


def config(**fields: Any) -> LoraConfig:
    return check_config({"peft_type": "LORA", "r": 2, **fields}, PATH)


def tensors(*names: str, r: int = 2) -> dict[str, Tensor]:
    both = {f"{PREFIX}{name}.lora_A.weight": torch.ones(r, 4) for name in names}
    return both | {f"{PREFIX}{name}.lora_B.weight": torch.ones(3, r) for name in names}


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_taken(pattern: str) -> None:
    name = "model.layers.0.self_attn.q_proj"
    found = config(rank_pattern={pattern: 3}, alpha_pattern={pattern: 5}, target_modules=pattern)
    r = rank_of(found, PREFIX + name)
    assert r == (3 if re.match(rf"(.*\.)?({pattern})$", name) else 2)
    check_factors(tensors(name, r=r), found, FILE)


def test_patterns_of_target_modules_are_taken() -> None:
    for pattern in (OF_MANY_FAMILIES, "all-linear", r"(?i).*\.Q_proj"):
        assert config(target_modules=pattern, exclude_modules=pattern).target_modules == pattern


def test_a_pattern_for_every_one_of_many_layers_is_taken() -> None:
    pairs = {f"model.layers.{n}.self_attn.q_proj": (2 + n % 2, 4.0 + n % 3) for n in range(600)}
    fields = describe_ranks(pairs)
    assert len(fields["rank_pattern"]) == 300
    check_factors(tensors(*(n for n, (r, _) in pairs.items() if r == 2)), config(**fields), FILE)
    plain = {name: 2 for name in pairs}
    assert config(rank_pattern=plain).rank_pattern == plain


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("(a+)+b", "countless"),
        ("(?:(a|b)*c?)*d", "countless"),
        ("(a|a)*b", "countless"),
        ("(a|aa){31}b", "countless"),
        ("(?=(a*)*b)a", "countless"),
        ("(.|.){25}b", r"[\d,]+"),
        ("a?" * 28 + "b", r"[\d,]+"),
        (".*" * 6 + "b", r"[\d,]+"),
        (".*?" * 6 + "b", r"[\d,]+"),
        ("(?i:(ax|AX)*)b", "countless"),
        ("(?i:a*A*A*a*A*a*)b", r"[\d,]+"),
    ],
)
def test_patterns_that_take_long_are_refused(field: str, pattern: str, steps: str) -> None:
    value = {pattern: 2} if field.endswith("_pattern") else pattern
    found = pattern if len(pattern) < 58 else pattern[:40]
    message = (
        rf"^/adapter/adapter_config\.json: {field} has '{re.escape(found)}.*, which may take {steps} steps to match a "
        r"name of 128 characters, wanted at most 100,000,000; write it with fewer of \*, \+, \? and \|$"
    )
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


def test_patterns_that_take_long_are_refused_in_layers_pattern() -> None:
    with pytest.raises(ValueError, match=r"layers_pattern has '\(a\+\)\+b', which may take countless steps"):
        config(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers", "(a+)+b"])
    kept = config(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers", "h"])
    assert kept.layers_pattern == ["layers", "h"]


def test_a_pattern_of_many_characters_is_refused() -> None:
    message = r"rank_pattern has 'aaa.*, of 1001 characters, wanted a pattern of at most 1000; write it as several"
    with pytest.raises(ValueError, match=message):
        config(rank_pattern={"a" * 1001: 2})
    config(rank_pattern={"a" * 1000: 2})


def test_many_patterns_are_refused_that_take_long_together() -> None:
    message = r"alpha_pattern has 9 patterns, which may take [\d,]+ steps .*; write fewer, with fewer of"
    with pytest.raises(ValueError, match=message):
        config(alpha_pattern={rf".*.*.*{n}": 2 for n in range(9)})


def test_names_of_many_characters_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"safetensors holds 'a+\.\.\., a name of 201 characters, wanted at most 200; r"
    ):
        check_factors(tensors("a" * 201), config(), FILE)
    check_factors(tensors("a" * 200), config(), FILE)


def test_many_names_are_refused_that_take_long_together() -> None:
    message = (
        r"holds 50 layers, whose names may take [\d,]+ steps to match the 1 patterns of rank_pattern in "
        r"adapter_config\.json, wanted at most 10,000,000,000; write them with fewer of"
    )
    with pytest.raises(ValueError, match=message):
        check_factors(tensors(*(f"{n:.>200}" for n in range(50))), config(rank_pattern={".*.*.*b": 2}), FILE)


@pytest.mark.parametrize("pattern", [".*.*[.]*[cd]", "(.|.){10}.*.b", "(.|.|.){10}b", r"(.*\.){2}[ce]"])
def test_what_is_taken_takes_no_longer(pattern: str) -> None:
    found = config(rank_pattern={pattern: 3})
    for letter in "a.":
        begun = time.perf_counter()
        assert rank_of(found, PREFIX + letter * 128) == 2
        assert time.perf_counter() - begun < 5, pattern
