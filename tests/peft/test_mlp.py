"""MLPs computed whole: PEFT's results, less kept for backward, and the module's own forward wherever it must run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import mbf.peft.mlp
from mbf.ops import use_backend
from mbf.peft import fuse, fused, unfuse
from mbf.peft.groups import plain_class

from .helpers import (
    FAMILIES,
    TARGETS,
    assert_no_worse,
    copies,
    family,
    kept_bytes,
    losses,
    randomise,
    tokens,
    took,
    trained,
    ungrouped,
    widen_adapter,
)

MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every ``lora_mlp`` that is computed."""
    seen: list[dict[str, Any]] = []
    compute = mbf.peft.mlp.lora_mlp

    def counted(*args: Any, **options: Any) -> Tensor:
        seen.append(options)
        return compute(*args, **options)

    monkeypatch.setattr(mbf.peft.mlp, "lora_mlp", counted)
    return seen


def first_mlp(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_as_peft_does(name: str, memory: Any, whole: list[Any]) -> None:
    model, ids = family(name), tokens()
    expected = trained(model, ids)
    report = fuse(model, strict=True, memory=memory)
    assert report.mlps == tuple(f"base_model.model.model.layers.{n}.mlp" for n in range(2))
    assert "  2 x MLP computed whole (base_model.model.model.layers.0.mlp, " in str(report)
    with took("fast", 14):
        got = trained(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    activation = "gelu_tanh" if name.startswith("Gemma") else "silu"
    assert whole == [{"activation": activation, "recompute": memory == "low"}] * 2


@pytest.mark.parametrize(
    ("act", "activation"),
    [("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", None), ("relu", None)],
)
def test_activations(act: str, activation: str | None, whole: list[Any], groups: list[int]) -> None:
    model, ids = family("Llama", config={"hidden_act": act}, target_modules=MLP), tokens()
    expected = trained(model, ids)
    report = fuse(model, strict=True)
    torch.testing.assert_close(trained(model, ids), expected, rtol=1e-5, atol=1e-6)
    assert [options["activation"] for options in whole] == ([activation] * 2 if activation else [])
    assert groups == ([] if activation else [2, 2])
    assert len(report.mlps) == (2 if activation else 0)
    assert [*report.shared.values()] == ([] if activation else [("gate_proj", "up_proj")] * 2)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_fp32_adapter_on_a_half_base(memory: Any, whole: list[Any]) -> None:
    model, ids = family("Llama", torch.bfloat16), tokens()
    widen_adapter(model)
    exact, stock = trained(copy.deepcopy(model).double(), ids), trained(model, ids)
    fuse(model, strict=True, memory=memory)
    assert_no_worse(trained(model, ids), stock, exact)
    assert len(whole) == 2


@pytest.mark.parametrize("memory", ["default", "low"])
def test_autocast(memory: Any, whole: list[Any]) -> None:
    model, ids = family("Llama", torch.float32, target_modules=MLP), tokens()
    exact = trained(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        stock = trained(model, ids)
        fuse(model, strict=True, memory=memory)
        got = trained(model, ids)
    assert_no_worse(got, stock, exact)
    assert len(whole) == 2


@pytest.mark.parametrize("memory", ["default", "low"])
def test_masks_are_those_of_layers_alone(memory: Any, whole: list[Any]) -> None:
    model, ids = family("Llama", lora_dropout=0.3), tokens()
    fuse(model, strict=True, memory=memory)
    expected = trained(ungrouped(model), ids)
    assert whole == []
    torch.testing.assert_close(trained(model, ids), expected)
    assert not torch.allclose(trained(model, ids, seed=6)["logits"], expected["logits"])
    with use_backend("reference"):
        torch.testing.assert_close(trained(model, ids), expected)


def test_low_memory_changes_no_bit() -> None:
    model, ids = family("Llama", torch.float32, lora_dropout=0.3), tokens()
    fuse(model, strict=True)
    stored = trained(model, ids)
    fuse(model, strict=True, memory="low")
    torch.testing.assert_close(trained(model, ids), stored, rtol=0, atol=0)


def test_keeps_less_than_peft() -> None:
    model, ids = family("Llama", torch.float32, target_modules=MLP, lora_dropout=0.1), tokens(4, 32)
    stock = kept_bytes(model, ids)
    fuse(model)
    default = kept_bytes(model, ids)
    fuse(model, memory="low")
    low = kept_bytes(model, ids)
    assert low < default < stock
    of_g_and_u = 2 * 2 * 4 * 32 * 48 * 4  # layers, tensors, batch, length, d_ff, bytes
    assert default - low == of_g_and_u


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, memory: Any, whole: list[Any]) -> None:
    model, ids = family("Llama", lora_dropout=0.3), tokens()
    fuse(model, strict=True, memory=memory)
    model.enable_input_require_grads()
    expected = trained(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    whole.clear()
    torch.testing.assert_close(trained(model, ids), expected)
    assert len(whole) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, whole: list[Any]) -> None:
    model, ids = family("Llama"), tokens()
    model.eval()
    with mode():
        expected = model(input_ids=ids).logits
        fuse(model, strict=True)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert len(whole) == 2


def test_compiles_whole_and_layer_by_layer(whole: list[Any]) -> None:
    model, ids = family("Llama", target_modules=MLP), tokens()
    fuse(model, strict=True)
    expected = model(input_ids=ids).logits
    whole.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
    assert whole == []


# -- one MLP: where its own forward must run ---------------------------------------------------------------------------


def compare(prepare: Callable[[Any], Any], whole: list[Any], times: int, **lora: Any) -> None:
    """The MLP after ``prepare`` gives what PEFT's gives, computing ``times`` of two forwards whole."""
    model = family("Llama", **({"target_modules": MLP} | lora))
    model.add_adapter("second", LoraConfig(r=2, target_modules=MLP))
    randomise(model)
    model = model.double()
    twin = copy.deepcopy(model)
    fuse(twin)
    x, results = torch.randn(2, 5, 32, dtype=torch.float64), []
    for one in (model, twin):
        mlp = first_mlp(one)
        prepare(mlp)
        leaf = x.clone().requires_grad_()
        y = mlp(leaf) + mlp(leaf)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": leaf.grad, **gradients})
    torch.testing.assert_close(results[1], results[0])
    assert len(whole) == times


def test_plain(whole: list[Any]) -> None:
    compare(lambda mlp: None, whole, 2)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_the_mlp_are_run(kind: str, whole: list[Any]) -> None:
    seen: list[int] = []

    def watch(mlp: Any) -> None:
        getattr(mlp, f"register_{kind}_hook")(lambda *args: seen.append(1))

    compare(watch, whole, 2)
    assert len(seen) == 4


def test_hooks_on_the_mlp_may_change_what_passes(whole: list[Any]) -> None:
    def change(mlp: Any) -> None:
        mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        mlp.register_forward_hook(lambda module, args, y: y + 1)
        mlp.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))

    compare(change, whole, 2)


