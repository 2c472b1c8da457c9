"""What a layer gives in a state of the table, and what must hold between the fused layer's results and PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import mbf.peft

from .helpers import assert_as_accurate, swapped
from .states import DTYPES, State


def operands(state: State, dtype: str, layer: Any) -> tuple[Tensor, Tensor]:
    """x in the base's dtype, and a gradient for the output."""
    x = state.x()
    return x.to(DTYPES[dtype][0]), torch.randn(*x.shape[:-1], layer.out_features)


def outcome(state: State, layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor] | tuple[type, str]:
    """Output and every gradient of the layer, or the error that it raises."""
    torch.manual_seed(5)
    leaf = x.detach().clone().requires_grad_(state.x_trains)
    layer.zero_grad()
    try:
        with state.around():
            y = layer(leaf, **state.call)
            y.backward(dy.to(y.dtype))
    except RuntimeError as error:
        return type(error), str(error)
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | ({"x": leaf.grad} if state.x_trains else {}) | found  # type: ignore[dict-item]


def in_fp64(layer: Any) -> Any:
    wide = copy.deepcopy(layer).double()
    for adapter, scale in wide.scaling.items():
        wide.scaling[adapter] = scale.double() if isinstance(scale, Tensor) else scale
    return wide


def check(state: State, dtype: str) -> None:
    """``compare`` for a row of the table in one column."""
    layer = state.layer(dtype)
    compare(state, layer, *operands(state, dtype, layer))


def compare(state: State, layer: Any, x: Tensor, dy: Tensor) -> None:
    """The fused layer is as accurate as PEFT's, or PEFT's bit for bit, and computed by whom the state says."""
    fused = swapped(layer)
    for one in (layer, fused):
        state.change(one)
    exact_layer = in_fp64(layer) if state.fused else None
    stock = outcome(state, layer, x, dy)
    before = mbf.peft.calls.copy()
    ours = outcome(state, fused, x, dy)
    assert mbf.peft.calls - before == {"fast" if state.fused else "slow": 1}
    if isinstance(stock, tuple) or isinstance(ours, tuple):
        assert ours == stock and not state.fused
        return
    assert ours.keys() == stock.keys() and len(ours) >= 1
    if exact_layer is None:
        for name, value in stock.items():
            assert type(ours[name]) is type(value) and torch.equal(ours[name], value), name
        return
    exact = outcome(State(state.name, True, x_trains=state.x_trains), exact_layer, x.double(), dy.double())
    assert isinstance(exact, dict) and exact.keys() == stock.keys()
    for name, value in stock.items():
        assert_as_accurate(ours[name], value, exact[name], name)
