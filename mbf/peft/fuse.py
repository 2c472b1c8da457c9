"""``fuse``, ``unfuse`` and ``fused``: swap the class of PEFT's LoRA layers and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from torch import nn

from mbf.peft.eligibility import layer_reason
from mbf.peft.linear import FusedLinear
from mbf.peft.report import FuseReport

NOT_PEFT = """the model has no PEFT LoRA layer; add an adapter first:
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))"""


def fuse(model: nn.Module, *, strict: bool = False) -> FuseReport:
    """Have the LoRA layers of ``model`` compute with ``mbf.ops.lora_linear``, in place.

    Each eligible ``peft.tuners.lora.layer.Linear`` becomes a ``FusedLinear``; parameters, state-dict keys and saved
    files stay as they are. The model may be a PeftModel, a model with injected adapters, or contain either. Layers that
    are fused already stay so.

    Args:
        model: any module with LoRA layers of PEFT in it.
        strict: raise instead of leaving a layer to PEFT.

    Returns:
        Which layers are fused and why the others are not.

    Raises:
        ValueError: there is no LoRA layer; or ``strict`` and a layer is declined. Nothing is changed then.
    """
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(NOT_PEFT)
    inside_attention = {
        id(m) for layer in layers.values() if isinstance(layer, MultiheadAttention) for m in layer.base_layer.modules()
    }
    declined: dict[str, str] = {}
    for name, layer in layers.items():
        reason = layer_reason(layer, (Linear, FusedLinear))
        if id(layer) in inside_attention:
            reason = "MultiheadAttention merges it into the weight and never calls it"
        if reason is not None:
            declined[name] = reason
    report = FuseReport(tuple(name for name in layers if name not in declined), declined)
    if strict and declined:
        raise ValueError(f"{report}\nnothing was changed; fuse(model) without strict=True leaves these layers to PEFT")
    for name in report.fused:
        layers[name].__class__ = FusedLinear
        layers[name].__dict__.pop("_borrowed", None)
    return report


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``: every ``FusedLinear`` in ``model`` becomes PEFT's ``lora.Linear`` again."""
    for layer in _lora_layers(model).values():
        if isinstance(layer, FusedLinear):
            layer.release()


@contextmanager
def fused(model: nn.Module, *, strict: bool = False) -> Iterator[FuseReport]:
    """``fuse`` for the length of a block; the layers that were fused before it stay fused after it."""
    before = {id(layer) for layer in _lora_layers(model).values() if type(layer) is FusedLinear and not layer._borrowed}
    report = fuse(model, strict=strict)
    swapped = [layer for name, layer in _lora_layers(model).items() if name in report.fused and id(layer) not in before]
    try:
        yield report
    finally:
        for layer in swapped:
            layer.release()


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
