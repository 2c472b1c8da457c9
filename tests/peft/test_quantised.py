"""One fused LoRA layer on a quantised base: PEFT's results within the error rule, and a base that nobody touches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import mbf.peft
from mbf.ops import draw_seed
from mbf.peft import fuse, unfuse
from mbf.peft.linear import FusedForward
from mbf.peft.quantised import QUANTISED, fused_class

from .helpers import assert_as_accurate, results, took
from .quantised import BASES, D_IN, D_OUT, MERGEABLE, Codes, add, base_state, config, container, exact, layer

KINDS = list(BASES)
HALVES = [
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]

pytestmark = pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to:UserWarning")


def fused(made: Any) -> Any:
    """An independent copy of the layer, fused by ``fuse``."""
    twin = copy.deepcopy(made)
    assert fuse(container(twin), strict=True).fused == ("0",)
    return twin


def operands(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*rows, D_IN).to(dtype), torch.randn(*rows, D_OUT).to(dtype)


def compare(made: Any, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Output and every gradient as accurate as PEFT's, in PEFT's dtypes, by one fused call."""
    twin = fused(made)
    stock, right = results(made, x, dy), exact(made, x, dy)
    with took("fast", 1):
        ours = results(twin, x, dy)
    assert ours.keys() == stock.keys() == right.keys()
    for name in stock:
        assert_as_accurate(ours[name], stock[name], right[name], name)