@pytest.mark.parametrize("name", [*MLP, "act_fn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_the_mlp(kind: str, name: str, whole: list[Any]) -> None:
    seen: list[int] = []

    def watch(mlp: Any) -> None:
        getattr(getattr(mlp, name), f"register_{kind}_hook")(lambda *args: seen.append(1))

    compare(watch, whole, 0)
    assert len(seen) == 4


PREPARE: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda mlp: [getattr(mlp, name).enable_adapters(False) for name in MLP],
    "one disabled": lambda mlp: mlp.up_proj.enable_adapters(False),
    "merged": lambda mlp: [getattr(mlp, name).merge() for name in MLP],
    "one merged": lambda mlp: mlp.down_proj.merge(),
    "one deleted": lambda mlp: (mlp.gate_proj.delete_adapter("default"), mlp.gate_proj.delete_adapter("second")),
    "two adapters": lambda mlp: [getattr(mlp, name).set_adapter(["default", "second"]) for name in MLP],
    "base trains": lambda mlp: mlp.down_proj.base_layer.weight.requires_grad_(True),
    "inner hook": lambda mlp: mlp.down_proj.lora_A["default"].register_forward_hook(lambda m, a, y: 2 * y),
    "base hook": lambda mlp: mlp.up_proj.base_layer.register_forward_hook(lambda m, a, y: 2 * y),
    "another activation": lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
    "replaced activation": lambda mlp: setattr(mlp.act_fn, "forward", lambda x: 3 * x),
    "replaced forward": lambda mlp: setattr(mlp, "forward", lambda x: 3 * mlp.down_proj(mlp.gate_proj(x))),
    "replaced layer": lambda mlp: setattr(mlp, "down_proj", mlp.down_proj.base_layer),
}


@pytest.mark.parametrize("state", PREPARE)
def test_states_left_to_its_own_forward(state: str, whole: list[Any]) -> None:
    compare(PREPARE[state], whole, 0)


def test_another_adapter_is_seen(whole: list[Any]) -> None:
    compare(lambda mlp: [getattr(mlp, name).set_adapter("second") for name in MLP], whole, 2)


def test_adapters_of_different_names_are_seen(whole: list[Any]) -> None:
    compare(lambda mlp: mlp.up_proj.set_adapter("second"), whole, 2)


def test_a_changed_scale_is_seen(whole: list[Any]) -> None:
    compare(lambda mlp: mlp.up_proj.scale_layer(0.3), whole, 2)


def test_disabled_for_a_while(whole: list[Any]) -> None:
    model, ids = family("Llama"), tokens()
    first = model(input_ids=ids).logits
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    fuse(model, strict=True)
    torch.testing.assert_close(model(input_ids=ids).logits, first)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
    torch.testing.assert_close(model(input_ids=ids).logits, first)
    assert len(whole) == 4


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj"], ["gate_proj", "down_proj"], ["down_proj"]], ids=str)
def test_mlps_adapted_in_part(targets: list[str], whole: list[Any], groups: list[int]) -> None:
    model, ids = family("Llama", target_modules=targets), tokens()
    expected = trained(model, ids)
    report = fuse(model, strict=True)
    torch.testing.assert_close(trained(model, ids), expected, rtol=1e-5, atol=1e-6)
    shares = targets == ["gate_proj", "up_proj"]
    assert whole == [] and report.mlps == ()
    assert groups == ([2, 2] if shares else []) and len(report.shared) == (2 if shares else 0)


def halved(self: Any, x: Any) -> Any:
    return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def exchanged(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def of_a_default(self: Any, x: Any = None) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("forward", [lambda self, x: 3 * x, halved, exchanged, of_a_default])
def test_a_forward_patched_into_the_class_is_run(
    monkeypatch: pytest.MonkeyPatch, whole: list[Any], forward: Any
) -> None:
    model = family("Llama")
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    mlp = first_mlp(model)
    wanted = forward(mlp, x)
    fuse(model)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    torch.testing.assert_close(mlp(x), wanted)
    assert whole == [] and fuse(model).mlps == () and len(fuse(model).shared) == 4


def documented(self: Any, hidden: Any) -> Any:
    """The formula, in other words."""
    down_proj = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
    return down_proj


def test_the_same_formula_patched_into_the_class_is_computed_whole(
    monkeypatch: pytest.MonkeyPatch, whole: list[Any]
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", documented)
    model = family("Llama")
    assert len(fuse(model).mlps) == 2
    first_mlp(model)(torch.randn(2, 5, 32, dtype=torch.float64))
    assert len(whole) == 1


def test_arguments_that_it_does_not_take() -> None:
    mlp = first_mlp(family("Llama"))
    fuse(mlp)
    with pytest.raises(TypeError, match="other"):
        mlp(torch.randn(2, 32, dtype=torch.float64), other=1)
    torch.testing.assert_close(
        *(mlp(*a, **k) for a, k in (((torch.ones(2, 32).double(),), {}), ((), {"x": torch.ones(2, 32).double()})))
    )


# -- memory and undoing ------------------------------------------------------------------------------------------------


def test_memory_is_switched_by_another_call_and_undone(whole: list[Any]) -> None:
    model, ids = family("Llama"), tokens()
    keys, printed = list(model.state_dict()), repr(model)
    for memory, recompute in (("low", True), ("default", False), ("low", True)):
        whole.clear()
        fuse(model, memory=memory)  # type: ignore[arg-type]
        model(input_ids=ids)
        assert [options["recompute"] for options in whole] == [recompute] * 2
    with fused(model):
        whole.clear()
        model(input_ids=ids)
        assert not any(options["recompute"] for options in whole)
    whole.clear()
    for twin in (model, *copies(model)):
        twin(input_ids=ids)
    assert [options["recompute"] for options in whole] == [True] * 8
    assert list(model.state_dict()) == keys and repr(model) == printed
    assert isinstance(first_mlp(model), LlamaMLP) and type(first_mlp(model)) is not LlamaMLP
    unfuse(model)
    assert type(first_mlp(model)) is LlamaMLP and not {"_recompute"} & first_mlp(model).__dict__.keys()
    with fused(model, memory="low"):
        assert plain_class(first_mlp(model)) is LlamaMLP is not type(first_mlp(model))
    assert type(first_mlp(model)) is LlamaMLP and not {"_recompute"} & first_mlp(model).__dict__.keys()


def test_memory_must_be_known() -> None:
    model = family("Llama")
    with pytest.raises(ValueError, match="memory is 'tiny'; it must be one of 'default', 'low'"):
        fuse(model, memory="tiny")  # type: ignore[arg-type]
    assert type(first_mlp(model)) is LlamaMLP


def test_training_stays_the_same() -> None:
    """Ten steps of AdamW without dropout, everything grouped: the model learns what PEFT's learns."""
    ids, ends = tokens(4, 9), []
    for memory in (None, "default", "low"):
        model = family("Llama", torch.float32, target_modules=TARGETS)
        if memory:
            fuse(model, strict=True, memory=memory)  # type: ignore[arg-type]
        ends.append(losses(model, ids))
    assert ends[0][-1] < ends[0][0]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[2], ends[1], rtol=0, atol=0)
