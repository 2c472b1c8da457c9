"""AdapterLayer: read, write and replace the factors of one adapter, and what plain PEFT then loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from mbf.ops import LoraTerms
from mbf.peft import AdapterLayer, FusedLinear, adapter_layers, fuse, fused, sync_config, unfuse

from .helpers import TARGETS, add, base_model, llama, lora, randomise, results, tokens, took


def write_ranks(layers: list[AdapterLayer], rank: Callable[[int], int]) -> None:
    for n, layer in enumerate(layers):
        r = rank(n)
        layer.write(torch.randn(r, layer.A.shape[1]), torch.randn(layer.B.shape[0], r))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_layers_are_the_live_parameters_in_order() -> None:
    model = llama(use_rslora=True, alpha_pattern={"v_proj": 3})
    layers = adapter_layers(model, "default")
    assert len(layers) == 14
    assert [layer.name for layer in layers][:2] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
    ]
    by_name = dict(model.base_model.model.named_modules())
    for layer in layers:
        module = by_name[layer.name]
        assert layer.A is module.lora_A["default"].weight and layer.B is module.lora_B["default"].weight
        assert layer.scale == (3 if "v_proj" in layer.name else 8) / 2
    layers[0].module.set_scale("default", 0.5)
    assert layers[0].scale == 2


def test_layer_ten_comes_after_layer_two() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    model = get_peft_model(model, LoraConfig(r=1, target_modules=[str(n) for n in range(12)]))
    assert [layer.name for layer in adapter_layers(model, "default")] == [str(n) for n in range(12)]


@pytest.mark.parametrize("build", ["inject", "transformers", "wrapped"])
def test_other_ways_to_hold_an_adapter(build: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if build == "inject":
        model: Any = inject_adapter_in_model(config, base_model())
    elif build == "transformers":
        model = base_model()
        model.add_adapter(config, adapter_name="default")
    else:
        model = nn.ModuleDict({"policy": llama(target_modules=["q_proj", "v_proj"])})
    layers = adapter_layers(model, "default")
    assert layers[0].name == "model.layers.0.self_attn.q_proj" and len(layers) == 4
    write_ranks(layers, lambda n: 5)
    sync_config(model, "default")
    configs = model["policy"].peft_config if build == "wrapped" else model.peft_config
    assert configs["default"].r == 5


def test_the_layers_of_one_adapter_of_two() -> None:
    model = llama(target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj", "q_proj"]))
    assert len(adapter_layers(model, "default")) == 2
    assert len(adapter_layers(model, "second")) == 4


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.embedding, self.convolution = nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, r"layer linear .*DoraLinearVariant.*use_dora=False"),
        ({"lora_bias": True}, r"layer linear .*lora_bias=False"),
        ({"target_modules": ["linear", "embedding"]}, r"layer embedding .*embedding.*target_modules"),
        ({"target_modules": ["linear", "convolution"]}, r"layer convolution .*Conv1d.*target_modules"),
        ({"target_parameters": ["head.weight"]}, r"layer head .*target_parameters"),
        ({"modules_to_save": ["head"]}, r"head .*modules_to_save"),
        ({"bias": "all"}, r"bias='all'.*bias='none'"),
    ],
)
def test_what_is_more_than_A_and_B_is_refused(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(Parts(), LoraConfig(**({"r": 2, "target_modules": ["linear"]} | options)))
    with pytest.raises(ValueError, match=message):
        adapter_layers(model, "default")


def test_a_refused_adapter_beside_ours_does_not_matter() -> None:
    model = get_peft_model(Parts(), LoraConfig(r=2, target_modules=["linear"]))
    model.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["linear"], modules_to_save=["head"]))
    assert [layer.name for layer in adapter_layers(model, "default")] == ["linear"]
    with pytest.raises(ValueError, match="DoraLinearVariant"):
        adapter_layers(model, "other")


def test_a_wrong_name_lists_the_right_ones() -> None:
    model = llama()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"no LoRA adapter 'defualt'; it has 'default', 'second'"):
        adapter_layers(model, "defualt")


def test_a_plain_model_is_told_how() -> None:
    with pytest.raises(ValueError, match="get_peft_model"):
        adapter_layers(base_model(), "default")


# -- writing -----------------------------------------------------------------------------------------------------------


def test_write_of_the_same_rank_keeps_the_parameters() -> None:
    model = llama()
    layer = adapter_layers(model, "default")[0]
    A0, B0, pointer = layer.A, layer.B, layer.A.data_ptr()
    A, B = torch.randn(layer.A.shape, dtype=torch.float64), torch.randn(layer.B.shape, dtype=torch.float64)
    layer.write(A, B)
    assert layer.A is A0 and layer.B is B0 and layer.A.data_ptr() == pointer
    assert torch.equal(layer.A, A.float()) and torch.equal(layer.B, B.float())


def test_write_of_another_rank_replaces_them_and_keeps_s() -> None:
    model = llama(lora_alpha=6)
    model.half()
    layer = adapter_layers(model, "default")[3]
    layer.B.requires_grad_(False)
    A, B = torch.randn(9, layer.A.shape[1]), torch.randn(layer.B.shape[0], 9)
    layer.write(A, B)
    assert layer.scale == 1.5 and layer.module.r["default"] == 9 and layer.module.lora_alpha["default"] == 13.5
    assert isinstance(layer.A, nn.Parameter) and layer.A.dtype == layer.B.dtype == torch.float16
    assert layer.A.requires_grad and not layer.B.requires_grad
    assert layer.module.lora_A["default"].out_features == layer.module.lora_B["default"].in_features == 9
    assert torch.equal(layer.A, A.half()) and torch.equal(layer.B, B.half())
    A.zero_()
    assert layer.A.count_nonzero() > 0


@pytest.mark.parametrize("shapes", [((4, 31), (32, 4)), ((4, 32), (32, 5)), ((0, 32), (32, 0)), ((4, 32), (31, 4))])
def test_write_of_wrong_shapes_changes_nothing(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    model = llama(target_modules=["q_proj"])
    layer = adapter_layers(model, "default")[0]
    before = copy.deepcopy(layer.module.state_dict())
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: got A .* must be \[r, 32\] and \[32, r\]"):
        layer.write(torch.randn(shapes[0]), torch.randn(shapes[1]))
    torch.testing.assert_close(layer.module.state_dict(), before, rtol=0, atol=0)


# -- the configuration follows -----------------------------------------------------------------------------------------


def described(config: LoraConfig) -> tuple[Any, ...]:
    return config.r, config.lora_alpha, dict(config.rank_pattern), dict(config.alpha_pattern)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
]
RANKS: list[Callable[[int], int]] = [lambda n: 4, lambda n: 12, lambda n: 3 + n % 4, lambda n: 1 + n]


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("rank", RANKS)
def test_saved_adapter_loads_in_plain_peft(options: dict[str, Any], rank: Callable[[int], int], tmp_path: Path) -> None:
    model, ids = llama(**options), tokens()
    fuse(model)
    layers = adapter_layers(model, "default")
    scales, start = [layer.scale for layer in layers], described(model.peft_config["default"])
    factors = [(layer.A.detach().clone(), layer.B.detach().clone()) for layer in layers]

    write_ranks(layers, rank)
    sync_config(model, "default")
    assert [layer.scale for layer in layers] == scales
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert {type(m) for m in loaded.modules() if isinstance(m, Linear)} == {Linear}
    logits = copy.deepcopy(model).double()(input_ids=ids).logits  # these weights amplify the rounding of fp32
    torch.testing.assert_close(
        loaded.double()(input_ids=ids).logits, logits, rtol=1e-9, atol=1e-9 * logits.abs().max().item()
    )

    for layer, (A, B) in zip(layers, factors, strict=True):
        layer.write(A, B)
    sync_config(model, "default")
    assert described(model.peft_config["default"]) == start
    assert {layer.module.lora_alpha["default"] for layer in layers} <= {8, 3}


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([2, 3, 5]), min_size=4, max_size=4),
    rslora=st.booleans(),
)
def test_any_mixture_of_ranks_is_described(ranks: list[int], rslora: bool) -> None:
    """PEFT builds the same (r, s) for every layer from the synchronised configuration, whatever the names look like."""

    def base() -> nn.Module:
        inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "1": nn.Linear(4, 4)})
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "1": nn.Linear(4, 4), "block": inner})

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["proj", "1"], use_rslora=rslora)
    model = inject_adapter_in_model(config, base())
    layers = adapter_layers(model, "default")
    write_ranks(layers, lambda n: ranks[n])
    sync_config(model, "default")
    again = adapter_layers(inject_adapter_in_model(copy.deepcopy(config), base()), "default")
    assert [layer.name for layer in again] == [layer.name for layer in layers]
    assert [layer.A.shape for layer in again] == [layer.A.shape for layer in layers]
    torch.testing.assert_close([layer.scale for layer in again], [layer.scale for layer in layers])


def test_a_uniform_rank_needs_no_patterns() -> None:
    model = llama(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})
    write_ranks(adapter_layers(model, "default"), lambda n: 6)
    sync_config(model, "default")
    assert described(model.peft_config["default"]) == (6, 12, {}, {})


def test_a_configuration_that_fits_is_left_alone() -> None:
    model = llama(rank_pattern={"q_proj": 2, "nowhere": 9})
    before = described(model.peft_config["default"])
    write_ranks(adapter_layers(model, "default"), lambda n: 2 if n % 7 == 5 else 4)
    sync_config(model, "default")
    assert described(model.peft_config["default"]) == before


def test_scaling_changed_by_hand_stays_and_is_not_saved() -> None:
    """As in PEFT: set_scale is a state of the running model, r and alpha are the adapter's."""
    model = llama(target_modules=["q_proj"])
    layers = adapter_layers(model, "default")
    for layer in layers:
        layer.module.set_scale("default", 3.0)
    write_ranks(layers, lambda n: 8)
    sync_config(model, "default")
    assert [layer.scale for layer in layers] == [6.0, 6.0]
    assert described(model.peft_config["default"])[:2] == (8, 16)


