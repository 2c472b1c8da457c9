"""q, k and v computed together: PEFT's results in every state, nothing stale, nothing kept, nothing else changed."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import mbf.peft.groups
from mbf.ops import LoraTerms, use_backend
from mbf.peft import FusedLinear, adapter_layers, fuse, fused, unfuse
from mbf.peft.groups import SharedInput, plain_class

from .helpers import (
    FAMILIES,
    TARGETS,
    assert_no_worse,
    copies,
    family,
    kept_bytes,
    randomise,
    tokens,
    took,
    trained,
    ungrouped,
    widen_adapter,
)

QKV = ["q_proj", "k_proj", "v_proj"]


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [QKV, ["q_proj", "v_proj"], TARGETS], ids=len)
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_as_peft_does(name: str, targets: list[str], groups: list[int]) -> None:
    model, ids = family(name, target_modules=targets), tokens()
    expected = trained(model, ids)
    report = fuse(model, strict=True)
    attention = {name: layers for name, layers in report.shared.items() if name.endswith("self_attn")}
    assert [*attention.values()] == [tuple(layer for layer in QKV if layer in targets)] * 2
    with took("fast", 2 * len(targets)):
        got = trained(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert groups == [min(len(targets), 3)] * 2


def test_fp32_adapter_on_a_half_base(groups: list[int]) -> None:
    model, ids = family("Llama", torch.bfloat16), tokens()
    widen_adapter(model)
    exact = trained(copy.deepcopy(model).double(), ids)
    stock = trained(model, ids)
    fuse(model, strict=True)
    got = trained(model, ids)
    assert groups == [3, 3]
    assert_no_worse(got, stock, exact)


def test_autocast(groups: list[int]) -> None:
    model, ids = family("Llama", torch.float32), tokens()
    exact = trained(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        stock = trained(model, ids)
        fuse(model, strict=True)
        got = trained(model, ids)
    assert groups == [3, 3]
    assert_no_worse(got, stock, exact)


def test_masks_are_those_of_layers_alone(groups: list[int]) -> None:
    """Seeds are drawn in the order of the calls, so that grouping changes no mask."""
    model, ids = family("Llama", lora_dropout=0.3), tokens()
    fuse(model, strict=True)
    expected = trained(ungrouped(model), ids)
    assert groups == []
    torch.testing.assert_close(trained(model, ids), expected)
    assert not torch.allclose(trained(model, ids, seed=6)["logits"], expected["logits"])
    with use_backend("reference"):
        torch.testing.assert_close(trained(model, ids), expected)


def test_each_layer_has_a_mask_of_its_own() -> None:
    block = attention(lora_dropout=0.5)
    block.k_proj, block.v_proj = copy.deepcopy(block.q_proj), copy.deepcopy(block.q_proj)
    fuse(block)
    x = torch.randn(9, 16)
    q, k, v = block(x)
    assert not torch.allclose(q, k) and not torch.allclose(k, v) and not torch.allclose(q, v)
    block.eval()
    q, k, v = block(x)
    torch.testing.assert_close([k, v], [q, q])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, groups: list[int]) -> None:
    model, ids = family("Llama", lora_dropout=0.3), tokens()
    fuse(model, strict=True)
    model.enable_input_require_grads()
    expected = trained(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    groups.clear()
    torch.testing.assert_close(trained(model, ids), expected)
    assert groups == [3] * 4, "forward and again in backward"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, groups: list[int]) -> None:
    model, ids = family("Llama"), tokens()
    model.eval()
    with mode():
        expected = model(input_ids=ids).logits
        fuse(model, strict=True)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert groups == ([3, 3] if mode is torch.no_grad else []), "inference tensors do not show changes"


def test_compiles_whole_and_alone(groups: list[int]) -> None:
    model, ids = family("Llama", target_modules=QKV), tokens()
    fuse(model, strict=True)
    expected = model(input_ids=ids).logits
    groups.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
    assert groups == []


def test_keeps_less_than_peft() -> None:
    model, ids = family("Llama", torch.float32, target_modules=QKV, lora_dropout=0.1), tokens(4, 32)
    stock = kept_bytes(model, ids)
    fuse(model, strict=True)
    assert kept_bytes(model, ids) < stock


def test_threads_do_not_meet() -> None:
    model = family("Llama", torch.float32)
    fuse(model, strict=True)
    inputs = [tokens(1, length) for length in (3, 5, 8)]
    wrong: list[int] = []
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(input_ids=inputs[n]).logits, expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- one block, whatever its forward does ------------------------------------------------------------------------------


def in_order(block: Any, x: Tensor) -> Any:
    return block.q_proj(x), block.k_proj(x), block.v_proj(x)


class LlamaAttention(nn.Module):
    """Stands in for transformers' class, with a forward that the test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.script: Callable[[Any, Tensor], Any] = in_order

    def forward(self, x: Tensor) -> Any:
        return self.script(self, x)


