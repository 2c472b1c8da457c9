"""The frozen linear layers around the adapters, as if torch were slow at them on this machine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mbf
import mbf.peft.frozen
from mbf.peft.frozen import FrozenLinear
from tests.peft.helpers import copies, llama, tokens

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every x that ``frozen_linear`` was given; it gains from two rows on, in fp32 and bf16."""
    shapes: list[tuple[int, ...]] = []
    compute = mbf.peft.frozen.frozen_linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return compute(x, *rest)

    monkeypatch.setattr(mbf.peft.frozen, "frozen_linear", counted)
    monkeypatch.setattr(mbf.peft.frozen, "gains", lambda dtype, rows: dtype in DTYPES and rows >= 2)
    return shapes


def frozen_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is FrozenLinear]


def layer(dtype: torch.dtype = torch.float32) -> FrozenLinear:
    plain = nn.Linear(12, 10).to(dtype).requires_grad_(False)
    plain.__class__ = FrozenLinear
    return plain  # type: ignore[return-value]


def test_only_what_peft_does_not_hold(computed: list[tuple[int, ...]]) -> None:
    model = llama(target_modules=["q_proj", "gate_proj"], modules_to_save=["o_proj"])
    report = mbf.fuse(model)
    wanted = [f"{part}_proj" for part in ("k", "v", "up", "down")]
    assert {name.split(".")[-1] for name in report.frozen} == {*wanted, "original_module", "lm_head"}
    assert list(report.frozen) == frozen_layers(model)
    assert f"{len(report.frozen)} x frozen linear layer without adapter" in str(report)
    mbf.unfuse(model)
    assert frozen_layers(model) == []
    assert not any(name in repr(model) for name in ("FrozenLinear", "FusedLinear"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_learns_the_same(computed: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    model = llama(target_modules=["q_proj", "v_proj"]).to(dtype).train()
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    mbf.fuse(model)
    ids = tokens(2, 9)
    found = []
    for one in (model, twin, exact):
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.double() for p in one.parameters() if p.grad is not None]
        found.append(torch.cat([loss.detach().double().view(1), *(grad.flatten() for grad in grads)]))
    assert (2, 9, 32) in computed and len(computed) == 2 * 5 + 1  # k, o, gate, up and down of two blocks, lm_head
    errors = [(one - found[2]).norm() / found[2].norm() for one in found[:2]]
    assert errors[0] <= 2 * errors[1] + 1e-6


def test_nothing_is_swapped_where_torch_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mbf.peft.frozen, "gains", lambda dtype, rows: False)
    model = llama(target_modules=["q_proj"])
    assert mbf.fuse(model).frozen == () and frozen_layers(model) == []


def test_nothing_is_swapped_where_no_adapter_is_fused(computed: list[tuple[int, ...]]) -> None:
    model = llama(target_modules=["q_proj"], use_dora=True)
    assert mbf.fuse(model).frozen == () and frozen_layers(model) == []


def test_context_restores(computed: list[tuple[int, ...]]) -> None:
    model = llama(target_modules=["q_proj"])
    with mbf.fused(model) as report:
        assert list(report.frozen) == frozen_layers(model) != []
        with mbf.fused(model):
            pass
        assert list(report.frozen) == frozen_layers(model)
    assert frozen_layers(model) == []


def test_states_and_copies(computed: list[tuple[int, ...]]) -> None:
    model = llama(target_modules=["q_proj"]).eval()
    keys, ids = list(model.state_dict()), tokens()
    names = mbf.fuse(model).frozen
    assert list(model.state_dict()) == keys
    expected = model(ids).logits
    for twin in copies(model):
        assert frozen_layers(twin) == list(names)
        assert torch.equal(twin(ids).logits, expected)


def test_an_adapter_that_comes_later_is_fused_around_it(computed: list[tuple[int, ...]]) -> None:
    from peft import LoraConfig

    model = llama(target_modules=["q_proj"])
    mbf.fuse(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    model.set_adapter("second")
    report = mbf.fuse(model, strict=True)
    assert sum(name.endswith("k_proj") for name in report.fused) == 2
    before = mbf.peft.calls.copy()
    model(tokens())
    assert mbf.peft.calls["slow"] == before["slow"]


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.weight.requires_grad_(),
        lambda one: one.bias.requires_grad_(),
        lambda one: setattr(one, "weight", nn.Parameter(one.weight.double(), requires_grad=False)),
        lambda one: one.to_empty(device="meta"),
    ],
    ids=["weight trains", "bias trains", "another dtype", "another device"],
)
def test_left_to_torch(computed: list[tuple[int, ...]], change: Any) -> None:
    one = layer()
    change(one)
    x = torch.randn(4, 12)
    try:
        y = one(x)
    except RuntimeError:  # torch's own complaint
        pass
    else:
        assert torch.equal(y, F.linear(x, one.weight, one.bias))
    assert computed == []


def test_calls_left_to_torch(computed: list[tuple[int, ...]]) -> None:
    one, x = layer(), torch.randn(4, 12)
    assert torch.equal(one(x[:1]), F.linear(x[:1], one.weight, one.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert one(x).dtype is torch.bfloat16
    torch.func.vmap(one)(x)
    torch.func.jvp(one, (x,), (x,))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        one(torch.randn(4, 11))
    assert computed == []
    torch.testing.assert_close(one(x), F.linear(x, one.weight, one.bias))
    assert computed == [(4, 12)]


def test_compiles_in_one_graph(computed: list[tuple[int, ...]]) -> None:
    one, x = layer(), torch.randn(70, 12, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(one, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, F.linear(x, one.weight, one.bias))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, one.weight.sum(0).expand(70, 12))


@pytest.mark.parametrize("rows", [5, 70])
def test_compiles_in_one_graph_by_what_gains_here(rows: int) -> None:
    one, x = layer(), torch.randn(rows, 12)
    torch._dynamo.reset()
    y = torch.compile(one, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, F.linear(x, one.weight, one.bias))


def test_hooks_on_the_layer_are_called(computed: list[tuple[int, ...]]) -> None:
    one, seen = layer(), []
    one.register_forward_hook(lambda module, given, y: seen.append(y.shape))
    one(torch.randn(4, 12))
    assert seen == [(4, 10)] and computed == [(4, 12)]
