"""The registry and what every method must declare."""

import pytest
import torch

from mbf import methods
from mbf.methods import Method, MethodInfo, Options
from tests.methods.plain import assert_same, learn, method


def test_the_methods_that_ship():
    assert set(methods.available()) >= {"slao", "seqlora", "inclora", "olora", "magmax", "opcm", "multitask"}


@pytest.mark.parametrize("name", methods.available())
def test_declarations(name):
    cls = methods.get(name)
    assert cls.name == name and isinstance(cls.info, MethodInfo) and issubclass(cls.Options, Options)
    assert cls.__doc__ and cls.info.memory and cls.info.merge


@pytest.mark.parametrize("name", [n for n in methods.available() if n != "multitask"])
def test_state_dict_round_trip_gives_the_same_next_start(name):
    rule = method(name)
    for i in (1, 2):
        learn(rule, i)
    twin = method(name)
    for layer, other in zip(twin.layers, rule.layers, strict=True):
        layer.W = other.W  # of which some methods' starts are made
    twin.write(rule.current)
    twin.load_state_dict(rule.state_dict())
    torch.manual_seed(11)
    a = learn(rule, 3)[0]
    torch.manual_seed(11)
    b = learn(twin, 3)[0]
    assert_same(a.A, b.A)
    assert_same(a.B, b.B)
    assert_same(rule.current.B, twin.current.B)


def test_unknown_method_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match=r"'slaoo' is unknown; did you mean 'slao'\?.*seqlora"):
        methods.get("slaoo")


def test_a_taken_name_is_refused():
    class Other(Method):
        name = "slao"

    with pytest.raises(ValueError, match=r"taken by mbf\.methods\.slao\.Slao"):
        methods.register(Other)
    assert methods.get("slao") is not Other


def test_seqlora_keeps_nothing():
    rule = method("seqlora")
    _, finetuned, merged = learn(rule, 1)
    assert_same(merged.B, finetuned.B)
    start, _, _ = learn(rule, 2)
    assert_same(start.A, finetuned.A)
    assert rule.state_bytes() == 0