LlamaAttention.__module__ = "transformers.models.llama.modeling_llama"


def attention(dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """Such a block with a random adapter, not fused."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": QKV, "lora_dropout": 0.0} | lora
    model: Any = get_peft_model(nn.Sequential(LlamaAttention()), LoraConfig(**settings))
    model.add_adapter("second", LoraConfig(**settings))
    randomise(model)
    return model.base_model.model[0].to(dtype)


def flat(outputs: Any, x: Tensor, block: nn.Module) -> dict[str, Tensor]:
    """Outputs and the gradients that they give to x and to every parameter."""
    block.zero_grad()
    x.grad = None
    differentiable = [y for y in outputs if y.requires_grad]
    if differentiable:
        sum((y * torch.arange(1.0, y.shape[-1] + 1).cos()).sum() for y in differentiable).backward()  # type: ignore[union-attr]
    found = {f"y{n}": y.detach() for n, y in enumerate(outputs)}
    found |= {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return found if x.grad is None else {**found, "x": x.grad.clone()}


def compare(script: Callable[[Any, Tensor], Any], groups: list[int], sizes: list[int], **lora: Any) -> None:
    """The script on a fused block gives what it gives on PEFT's, computing groups of these sizes."""
    stock = attention(**lora)
    twin = copy.deepcopy(stock)
    fuse(twin, strict=True)
    start, results = torch.randn(5, 16), []
    for block in (stock, twin):
        block.script = script
        x = start.clone().requires_grad_()
        groups.clear()
        results.append(flat(block(x), x, block))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert groups == sizes
    assert mbf.peft.groups._current.sharing is None


def test_a_block(groups: list[int]) -> None:
    compare(in_order, groups, [3])


@pytest.mark.parametrize("used", [[], ["q_proj"], ["k_proj"], ["v_proj", "q_proj"], ["k_proj", "v_proj", "q_proj"]])
def test_whatever_is_called(used: list[str], groups: list[int]) -> None:
    compare(lambda block, x: [getattr(block, name)(x) for name in used], groups, [3] if used else [])


def test_a_layer_called_twice(groups: list[int]) -> None:
    compare(lambda block, x: [block.q_proj(x), block.q_proj(x), block.k_proj(x), block.k_proj(x)], groups, [3])


def test_another_x(groups: list[int]) -> None:
    compare(lambda block, x: [block.q_proj(x), block.k_proj(x + 1), block.v_proj(x)], groups, [3, 2])
    compare(lambda block, x: [block.q_proj(x), block.k_proj(x.clone()), block.v_proj(x.view(5, 16))], groups, [3, 2])

    def cross(block: Any, x: Tensor) -> Any:
        other = 2 * x
        return block.q_proj(x), block.k_proj(other), block.v_proj(other)

    compare(cross, groups, [3, 2])


def test_an_output_that_is_not_used_in_the_loss(groups: list[int]) -> None:
    def only(*kept: int) -> Callable[[Any, Tensor], Any]:
        return lambda block, x: [in_order(block, x)[n] for n in kept]

    for kept in ((0,), (1,), (1, 2)):
        compare(only(*kept), groups, [3])


def factor(layer: Any, name: str) -> Tensor:
    return getattr(layer, name)["default"].weight


# What happens to k between the calls of q and of k and v, and the groups that are then computed.
CHANGES: dict[str, tuple[Callable[[Any, Tensor], Any], list[int]]] = {
    "x in place": (lambda block, x: x.mul_(2), [3, 2]),
    "x through a view": (lambda block, x: x[0].zero_(), [3, 2]),
    "A in place": (lambda block, x: factor(block.k_proj, "lora_A").mul_(3), [3]),
    "B in place": (lambda block, x: factor(block.k_proj, "lora_B").mul_(3), [3]),
    "base in place": (lambda block, x: block.k_proj.base_layer.weight.mul_(0.5), [3]),
    "A replaced": (lambda block, x: setattr(block.k_proj.lora_A["default"], "weight", parameter(4, 16)), [3]),
    "base replaced": (lambda block, x: setattr(block.k_proj.base_layer, "weight", parameter(8, 16)), [3]),
    "A frozen": (lambda block, x: factor(block.k_proj, "lora_A").requires_grad_(False), [3]),
    "base trains": (lambda block, x: block.k_proj.base_layer.weight.requires_grad_(True), [3]),
    "scale": (lambda block, x: block.k_proj.set_scale("default", 0.25), [3]),
    "tensor scale": (lambda block, x: block.k_proj.scaling.update(default=torch.tensor(0.5)), [3]),
    "disabled": (lambda block, x: block.k_proj.enable_adapters(False), [3]),
    "merged": (lambda block, x: block.k_proj.merge(), [3]),
    "deleted": (lambda block, x: block.k_proj.delete_adapter("default"), [3]),
    "another adapter": (lambda block, x: block.k_proj.set_adapter("second"), [3]),
    "two adapters": (lambda block, x: block.k_proj.set_adapter(["default", "second"]), [3]),
    "output hook": (lambda block, x: block.k_proj.register_forward_hook(lambda module, args, y: 2 * y), [3]),
    "input hook": (
        lambda block, x: block.k_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        [3],
    ),
    "inner hook": (lambda block, x: block.k_proj.lora_B["default"].register_forward_hook(lambda m, a, y: 2 * y), [3]),
    "layer replaced": (lambda block, x: setattr(block, "k_proj", copy.deepcopy(block.v_proj)), [3]),
}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.1), requires_grad=False)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_between_the_calls(change: str, grad: bool, groups: list[int]) -> None:
    act, sizes = CHANGES[change]

    def script(block: Any, x: Tensor) -> Any:
        x = x * 1  # may change in place
        with torch.set_grad_enabled(grad and "in place" not in change and "view" not in change):
            q = block.q_proj(x)
            act(block, x)
        with torch.set_grad_enabled(grad):
            return q, block.k_proj(x), block.v_proj(x)

    compare(script, groups, [3, 2] if grad and "in place" in change else sizes)


