"""A fused Llama, computed by the kernels from its attention and MLP down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mbf
from mbf import ops
from tests.continual.tiny import batch, peft_model


def step(model: Any) -> dict[str, torch.Tensor]:
    """The loss of one batch, and its gradients."""
    torch.manual_seed(1)
    loss = model(**batch(0)).loss
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_step_of_a_fused_llama(on_triton: list[str], memory: Any) -> None:
    model = peft_model(lora_dropout=0.2, init_lora_weights=False, target_modules="all-linear")
    mbf.fuse(model, strict=True, memory=memory)
    got = step(model)
    # In each of two blocks q, k and v at once, o, gate and up at once, down.
    assert on_triton.count("project") == on_triton.count("input_gradient") == 8
    assert "activation" in on_triton and "activation_gradient" in on_triton
    on_triton.clear()
    with ops.use_backend("reference"):
        expected = step(model)
    assert on_triton == []
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