def test_every_listed_class_is_made_here() -> None:
    made = {(type(one).__module__, type(one).__qualname__) for one in map(layer, KINDS)}
    assert made == set(QUANTISED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_peft_s_and_comes_back(kind: str) -> None:
    made = layer(kind)
    before, printed, keys = type(made), repr(made), list(made.state_dict())
    model = container(made)
    fuse(model, strict=True)
    assert type(made) is not before and isinstance(made, before) and isinstance(made, FusedForward)
    assert list(made.state_dict()) == keys
    assert repr(made) == printed and printed.startswith(f"lora.{before.__name__}(")
    assert fuse(model, strict=True).fused == ("0",), "fusing twice is fusing once"
    unfuse(model)
    assert type(made) is before
    with mbf.peft.fused(model):
        assert isinstance(made, FusedForward)
    assert type(made) is before


@pytest.mark.parametrize("kind", KINDS)
def test_results_in_fp32(kind: str) -> None:
    compare(layer(kind), *operands())


@pytest.mark.parametrize("dtype, adapter", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_in_half_precision(kind: str, dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    compare(layer(kind, dtype, adapter), *operands(dtype))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hqq"])  # whose own product wants one dtype
def test_an_input_wider_than_the_base(kind: str) -> None:
    compare(layer(kind, torch.bfloat16, torch.float32), *operands())


@pytest.mark.parametrize("kind", KINDS)
def test_two_active_adapters(kind: str) -> None:
    made = layer(kind)
    if isinstance(made.base_layer, Codes):
        made.update_layer("second", 3, lora_alpha=5, config=config(r=3))
        made.lora_B["second"].weight.data.normal_()
    else:
        add(made, "second")
    made.set_adapter(["default", "second"])
    compare(made, *operands())


@pytest.mark.parametrize("kind", KINDS)
def test_in_inference_mode(kind: str) -> None:
    made, x = layer(kind).eval(), operands()[0]
    twin = fused(made)
    with torch.inference_mode(), took("fast", 1):
        y = twin(x)
        torch.testing.assert_close(y, made(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    made, (x, dy) = layer(kind), operands()
    twin = fused(made)
    with torch.autocast("cpu", torch.bfloat16):
        stock, right = results(made, x, dy), exact(made, x, dy)
        with took("fast", 1):
            ours = results(twin, x, dy)
    for name in stock:
        assert_as_accurate(ours[name], stock[name], right[name], name)


class HalfCodes(Codes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).half()


@pytest.mark.parametrize("kind", ["awq", "aqlm", "gptq"])
def test_autocast_of_cuda_gives_the_dtype_of_peft(kind: str) -> None:
    """PEFT asks for CUDA's autocast; where it skips its casts, a half base output and an fp32 branch give fp32."""
    made, x = layer(kind), operands()[0]
    made.base_layer.__class__ = HalfCodes
    twin = fused(made)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float32)
    try:
        stock = made(x)
        with took("fast", 1):
            ours = twin(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert ours.dtype is stock.dtype is (torch.float32 if kind == "awq" else torch.float16)
    torch.testing.assert_close(ours, stock)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_the_mask_of_the_drawn_seed_forward_and_backward(kind: str) -> None:
    made, (x, dy) = layer(kind, lora_dropout=0.4), operands()
    twin = fused(made)
    torch.manual_seed(7)
    right = exact(made, x, dy, draw_seed("cpu"))
    torch.manual_seed(7)
    with took("fast", 1):
        ours = results(twin, x, dy)
    for name in right:
        torch.testing.assert_close(ours[name].double(), right[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_the_mean_and_variance_of_peft_s(kind: str) -> None:
    """At x = 1 the branch is a random sum; its first two moments over many rows are those of PEFT's."""
    made = layer(kind, lora_dropout=0.25)
    twin, x = fused(made), torch.ones(8192, D_IN)
    with torch.no_grad(), took("fast", 1):
        ours, stock, base = twin(x), made(x), made.base_layer(x)
        made.eval()
    ours, stock = ours - base, stock - base
    deviation = stock.std(0)
    assert ((ours.mean(0) - stock.mean(0)).abs() < 6 * deviation * (2 / len(x)) ** 0.5).all()
    torch.testing.assert_close(ours.std(0), deviation, rtol=0.1, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_sees_the_same_mask_again(kind: str, use_reentrant: bool) -> None:
    twin, (x, dy) = fused(layer(kind, lora_dropout=0.5)), operands()
    gradients = []
    for run in (twin, lambda x: checkpoint(twin, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        twin.zero_grad()
        run(leaf).backward(dy)
        gradients.append([leaf.grad, *(p.grad.clone() for p in twin.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 3
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


# -- what is handed to PEFT --------------------------------------------------------------------------------------------


def declined(made: Any, twin: Any = None) -> None:
    """The fused layer's results are PEFT's bit for bit, by PEFT's own forward."""
    twin, found = copy.deepcopy(made) if twin is None else twin, []
    twin.__class__ = fused_class(type(twin))
    x, dy = operands(rows=(3, 5))
    for one in (made, twin):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        before = mbf.peft.calls.copy()
        y = one(leaf)
        if one is twin:
            assert mbf.peft.calls - before == {"slow": 1}
        y.backward(dy)
        found.append([y, leaf.grad, *(p.grad for p in one.parameters())])
    for stock, ours in zip(*found, strict=True):
        assert (stock is None) == (ours is None)
        assert stock is None or torch.equal(stock, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled(kind: str) -> None:
    made = layer(kind)
    made.enable_adapters(False)
    declined(made)


@pytest.mark.parametrize("kind", KINDS)
def test_none_of_the_active_adapters_is_here(kind: str) -> None:
    made = layer(kind)
    made._active_adapter = ["elsewhere"]
    declined(made)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_a_factor(kind: str) -> None:
    made = layer(kind)
    made.lora_A["default"].register_forward_hook(lambda module, inputs, y: 2 * y)
    declined(made)


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq"])
def test_dora(kind: str) -> None:
    made = layer(kind, use_dora=True)
    model = container(made)
    assert "DoraLinearVariant" in fuse(model).declined["0"]
    declined(made)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_mixed_batch(kind: str) -> None:
    made, names = layer(kind), ["second", "__base__", "default"]
    add(made, "second")
    twin, x = fused(made.eval()), operands()[0]
    with torch.no_grad(), took("slow", 1):  # PEFT writes into the base output, which its autograd does not allow
        assert torch.equal(twin(x, adapter_names=names), made(x, adapter_names=names))


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merging_and_unmerging_is_peft_s(kind: str) -> None:
    made, twin = mergeable(kind), mergeable(kind)
    fuse(container(twin), strict=True)
    before = base_state(made)
    for one in (made, twin):
        one.merge()
    assert_same_base(twin, made)
    assert any(not torch.equal(before[name], value) for name, value in base_state(twin).items()), "nothing was merged"
    declined(made, twin)
    for one in (made, twin):
        one.unmerge()
    assert_same_base(twin, made)
    x, dy = operands()
    stock, ours = results(made, x, dy), results(twin, x, dy)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def mergeable(kind: str) -> Any:
    made = layer(kind)
    if kind == "torchao":  # the model that transformers loads carries this
        from torchao.quantization import Int8WeightOnlyConfig

        made.get_apply_tensor_subclass = Int8WeightOnlyConfig
    return made


def assert_same_base(one: nn.Module, other: nn.Module) -> None:
    first, second = base_state(one), base_state(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("kind", MERGEABLE)
def test_disabling_while_merged_unmerges(kind: str) -> None:
    made, twin = mergeable(kind), mergeable(kind)
    for one in (made, twin):
        one.merge()
        one.enable_adapters(False)
    declined(made, twin)
    assert not made.merged and not twin.merged
    assert_same_base(twin, made)


# -- the base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_every_number_of_the_base_alone(kind: str) -> None:
    twin, (x, dy) = fused(layer(kind, lora_dropout=0.1)), operands()
    results(twin, x, dy)  # a first forward may pack the weight in the format's own way
    before, adapter = base_state(twin), twin.lora_A["default"].weight.clone()
    trained = [p for p in twin.parameters() if p.requires_grad]
    assert len(trained) == 2
    optimiser = torch.optim.AdamW(trained, lr=0.1)
    with took("fast", 3):
        for _ in range(3):
            results(twin, x, dy)
            optimiser.step()
    assert not torch.equal(twin.lora_A["default"].weight, adapter)
    for name, value in base_state(twin).items():
        assert torch.equal(value, before[name]), name


class Kept(nn.Module):
    """Gives out the very tensor that it keeps, as a cache would."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        self.register_buffer("qweight", torch.zeros(1))
        self.y = torch.randn(3, 7, D_OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.y


def test_the_base_output_is_not_changed_in_place() -> None:
    made = layer("gptq")
    made.base_layer = made.quant_linear_module = Kept()
    twin, before = fused(made), made.base_layer.y.clone()
    with took("fast", 1):
        y = twin(operands()[0])
    assert torch.equal(twin.base_layer.y, before) and not torch.equal(y, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_compute_alike(kind: str) -> None:
    twin, x = fused(layer(kind)).eval(), operands()[0]
    expected = twin(x)
    others = [copy.deepcopy(twin)]
    if kind != "torchao":  # whose tensors cannot be pickled, fused or not
        others.append(pickle.loads(pickle.dumps(twin)))
    for other in others:
        assert type(other) is type(twin)
        with took("fast", 1):
            assert torch.equal(other(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph_as_peft_s_layer_does(kind: str) -> None:
    made, (x, dy) = layer(kind), operands()
    stock, graphs = results(made, x, dy), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    for one in (made, fused(made)):
        torch._dynamo.reset()
        found = results(torch.compile(one, fullgraph=True, backend=backend), x, dy)
    assert ["lora_accumulate" in graph for graph in graphs] == [False, True]
    for name in stock:
        ours = found[f"_orig_mod.{name}" if name.startswith("lora") else name]
        torch.testing.assert_close(ours, stock[name], rtol=1e-4, atol=1e-4)