@pytest.mark.parametrize("around", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_another_mode_between_the_calls(around: Any, groups: list[int]) -> None:
    def script(block: Any, x: Tensor) -> Any:
        q = block.q_proj(x)
        with around():
            k, v = block.k_proj(x), block.v_proj(x)
        return q, k, v

    stock = attention()
    twin = copy.deepcopy(stock)
    fuse(twin)
    stock.script = twin.script = script
    x = torch.randn(5, 16, requires_grad=True)
    for got, expected in zip(twin(x), stock(x), strict=True):
        assert got.dtype == expected.dtype and got.requires_grad == expected.requires_grad
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)
    assert groups == [3, 2]


def test_x_that_comes_to_require_a_gradient(groups: list[int]) -> None:
    block = attention()
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    fuse(block)

    def script(block: Any, x: Tensor) -> Any:
        return block.q_proj(x), block.k_proj(x.requires_grad_()), block.v_proj(x)

    block.script = script
    q, k, v = block(torch.randn(5, 16))
    assert [y.requires_grad for y in (q, k, v)] == [False, True, True] and groups == [3, 2]


def test_dropout_switched_off_between_the_calls() -> None:
    block = attention(lora_dropout=0.5)
    fuse(block)

    def script(block: Any, x: Tensor) -> Any:
        q = block.q_proj(x)
        block.eval()
        return q, block.k_proj(x), block.v_proj(x)

    block.script = script
    x = torch.randn(5, 16)
    _, k, v = block(x)
    unfuse(block)
    torch.testing.assert_close([k, v], [block.k_proj(x), block.v_proj(x)])


# -- members that cannot join ------------------------------------------------------------------------------------------


UNFIT: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "adapter elsewhere": lambda layer: layer.__dict__.update(_active_adapter=["elsewhere"]),
    "two adapters": lambda layer: layer.set_adapter(["default", "second"]),
    "base trains": lambda layer: layer.base_layer.bias.requires_grad_(True),
    "output hook": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
    "input hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)),
    "inner hook": lambda layer: layer.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y),
    "base hook": lambda layer: layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y),
}


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_the_others_stay_together(name: str, unfit: str, groups: list[int]) -> None:
    def script(block: Any, x: Tensor) -> Any:
        UNFIT[unfit](getattr(block, name))
        return in_order(block, x)

    compare(script, groups, [2])


