"""W of a layer as an ordinary matrix: a copy in fp32, whatever the base keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mbf.peft import adapter_layers
from mbf.peft.base_weight import dense_weight, unpack

from .helpers import lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_a_copy_in_fp32(dtype: torch.dtype) -> None:
    module = lora().to(dtype)
    layer = adapter_layers(nn.Sequential(module), "default")[0]
    W = layer.weight()
    assert W.dtype == torch.float32 and not W.requires_grad
    assert torch.equal(W, module.base_layer.weight.float())
    W.zero_()
    assert bool(module.base_layer.weight.count_nonzero())


def test_a_weight_stored_transposed_is_turned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Conv1D(7, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["inner"], fan_in_fan_out=True))
    layer = adapter_layers(model, "default")[0]
    W, base = layer.weight(), layer.module.get_base_layer()
    x = torch.randn(3, 5)
    torch.testing.assert_close(x @ W.T + base.bias, base(x))


def test_a_quantised_one_is_dequantised() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="the error below covers a base without a plain weight")
    base = bnb.nn.Linear8bitLt(16, 8, bias=False, has_fp16_weights=False)
    W = torch.randn(8, 16)
    base.load_state_dict({"weight": W})
    base = base.to("cpu")
    base(torch.randn(2, 16))
    assert (dense_weight(base, "layer") - W).abs().max() < 0.05


def test_what_inference_packed_trains_and_is_dequantised_again() -> None:
    """bitsandbytes packs 4-bit weights where the processor has AVX512-BF16; elsewhere they stay as they are."""
    bnb = pytest.importorskip("bitsandbytes", reason="the stand-in of the next test runs the same code everywhere")
    base = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    W, x = dense_weight(base, "layer"), torch.randn(3, 64)
    with torch.no_grad():
        base.eval()(x)
    assert (dense_weight(base, "layer") - W).abs().max() < 1e-3
    with torch.no_grad():
        base(x)
    unpack(nn.Sequential(base))
    y = base.train()(x.requires_grad_())
    torch.testing.assert_close(y, x @ W.T, rtol=1e-2, atol=1e-2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx[0], W.sum(0), rtol=1e-2, atol=1e-2)


def test_only_what_is_packed_is_unpacked() -> None:
    class Packed(nn.Module):
        def __init__(self, packed: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))
            self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)
            self.saved = 0

        def _save_to_state_dict(self, *_: Any) -> None:
            self.saved += 1

    model = nn.ModuleList([Packed(True), Packed(False), nn.Linear(2, 2)])
    unpack(model)
    assert [model[0].saved, model[1].saved] == [1, 0]


def test_one_that_is_no_matrix_of_numbers_is_named() -> None:
    base = nn.Module()
    base.register_buffer("weight", torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(
        TypeError, match=r"layer q_proj: the weight of its Module is torch\.int32 \[3, 4\].*load the base"
    ):
        dense_weight(base, "q_proj")
    with pytest.raises(TypeError, match=r"layer q_proj: the weight of its Module cannot be dequantised"):
        dense_weight(nn.Module(), "q_proj")
