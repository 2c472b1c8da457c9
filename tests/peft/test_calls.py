"""One fused layer beyond the table of states: shapes, repeated use, dropout, tensor subclasses, torch.func."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils.checkpoint import checkpoint

from mbf.ops import draw_seed, dropout_mask
from mbf.ops.philox import keep_scale
from mbf.peft import FusedLinear

from .helpers import add, assert_as_accurate, lora, swapped, took
from .outcomes import compare
from .states import State, tag


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
    compare(State("odd shapes", True), layer, torch.rand(rows, d_in), torch.rand(rows, d_out))


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


def test_tensor_subclass_as_base_weight_is_run_by_the_base_layer() -> None:
    layer, x = lora(), torch.randn(5, 15)
    tag(layer.base_layer)
    expected = layer(x)
    layer.__class__ = FusedLinear
    with took("fast", 1):
        y = layer(x)
    torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_base_weight_is_run_by_the_base_layer() -> None:
    layer, x = lora(), torch.randn(5, 15)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().to_sparse_csr(), requires_grad=False)
    expected = layer(x)
    layer.__class__ = FusedLinear
    with took("fast", 1):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [Tensor.to_sparse_csr, Tensor.to_sparse, lambda x: torch.nested.nested_tensor([x[:2], x[2:]])],
    ids=["CSR", "COO", "nested"],
)
def test_an_input_without_strides_is_peft_s(make: Callable[[Tensor], Tensor]) -> None:
    layer, x = lora(nn.Linear(15, 12, bias=False)), torch.randn(5, 15)
    given = make(x)
    expected = layer(given)
    fused = swapped(layer)
    with took("slow"):
        got = fused(given)
    dense = [torch.cat([*y.unbind()]) if y.is_nested else y.to_dense() for y in (got, expected)]
    assert torch.equal(*dense)


def test_a_scaling_that_is_not_finite_is_peft_s() -> None:
    layer, x = lora(), torch.randn(5, 15)
    layer.scaling["default"] = math.nan
    fused = swapped(layer)
    with took("slow"):
        assert fused(x).isnan().all()


def test_traced_by_torch_jit() -> None:
    layer, x = lora(lora_dropout=0.1).eval(), torch.randn(5, 15)
    traced = torch.jit.trace(swapped(layer), x)
    torch.testing.assert_close(traced(x + 1), layer(x + 1))


def test_function_transforms() -> None:
    layer, x = lora(), torch.randn(3, 5, 15)
    fused = swapped(layer)
    with took("slow"):
        assert torch.equal(torch.vmap(fused)(x), torch.vmap(layer)(x))
        ours = torch.func.jvp(fused, (x,), (x,))
    for one, other in zip(ours, torch.func.jvp(layer, (x,), (x,)), strict=True):
        assert torch.equal(one, other)


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


# -- sharded by DTensor ------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_a_layer_of_dtensors_is_peft_s(mesh: dist.DeviceMesh) -> None:
    layer = lora()
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        for name, parameter in list(module.named_parameters()):
            sharded = distribute_tensor(parameter.detach(), mesh, [Replicate()])
            setattr(module, name, nn.Parameter(sharded, parameter.requires_grad))
    x, outputs = distribute_tensor(torch.randn(5, 15), mesh, [Replicate()]), []
    for kind in (type(layer), FusedLinear):
        layer.__class__ = kind
        layer.zero_grad()
        if kind is FusedLinear:
            with took("slow", 1):
                y = layer(x)
        else:
            y = layer(x)
        y.square().sum().backward()
        outputs.append([y, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(outputs[0]) == 3
    for stock, ours in zip(*outputs, strict=True):
        assert isinstance(stock, DTensor) and isinstance(ours, DTensor)
        assert torch.equal(ours.full_tensor(), stock.full_tensor())


def test_dtensors_in_the_adapter_alone_are_peft_s_error(mesh: dist.DeviceMesh) -> None:
    layer, x = lora(), torch.randn(5, 15)
    weight = layer.lora_A["default"].weight
    layer.lora_A["default"].weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
    layer.__class__ = FusedLinear
    with took("slow", 1), pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        layer(x)