def test_layers_that_peft_computes_are_not_grouped(groups: list[int]) -> None:
    block = attention()
    block.v_proj.forward = block.v_proj.forward
    report = fuse(block)
    assert report.shared == {"": ("q_proj", "k_proj")} and len(report.declined) == 1
    block(torch.randn(5, 16))
    assert groups == [2]


def test_a_single_fused_layer_leaves_the_block_alone() -> None:
    model = family("Llama", target_modules=["q_proj", "o_proj"])
    report = fuse(model)
    assert report.shared == {} and not any(isinstance(module, SharedInput) for module in model.modules())


def test_other_architectures_are_left_alone(groups: list[int]) -> None:
    block = attention()
    kind = type("OwnAttention", (LlamaAttention,), {})
    block.__class__ = kind
    assert fuse(block).shared == {} and type(block) is kind
    block(torch.randn(5, 16))
    assert groups == []


def test_a_layer_called_outside_of_its_block_computes_alone(groups: list[int]) -> None:
    block = attention()
    fuse(block)
    x = torch.randn(5, 16)
    in_order(block, x)
    assert groups == []


# -- replaced terms ----------------------------------------------------------------------------------------------------


def test_routes_are_asked_once_a_forward(groups: list[int]) -> None:
    model = family("Llama", target_modules=QKV)
    fuse(model, strict=True)
    ids, asked = tokens(), []
    layers = adapter_layers(model, "default")

    def terms(layer: Any) -> LoraTerms:
        asked.append(layer.name)
        return LoraTerms(torch.cat([layer.A, layer.A]), torch.cat([layer.B, layer.B], 1), 0.5 * layer.scale)

    expected = trained(model, ids)
    for layer in layers:
        layer.route(terms)
    groups.clear()
    torch.testing.assert_close(trained(model, ids), expected, rtol=1e-5, atol=1e-6)
    assert groups == [3, 3] and sorted(asked) == sorted(layer.name for layer in layers)
    for layer in layers:
        layer.route(None)
    torch.testing.assert_close(trained(model, ids), expected)


def test_a_route_set_between_the_calls_is_seen(groups: list[int]) -> None:
    block = attention()
    model = nn.Sequential(block)
    fuse(model)
    layer = next(layer for layer in adapter_layers(model, "default") if layer.name.endswith("k_proj"))

    def script(block: Any, x: Tensor) -> Any:
        q = block.q_proj(x)
        layer.route(lambda layer: LoraTerms(layer.A, layer.B, 0.0))
        return q, block.k_proj(x)

    block.script = script
    x = torch.randn(5, 16)
    _, k = block(x)
    torch.testing.assert_close(k, block.k_proj.base_layer(x))
    assert groups == [3]


