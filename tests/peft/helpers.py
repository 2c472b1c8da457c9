"""Small models with a random (never zero) adapter, and the rule by which a fused result counts as right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mbf.peft import FusedLinear, calls

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model: nn.Module) -> None:
    """Random A and B in every adapter of the model."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for factor in (*module.lora_A.values(), *module.lora_B.values()):
                    for parameter in factor.parameters():
                        parameter.normal_(std=0.3)


def base_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def llama(**options: Any) -> PeftModel:
    """A two-layer Llama with a random adapter ``default``."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base_llama(), LoraConfig(**settings))
    randomise(model)
    return model


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 64, (rows, length))


def lora(base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One LoRA layer of PEFT around ``base`` with a random adapter ``default``."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["0"], "lora_dropout": 0.0} | options
    model = nn.Sequential(nn.Linear(15, 21) if base is None else base)
    model = inject_adapter_in_model(LoraConfig(**settings), model)
    randomise(model)
    model = model.to(dtype)
    return model[0]


def add(layer: Any, name: str, **options: Any) -> None:
    """Add a second adapter to ``layer``."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["0"]} | options
    inject_adapter_in_model(LoraConfig(**settings), nn.Sequential(layer), adapter_name=name)
    randomise(layer)


def swapped(layer: Any) -> Any:
    """An independent copy of ``layer`` whose class is FusedLinear."""
    assert type(layer) is Linear
    twin = copy.deepcopy(layer)
    twin.__class__ = FusedLinear
    return twin


@contextmanager
def took(path: str, times: int | None = None) -> Iterator[None]:
    """The block's fused-layer forwards all took ``path``, and there was one at least (or exactly ``times``)."""
    before = calls.copy()
    yield
    other = "slow" if path == "fast" else "fast"
    assert calls[other] == before[other]
    assert calls[path] > before[path]
    assert times is None or calls[path] - before[path] == times


def error(value: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm()
    return (
        ((value.double() - exact.double()).norm() / norm.clamp_min(1e-300)).item() if norm > 0 else value.norm().item()
    )


def assert_as_accurate(value: Tensor, stock: Tensor, exact: Tensor, what: str) -> None:
    """``value`` is at most twice as far from the fp64 result as torch's own in the same dtype."""
    assert value.shape == stock.shape and value.dtype == stock.dtype, what
    small = torch.finfo(value.dtype).eps if value.numel() < 64 else 0.0
    assert error(value, exact) <= 2 * error(stock, exact) + 1e-6 + small, what


def results(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of ``layer`` at x for the output's gradient dy."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}