def test_adapter_padded_for_hotswap_is_saved_with_its_padded_rank(tmp_path: Path) -> None:
    model, ids = llama(r=3, lora_alpha=6), tokens()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layers = adapter_layers(model, "default")
    assert layers[0].scale == 2.0
    sync_config(model, "default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


# -- routing -----------------------------------------------------------------------------------------------------------


def layer_of(module: Any, adapter: str = "default") -> AdapterLayer:
    return adapter_layers(nn.Sequential(module), adapter)[0]


@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_a_route_computes_with_its_terms(kind: str) -> None:
    module = lora()
    if kind == "fused":
        module.__class__ = FusedLinear
    layer, x, dy = layer_of(module), torch.randn(6, 15), torch.randn(6, 21)
    plain = results(module, x, dy)
    A, B = torch.randn(5, 15), torch.randn(21, 5, requires_grad=True)
    B0, gate, weight = torch.randn(21, 5), torch.randn(5, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    seen = []

    def terms(one: Any) -> LoraTerms:
        seen.append(one)
        return LoraTerms(A, B, 0.7, gate=gate, merged_B=B0, merge_weight=weight)

    layer.route(terms)
    with took("fast", 1):
        y = module(x)
    y.backward(dy)
    h = x @ A.T * gate
    expected = module.base_layer(x) + 0.7 * h @ (B0 + weight * (B - B0)).T
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(expected, (B, gate, weight), dy)
    torch.testing.assert_close((B.grad, gate.grad, weight.grad), grads)
    assert seen == [layer]
    layer.route(None)
    assert type(module) is (FusedLinear if kind == "fused" else Linear)
    assert not {"_routes", "_borrowed"} & module.__dict__.keys()
    torch.testing.assert_close(results(module, x, dy), plain)


class Squared(NamedTuple):
    """Terms of an operator that is none of LoRA's: ``y + B ((A drop(x))²)``."""

    A: Tensor
    B: Tensor

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        return y + nn.functional.dropout(x, dropout_p).matmul(self.A.T).square() @ self.B.T


@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_a_route_may_have_an_operator_of_its_own(kind: str) -> None:
    module = lora()
    if kind == "fused":
        module.__class__ = FusedLinear
    layer, x = layer_of(module), torch.randn(6, 15)
    terms = Squared(torch.randn(5, 15, requires_grad=True), torch.randn(21, 5))
    layer.route(lambda _: terms, own_operator=True)
    assert module.sole_adapter(x) is None  # no group can compute it
    with took("fast", 1):
        y = module(x)
    expected = module.base_layer(x) + (x @ terms.A.T).square() @ terms.B.T
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(out.sum(), terms.A)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients)
    module.lora_dropout["default"] = nn.Dropout(0.5)
    assert not torch.allclose(module(x), y)
    module.eval()
    torch.testing.assert_close(module(x), y)


def test_attention_and_mlp_with_an_operator_of_its_own_compute_layer_by_layer() -> None:
    model = llama()
    layers = adapter_layers(model, "default")
    fuse(model)
    ids = tokens()
    expected = model(ids).logits
    for layer in layers:
        layer.route(lambda layer: Same(LoraTerms(layer.A, layer.B, layer.scale)), own_operator=True)
    torch.testing.assert_close(model(ids).logits, expected)


class Same(NamedTuple):
    """Terms of LoRA that don't look like it."""

    terms: LoraTerms

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        return self.terms.accumulate(y, x, dropout_p)


def doubled(layer: Any) -> LoraTerms:
    return LoraTerms(layer.A, layer.B, 2 * layer.scale)


def test_the_adapters_dropout_applies_to_a_route() -> None:
    module, x = lora(lora_dropout=0.5), torch.randn(40, 15)
    layer = layer_of(module)
    layer.route(lambda one: LoraTerms(one.A, one.B, one.scale))
    torch.manual_seed(1)
    once = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), once)
    assert not torch.allclose(module(x), once)
    module.eval()
    y = module(x)
    layer.route(None)
    torch.testing.assert_close(y, module(x))