# -- nothing is kept ---------------------------------------------------------------------------------------------------


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Weak references to every output of every group."""
    found: list[Any] = []
    compute = mbf.peft.groups.lora_group

    def watched(x: Tensor, layers: Any) -> Any:
        ys = compute(x, layers)
        found.extend(weakref.ref(y) for y in ys)
        return ys

    monkeypatch.setattr(mbf.peft.groups, "lora_group", watched)
    yield found


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_nobody_asked_for_die_with_the_forward(grad: bool, outputs: list[Any]) -> None:
    block = attention()
    fuse(block)
    block.script = lambda block, x: block.q_proj(x)
    with torch.set_grad_enabled(grad):
        x = torch.randn(5, 16)
        q = block(x)
    assert [ref() is None for ref in outputs] == [False, True, True]
    del q
    assert outputs[0]() is None


def test_outputs_die_when_another_x_comes(outputs: list[Any]) -> None:
    block = attention()
    fuse(block)

    def script(block: Any, x: Tensor) -> Any:
        q = block.q_proj(x)
        k = block.k_proj(2 * x)
        assert [ref() is None for ref in outputs] == [False, True, True, False, False]
        return q, k

    block.script = script
    block(torch.randn(5, 16))


def test_what_is_handed_out_is_let_go(outputs: list[Any]) -> None:
    block = attention()
    fuse(block)

    def script(block: Any, x: Tensor) -> Any:
        x = x + 1
        alive = weakref.ref(x)
        for layer in (block.q_proj, block.k_proj, block.v_proj):
            layer(x)
        assert all(ref() is None for ref in outputs)
        del x
        assert alive() is None
        return None

    block.script = script
    with torch.no_grad():
        block(torch.randn(5, 16))


def test_an_exception_leaves_nothing_behind(outputs: list[Any], groups: list[int]) -> None:
    block = attention()
    fuse(block)

    def script(block: Any, x: Tensor) -> Any:
        block.q_proj(x)
        raise KeyError

    block.script = script
    x = torch.randn(5, 16)
    with pytest.raises(KeyError):
        block(x)
    assert all(ref() is None for ref in outputs) and mbf.peft.groups._current.sharing is None
    block.script = in_order
    assert len(block(x)) == 3


def test_an_error_of_the_operator_leaves_the_layers_usable() -> None:
    block = attention()
    fuse(block)
    with pytest.raises(ValueError, match=r"layers\[0\]: A has shape"):
        block(torch.randn(5, 15))
    assert len(block(torch.randn(5, 16))) == 3


def test_two_forwards_with_the_same_x(groups: list[int]) -> None:
    block = attention(lora_dropout=0.5)
    fuse(block)
    x = torch.randn(5, 16)
    first, second = block(x), block(x)
    assert groups == [3, 3]
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# -- everything else stays as it was -----------------------------------------------------------------------------------


def test_module_around_keeps_name_keys_and_kind() -> None:
    model = family("Llama")
    block = model.base_model.model.model.layers[0].self_attn
    kind, printed, keys = type(block), repr(model), list(model.state_dict())
    fuse(model)
    assert type(block) is not kind and isinstance(block, kind) and isinstance(block, SharedInput)
    assert (type(block).__name__, type(block).__module__) == (kind.__name__, kind.__module__)
    assert repr(model) == printed and list(model.state_dict()) == keys
    assert plain_class(block) is kind
    unfuse(model)
    assert type(block) is kind and not any(isinstance(module, SharedInput) for module in model.modules())
    assert "_recompute" not in model.base_model.model.model.layers[0].mlp.__dict__


def test_copies_are_grouped_and_independent(groups: list[int]) -> None:
    model, ids = family("Llama"), tokens()
    fuse(model)
    logits = model(input_ids=ids).logits
    for twin in copies(model):
        groups.clear()
        assert torch.equal(twin(input_ids=ids).logits, logits) and groups == [3, 3]
        randomise(twin)
        assert torch.equal(model(input_ids=ids).logits, logits)
        unfuse(twin)
        assert not any(isinstance(module, SharedInput | FusedLinear) for module in twin.modules())


def test_context_undoes_the_groups() -> None:
    model = family("Llama")
    first = model.base_model.model.model.layers[0]
    fuse(first)
    before = [type(module) for module in model.modules()]
    assert any(issubclass(kind, SharedInput) for kind in before)
    with pytest.raises(KeyError), fused(model) as report:
        assert len(report.shared) == 2 and len(report.mlps) == 2
        raise KeyError
    assert [type(module) for module in model.modules()] == before


def test_fused_twice_and_after_the_layers_are_gone() -> None:
    model, ids = family("Llama"), tokens()
    assert fuse(model) == fuse(model)
    plain: Any = model.merge_and_unload()
    logits = plain(input_ids=ids).logits
    unfuse(plain)
    assert torch.equal(plain(input_ids=ids).logits, logits)
    assert not any(isinstance(module, SharedInput) for module in plain.modules())


def test_a_block_that_lost_its_layers_is_given_back() -> None:
    model = family("Llama", target_modules=["q_proj", "v_proj"])
    fuse(model)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.v_proj.forward = layer.self_attn.v_proj.forward
        layer.self_attn.v_proj.__class__ = nn.Linear
    assert fuse(model).shared == {}
    assert not any(isinstance(module, SharedInput) for module in model.modules())


def test_report_counts_and_names() -> None:
    model: PeftModel = family("Llama", target_modules=[*QKV, "gate_proj", "up_proj"], config={"num_hidden_layers": 4})
    report = fuse(model)
    assert report.mlps == () and len(report.shared) == 8
    attention = "base_model.model.model.layers.{}.self_attn"
    assert report.shared[attention.format(3)] == ("q_proj", "k_proj", "v_proj")
    named = ", ".join(attention.format(n) for n in range(3))
    assert str(report).splitlines()[:2] == [
        "20 of 20 LoRA layers fused",
        f"  4 x q_proj, k_proj, v_proj computed together ({named} and 1 more)",
    ]
    assert "4 x gate_proj, up_proj computed together" in str(report)
