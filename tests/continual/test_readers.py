"""Whatever the readers of learners and adapters are given, they take it whole or refuse it in their own words."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mbf.continual.header import HEADER, PARTS, CheckpointError, Header
from mbf.methods._state import Factors, State, gather, spread
from mbf.peft.stored import CONFIG, check_config

GOOD = {
    "format": "mbf-learner",
    "version": 1,
    "method": "slao",
    "options": {},
    "callable_options": [],
    "adapter": "default",
    "history": [{"index": 1, "name": "one", "steps": 3, "seconds": 0.5}],
    "layers": {"model.q_proj": [2, 4, 3, 2.0]},
    "sha256": dict.fromkeys(PARTS, "0" * 64),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.text(string.ascii_letters + "_", min_size=1, max_size=5)
TENSORS = st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape))
STATES = st.dictionaries(
    KEYS,
    st.one_of(
        st.integers(-(1 << 62), 1 << 62),
        st.floats(allow_nan=False, allow_infinity=False),
        TENSORS,
        st.lists(TENSORS, min_size=1, max_size=12),
        st.lists(TENSORS, min_size=1, max_size=12).map(lambda ts: Factors(ts, [t + 1 for t in ts])),
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(GOOD)), value=JSON)
def test_headers(key: str, value: Any) -> None:
    path = Path("/learner") / HEADER
    try:
        header = Header.parse({**copy.deepcopy(GOOD), key: value}, path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert sorted(header.sha256) == sorted(PARTS) and header.format == "mbf-learner" and header.version == 1


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_headers_of_anything(data: Any) -> None:
    with pytest.raises(CheckpointError, match="is not a learner's header"):
        Header.parse(data, Path("learner.json"))


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(["r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"]),
    value=JSON,
)
def test_configurations(key: str, value: Any) -> None:
    try:
        config = check_config({"peft_type": "LORA", "target_modules": ["q_proj"], key: value}, Path("/a") / CONFIG)
    except ValueError as error:
        assert f"/a/{CONFIG}: {key} is " in str(error)
        return
    assert getattr(config, key) == value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Factors):
        return isinstance(b, Factors) and same(a.A, b.A) and same(a.B, b.B)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b


@settings(max_examples=200, deadline=None)
@given(STATES, st.randoms())
def test_states_come_back_in_whatever_order(state: State, random: Any) -> None:
    flat = list(spread(state).items())
    random.shuffle(flat)
    found = gather(dict(flat))
    assert set(found) == set(state) and all(same(found[key], state[key]) for key in state)


@settings(max_examples=300, deadline=None)
@example({"a": torch.ones(()), "a.number": torch.ones(())})
@example({"a.number": torch.ones(()), "a": torch.ones(())})
@given(st.dictionaries(st.from_regex(r"[ab](\.([AB]|number|[0-2]|.)){0,3}", fullmatch=True), TENSORS, max_size=6))
def test_names_of_anything(flat: dict[str, torch.Tensor]) -> None:
    """Taken, nothing is left out; else it is refused."""
    try:
        state = gather(flat)
    except ValueError:
        return
    again = spread(state)
    assert set(again) == set(flat) and all(name.endswith(".number") or again[name] is flat[name] for name in flat)