@pytest.mark.parametrize("state", ["disabled", "merged", "inactive"])
def test_a_route_does_not_count_where_the_adapter_does_not(state: str) -> None:
    module, x = lora(), torch.randn(6, 15)
    if state == "disabled":
        module.enable_adapters(False)
    elif state == "merged":
        module.merge()
    else:
        module._active_adapter = "elsewhere"
    expected = module(x)
    layer_of(module).route(doubled)
    with took("slow", 1):
        assert torch.equal(module(x), expected)


def test_two_adapters_of_a_layer_can_be_routed() -> None:
    module, x = lora(), torch.randn(6, 15)
    add(module, "second")
    module.set_adapter(["default", "second"])
    stock, base = module(x), module.base_layer(x)
    first, second = layer_of(module), layer_of(module, "second")
    first.route(doubled)
    second.route(doubled)
    torch.testing.assert_close(module(x) - base, 2 * (stock - base))
    first.route(None)
    second.route(None)
    assert type(module) is Linear and torch.equal(module(x), stock)


def test_undoing_no_route_is_harmless() -> None:
    for cls in (Linear, FusedLinear):
        module = lora()
        module.__class__ = cls
        layer_of(module).route(None)
        assert type(module) is cls


def test_routes_and_fuse_do_not_undo_each_other() -> None:
    model, ids = llama(), tokens()
    layers = adapter_layers(model, "default")
    expected = {}
    for layer in layers:
        layer.module.scale_layer(2)
    expected["routed"] = model(input_ids=ids).logits
    for layer in layers:
        layer.module.unscale_layer()
    expected["plain"] = model(input_ids=ids).logits

    def check(kind: str, cls: type) -> None:
        torch.testing.assert_close(model(input_ids=ids).logits, expected[kind])
        assert {type(layer.module) for layer in layers} == {cls}

    def route(terms: Any) -> None:
        for layer in layers:
            layer.route(terms)

    route(doubled)
    fuse(model)
    route(None)
    check("plain", FusedLinear)
    route(doubled)
    unfuse(model)
    check("routed", FusedLinear)
    route(None)
    check("plain", Linear)
    route(doubled)
    with fused(model):
        check("routed", FusedLinear)
    check("routed", FusedLinear)
    route(None)
    check("plain", Linear)


