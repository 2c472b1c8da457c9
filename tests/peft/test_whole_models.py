"""Fused models: gradient checkpointing, PEFT's default dtypes, torch.compile, and the class in PEFT's place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

import mbf.peft
from mbf.peft import FusedLinear

from .helpers import add, llama, lora, randomise, swapped, tokens, took, widen_adapter


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
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)  # in the graph the scale is a factor of its own


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
