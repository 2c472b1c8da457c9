"""Every state of a PEFT layer: fused within the error rule, or PEFT's own result bit for bit, and seen to be so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import mbf.peft
from mbf.ops import draw_seed, dropout_mask
from mbf.ops.philox import keep_scale
from mbf.peft import FusedLinear

from .helpers import add, assert_as_accurate, llama, lora, randomise, results, swapped, tokens, took, widen_adapter


def compare(layer: Any, x: Tensor, dy: Tensor | None = None) -> None:
    """The fused layer against PEFT's and against PEFT's in fp64: output and every gradient, with no call gone slow."""
    fused = swapped(layer)
    exact_layer = copy.deepcopy(layer).double()
    for adapter, scale in exact_layer.scaling.items():
        exact_layer.scaling[adapter] = scale.double() if isinstance(scale, Tensor) else scale
    dy = torch.randn(*x.shape[:-1], layer.out_features) if dy is None else dy
    stock, exact = results(layer, x, dy), results(exact_layer, x.double(), dy.double())
    with took("fast", 1):
        ours = results(fused, x, dy)
    assert ours.keys() == stock.keys()
    for name in stock:
        assert_as_accurate(ours[name], stock[name], exact[name], name)


def test_plain() -> None:
    compare(lora(), torch.randn(5, 15))


def test_without_base_bias() -> None:
    compare(lora(nn.Linear(15, 21, bias=False)), torch.randn(5, 15))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 7, 431]),
    r=st.sampled_from([1, 3, 12]),
    d_in=st.sampled_from([1, 63, 100]),
    d_out=st.sampled_from([1, 63, 100]),
)
def test_odd_shapes(rows: int, r: int, d_in: int, d_out: int) -> None:
    # All positive: a gradient may be one sum here, whose relative error has no bound where it happens to cancel.
    layer = lora(nn.Linear(d_in, d_out), r=r)
    for parameter in layer.parameters():
        parameter.data.abs_()
    compare(layer, torch.rand(rows, d_in), torch.rand(rows, d_out))


@pytest.mark.parametrize("shape", [(15,), (0, 15), (2, 3, 4, 15)])
def test_input_shapes(shape: tuple[int, ...]) -> None:
    compare(lora(), torch.randn(shape))


def test_strided_input() -> None:
    compare(lora(), torch.randn(15, 3, 4).permute(2, 1, 0))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"0": 5}, "rank_pattern": {"0": 7}}])
def test_scale_of_the_configuration(options: dict[str, Any]) -> None:
    compare(lora(**options), torch.randn(5, 15))


@pytest.mark.parametrize(
    "mutate",
    [
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.scale_layer(2.5),
        lambda layer: layer.unscale_layer(4),
        lambda layer: layer.scaling.update(default=0),
    ],
)
def test_scaling_mutated_after_the_swap(mutate: Callable[[Any], None]) -> None:
    layer, x = lora(), torch.randn(5, 15)
    fused = swapped(layer)
    before = fused(x)
    mutate(layer)
    mutate(fused)
    with took("fast", 1):
        y = fused(x)
    torch.testing.assert_close(y, layer(x))
    assert not torch.allclose(y, before)


def test_prepared_for_hotswap() -> None:
    model = llama(r=3)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.scaling["default"], Tensor) and layer.lora_A["default"].weight.shape[0] == 8
    compare(layer, torch.randn(5, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_base_and_adapter(dtype: torch.dtype) -> None:
    compare(lora(dtype=dtype), torch.randn(9, 15).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapter_on_a_half_base(dtype: torch.dtype) -> None:
    layer = lora(dtype=dtype)
    widen_adapter(layer)
    compare(layer, torch.randn(33, 15).to(dtype))


def test_half_adapter_on_an_fp32_base() -> None:
    layer = lora()
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    compare(layer, torch.randn(33, 15))


def test_casting_disabled_with_one_dtype() -> None:
    layer = lora()
    with disable_input_dtype_casting(layer):
        assert not layer.cast_input_dtype_enabled
        compare(layer, torch.randn(5, 15))


def test_conv1d_base() -> None:
    compare(lora(Conv1D(21, 15), fan_in_fan_out=True), torch.randn(2, 5, 15))


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_base_that_trains(trains: str) -> None:
    layer = lora()
    getattr(layer.base_layer, trains).requires_grad_(True)
    compare(layer, torch.randn(5, 15))


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_base_of_another_class() -> None:
    compare(lora(ScaledLinear(15, 21)), torch.randn(5, 15))


def test_several_active_adapters() -> None:
    layer = lora()
    add(layer, "second", use_rslora=True)
    add(layer, "idle")
    layer.set_adapter(["default", "second"])
    compare(layer, torch.randn(5, 15))


def test_one_of_the_active_adapters_is_elsewhere() -> None:
    layer = lora()
    layer._active_adapter = ["elsewhere", "default"]
    compare(layer, torch.randn(5, 15))


def test_switching_the_active_adapter_is_seen() -> None:
    layer, x = lora(), torch.randn(5, 15)
    add(layer, "second")
    fused = swapped(layer)
    for name in ("second", "default"):
        layer.set_adapter(name)
        fused.set_adapter(name)
        with took("fast", 1):
            torch.testing.assert_close(fused(x), layer(x))


def test_tied_factors() -> None:
    layer = lora()
    embedding_A, embedding_B = torch.randn(21, 4), torch.randn(4, 15)
    layer.lora_A["default"].weight = nn.Parameter(embedding_B.t().contiguous().t())
    layer.lora_B["default"].weight = nn.Parameter(embedding_A.t().contiguous().t())
    assert not layer.lora_A["default"].weight.is_contiguous()
    compare(layer, torch.randn(5, 15))


def test_input_without_gradient() -> None:
    layer, x, dy = lora(), torch.randn(5, 15), torch.randn(5, 21)
    fused = swapped(layer)
    layer(x).backward(dy)
    with took("fast", 1):
        fused(x).backward(dy)
    for (name, ours), stock in zip(fused.named_parameters(), layer.parameters(), strict=True):
        assert (ours.grad is None) == (stock.grad is None), name
        if stock.grad is not None:
            torch.testing.assert_close(ours.grad, stock.grad)


def test_x_used_twice_and_backward_twice() -> None:
    layer = lora()
    grads = []
    x0 = torch.randn(5, 15)
    for one, start in ((swapped(layer), x0), (layer, x0), (copy.deepcopy(layer).double(), x0.double())):
        x = start.clone().requires_grad_()
        loss = (one(x) * one(2 * x)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert x.grad is not None and x.grad.abs().max() > 0
        grads.append(x.grad)
    assert_as_accurate(*grads, "x")


def test_input_is_left_alone() -> None:
    layer, x = swapped(lora()), torch.randn(5, 15, requires_grad=True)
    kept = x.detach().clone()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer, x, dy = lora(), torch.randn(33, 15), torch.randn(33, 21)
    fused = swapped(layer)
    exact = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    with torch.autocast("cpu", dtype=dtype):
        stock = results(layer, x, dy)
        with took("fast", 1):
            ours = results(fused, x, dy)
    assert ours["y"].dtype is dtype
    for name in stock:
        assert_as_accurate(ours[name], stock[name], exact[name], name)


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_is_the_mask_of_the_drawn_seed() -> None:
    layer, x, p = lora(lora_dropout=0.4), torch.randn(50, 15), 0.4
    fused = swapped(layer)
    torch.manual_seed(7)
    seed = draw_seed("cpu")
    torch.manual_seed(7)
    with took("fast", 1):
        y = fused(x)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropped = x * dropout_mask(seed, x.shape, p) * keep_scale(p)
    torch.testing.assert_close(y, layer.base_layer(x) + layer.scaling["default"] * dropped @ A.T @ B.T)


def test_adapters_have_masks_of_their_own() -> None:
    layer = lora(lora_dropout=0.5)
    add(layer, "second", r=4, lora_alpha=12, lora_dropout=0.5)
    with torch.no_grad():
        layer.lora_A["second"].weight.copy_(layer.lora_A["default"].weight)
        layer.lora_B["second"].weight.copy_(-layer.lora_B["default"].weight)
    layer.set_adapter(["default", "second"])
    fused, x = swapped(layer), torch.randn(50, 15)
    assert not torch.allclose(fused(x), layer.base_layer(x))
    fused.eval()
    torch.testing.assert_close(fused(x), layer.base_layer(x))


@pytest.mark.parametrize("p, training", [(0.4, False), (0.0, True)])
def test_no_seed_is_drawn_without_dropout(p: float, training: bool) -> None:
    layer, x = lora(lora_dropout=p).train(training), torch.randn(5, 15)
    layer.lora_dropout["default"] = nn.Dropout(p).train(training)
    fused, state = swapped(layer), torch.get_rng_state()
    with took("fast", 1):
        y = fused(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_sees_the_same_mask_again(use_reentrant: bool) -> None:
    layer, x = swapped(lora(lora_dropout=0.5)), torch.randn(20, 15)
    gradients = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        run(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 3
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


# -- what is handed to PEFT --------------------------------------------------------------------------------------------


def declined(layer: Any, x: Tensor, **kwargs: Any) -> None:
    """The fused layer's output and gradients are PEFT's bit for bit, and no call was fused."""
    fused, outputs = swapped(layer), []
    for one, path in ((layer, None), (fused, "slow")):
        torch.manual_seed(5)
        leaf = x.detach().clone().requires_grad_()
        if path is None:
            y = one(leaf, **kwargs)
        else:
            with took(path, 1):
                y = one(leaf, **kwargs)
        y.square().sum().backward()
        outputs.append([y, leaf.grad, *(p.grad for p in one.parameters())])
    for stock, ours in zip(*outputs, strict=True):
        assert (stock is None) == (ours is None)
        assert stock is None or torch.equal(stock, ours)


def test_disabled() -> None:
    layer = lora()
    layer.enable_adapters(False)
    declined(layer, torch.randn(5, 15))


def test_disabled_while_merged_unmerges_as_in_peft() -> None:
    layer, x = lora(), torch.randn(5, 15)
    layer.merge()
    layer.enable_adapters(False)
    declined(layer, x)
    assert not layer.merged


def test_merged() -> None:
    layer = lora()
    layer.merge()
    declined(layer, torch.randn(5, 15))


def test_none_of_the_active_adapters_is_here() -> None:
    layer = lora()
    layer._active_adapter = "elsewhere"
    declined(layer, torch.randn(5, 15))


def test_mixed_batch() -> None:
    layer = lora()
    add(layer, "second")
    layer.eval()
    declined(layer, torch.randn(3, 5, 15), adapter_names=["second", "__base__", "default"])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 1.0}])
def test_options_left_to_peft(options: dict[str, Any]) -> None:
    declined(lora(**options), torch.randn(5, 15))


def test_one_dora_among_the_active_adapters() -> None:
    layer = lora()
    add(layer, "second", use_dora=True)
    layer.set_adapter(["default", "second"])
    declined(layer, torch.randn(5, 15))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout", "base_layer"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "replaced"])
def test_hooks(part: str, kind: str) -> None:
    layer = lora(lora_dropout=0.1)
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    seen = []
    if kind == "replaced":
        module.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), module)
    else:
        getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(1))
    declined(layer, torch.randn(5, 15))
    assert kind == "replaced" or len(seen) == 2


def test_global_hook() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: None)
    try:
        declined(lora(), torch.randn(5, 15))
    finally:
        handle.remove()


class LoudLinear(nn.Linear):
    pass


class LoudDropout(nn.Dropout):
    pass


@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: layer.lora_A.update({"default": LoudLinear(15, 4, bias=False)}),
        lambda layer: layer.lora_B.update({"default": LoudLinear(4, 21, bias=False)}),
        lambda layer: layer.lora_dropout.update({"default": LoudDropout(0.2)}),
        lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.2, inplace=True).eval()}),
        lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1 - 1e-6)}),
        lambda layer: layer.scaling.update(default=torch.tensor([0.5])),
        lambda layer: torch.nn.utils.parametrizations.orthogonal(layer.lora_A["default"]),
    ],
)
def test_foreign_parts(replace: Callable[[Any], Any]) -> None:
    layer = lora()
    replace(layer)
    declined(layer, torch.randn(5, 15))


class TaggedTensor(Tensor):
    """A stand-in for DTensor and for quantised weights: a subclass that computes through __torch_function__."""


def tagged(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().as_subclass(TaggedTensor), requires_grad=parameter.requires_grad)


def test_tensor_subclass_in_the_adapter() -> None:
    layer, x = lora(), torch.randn(5, 15)
    layer.lora_A["default"].weight = tagged(layer.lora_A["default"].weight)
    expected = layer(x)
    layer.__class__ = FusedLinear
    with took("slow", 1):
        y = layer(x)
    assert type(y) is type(expected) is TaggedTensor and torch.equal(y, expected)


def test_tensor_subclass_as_base_weight_is_run_by_the_base_layer() -> None:
    layer, x = lora(), torch.randn(5, 15)
    layer.base_layer.weight = tagged(layer.base_layer.weight)
    expected = layer(x)
    layer.__class__ = FusedLinear
    with took("fast", 1):
        y = layer(x)
    torch.testing.assert_close(y, expected)


def test_casting_disabled_with_two_dtypes() -> None:
    layer = lora(dtype=torch.bfloat16)
    widen_adapter(layer)
    layer.cast_input_dtype_enabled = False
    fused, x = swapped(layer), torch.randn(5, 15).bfloat16()
    with took("slow", 1), pytest.raises(RuntimeError, match="dtype"):
        fused(x)
    with torch.autocast("cpu"), took("slow", 1):
        assert torch.equal(fused(x), layer(x))


def test_function_transforms() -> None:
    layer, x = lora(), torch.randn(3, 5, 15)
    fused = swapped(layer)
    with took("slow"):
        assert torch.equal(torch.vmap(fused)(x), torch.vmap(layer)(x))
        ours = torch.func.jvp(fused, (x,), (x,))
    for one, other in zip(ours, torch.func.jvp(layer, (x,), (x,)), strict=True):
        assert torch.equal(one, other)


# -- whole models ------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_of_a_model() -> None:
    ids, losses = tokens(), []
    for fuse in (False, True):
        torch.manual_seed(2)
        model = llama(lora_dropout=0.0)
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        if fuse:
            assert len(mbf.peft.fuse(model, strict=True).fused) == 14
        model.train()
        with took("fast", 28) if fuse else torch.enable_grad():
            model(input_ids=ids, labels=ids).loss.backward()
        losses.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(losses[0]) == 28
    torch.testing.assert_close(losses[1], losses[0])


def test_model_in_bfloat16_with_default_casting_trains_alike() -> None:
    """PEFT's default: fp32 A, B on a bf16 base; the fused loss is no further from fp64 than stock's."""
    model = llama()
    ids = tokens()
    exact = copy.deepcopy(model).double()(input_ids=ids, labels=ids).loss
    model.base_model.model.bfloat16()
    widen_adapter(model)
    stock = model(input_ids=ids, labels=ids)
    mbf.peft.fuse(model, strict=True)
    with took("fast", 14):
        ours = model(input_ids=ids, labels=ids)
    assert ours.logits.dtype is stock.logits.dtype
    assert abs(ours.loss - exact) <= 2 * abs(stock.loss - exact) + 2e-2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapters", [1, 2])
def test_compiles_to_one_graph_with_the_operator_in_it(dropout: float, adapters: int) -> None:
    layer = lora(lora_dropout=dropout)
    if adapters == 2:
        add(layer, "second", lora_dropout=dropout)
        layer.set_adapter(["default", "second"])
    fused, x = swapped(layer), torch.randn(5, 15)
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(fused, fullgraph=True, backend=backend)(x)
    called = str(graphs[0].code)
    assert "lora_linear" in called and ("lora_accumulate" in called) == (adapters == 2)

    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 2.0):
        fused.set_scale("default", scale)
        outputs = []
        for run in (fused, compiled):
            torch.manual_seed(4)
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            fused.zero_grad()
            y.square().sum().backward()
            outputs.append([y, leaf.grad, *(p.grad for p in fused.parameters() if p.grad is not None)])
        torch.testing.assert_close(*outputs)


def test_compiled_model_survives_a_change_of_state() -> None:
    model, ids = llama(target_modules=["q_proj", "down_proj"]), tokens()
    stock = model(input_ids=ids).logits
    mbf.peft.fuse(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, stock)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.allclose(compiled(input_ids=ids).logits, stock)


def test_built_in_place_of_peft_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """FusedLinear also works where it stands in for PEFT's class from the start."""
    monkeypatch.setattr("peft.tuners.lora.layer.Linear", FusedLinear)
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    monkeypatch.undo()
    assert type(model[0]) is FusedLinear
    randomise(model)
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    mbf.peft.unfuse(twin)
    assert type(twin[0]) is Linear
    with took("fast", 1):
        y = model(x)
    torch.testing.assert_close(y, twin(x))