def test_a_borrowed_layer_computes_its_other_adapters_as_stock() -> None:
    module, x = lora(), torch.randn(6, 15)
    add(module, "second")
    module.set_adapter("second")
    expected = module(x)
    layer_of(module).route(doubled)
    with took("slow", 1):
        assert torch.equal(module(x), expected)


def test_copies_do_not_carry_routes() -> None:
    module, x = lora(), torch.randn(6, 15)
    expected = module(x)
    layer = layer_of(module)
    layer.route(doubled)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(x), expected)
    assert not torch.allclose(module(x), expected)


class Quantised(Linear):
    """Stands in for PEFT's classes over quantised layers."""


def test_a_layer_of_another_class_can_be_written_but_not_routed() -> None:
    model = llama(target_modules=["q_proj"])
    layers = adapter_layers(model, "default")
    layers[0].module.__class__ = Quantised
    layer = adapter_layers(model, "default")[0]
    layer.write(torch.ones_like(layer.A), torch.ones_like(layer.B))
    with pytest.raises(ValueError, match=r"layer model.layers.0.self_attn.q_proj .*Quantised"):
        layer.route(doubled)
    assert type(layer.module) is Quantised


def test_an_adapter_that_cannot_be_fused_cannot_be_routed() -> None:
    module = lora()
    layer = layer_of(module)
    module.lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"layer 0 .*hooks"):
        layer.route(doubled)
    assert type(module) is Linear


def test_a_call_that_cannot_honour_the_route_raises() -> None:
    module, x = lora(), torch.randn(2, 15)
    layer = layer_of(module)
    layer.route(doubled)
    with pytest.raises(RuntimeError, match=r"layer 0 .*adapter_names"):
        module(x, adapter_names=["default", "__base__"])
    module.lora_B["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"layer 0 .*hooks"):
        module(x)


def test_a_route_compiles() -> None:
    module, x = lora(), torch.randn(6, 15)
    layer, weight = layer_of(module), torch.tensor(0.25)
    B0 = torch.randn(21, 4)
    layer.route(lambda one: LoraTerms(one.A, one.B, one.scale, merged_B=B0, merge_weight=weight))
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    weight.fill_(0.75)
    torch.testing.assert_close(compiled(x), module(x))


def test_route_over_a_training_model_reaches_the_factors() -> None:
    model, ids = llama(target_modules=TARGETS), tokens()
    randomise(model)
    layers = adapter_layers(model, "default")
    for layer in layers:
        layer.route(doubled)
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in layers:
        assert layer.A.grad is not None and layer.A.grad.abs().max() > 0
        assert layer.B.grad is not None and layer.B.grad.abs().max() > 0
