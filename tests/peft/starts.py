"""What the tests of the initialisers look at: an adapter's layers, and a model's state before and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mbf.peft import AdapterLayer


def layers_of(model: nn.Module, adapter: str = "default") -> list[AdapterLayer]:
    modules = {n: m for n, m in model.named_modules() if adapter in getattr(m, "lora_A", {})}
    return [AdapterLayer(name, adapter, module) for name, module in modules.items()]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def assert_orthonormal(model: nn.Module, bound: float = 2e-6) -> None:
    for layer in layers_of(model):
        A = layer.A.detach().double()
        assert (A @ A.mT - torch.eye(len(A), dtype=A.dtype)).abs().max() <= bound, layer.name


def products(model: nn.Module) -> list[Tensor]:
    return [layer.B.detach().double() @ layer.A.detach().double() for layer in layers_of(model)]
