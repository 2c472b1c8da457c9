"""What the fused forward computes exactly as PEFT does, and a reason in words for everything else.

The tests run on every forward of every layer, so they read ``_modules`` and ``_parameters`` directly:
``nn.Module.__getattr__`` is Python and costs about as much as the rest of a test together. A ``layer`` is one of
PEFT's LoRA layers, which are an ``nn.Module`` and a ``LoraLayer`` by two bases of theirs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.autograd import forward_ad

from mbf.ops.philox import P_END
from mbf.peft.sharded import is_sharded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = (nn.Parameter, Tensor)  # not DTensor, not a quantised or offloaded subclass


def plain_weight(module: nn.Module, resting: bool = False) -> Tensor | None:
    """``module.weight`` if it is a registered, ordinary float tensor with strides, else None.

    ``resting`` is for a look between forwards: a weight that FSDP2 shards counts as the one that a forward gathers.
    """
    weight: Any = module._parameters.get("weight")
    ordinary = type(weight) in PLAIN or (resting and weight is not None and is_sharded(weight))
    return weight if ordinary and weight.dtype in _DTYPES and weight.layout is torch.strided else None


def _watched(module: nn.Module) -> bool:
    """Whether somebody must see ``module`` called: hooks, or ``forward`` replaced on the instance (accelerate)."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or torch.jit.trace is at work, not torch.compile."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()
    )


def base_reason(layer: Any) -> str | None:
    """Why the base layer must be run by PEFT's own forward, or None."""
    if _watched(layer._modules["base_layer"]):
        return "its base layer has hooks or a replaced forward"
    return None


def adapter_reason(layer: Any, adapter: str, resting: bool = False) -> str | None:
    """Why ``adapter``, which the layer has, cannot be computed by the fused forward, or None; ``resting`` as above."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is the LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    modules: Any = layer._modules
    A: nn.Module = modules["lora_A"]._modules[adapter]
    B: nn.Module = modules["lora_B"]._modules[adapter]
    dropout: nn.Module = modules["lora_dropout"]._modules[adapter]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return f"lora_A and lora_B of adapter {adapter!r} are {type(A).__name__} and {type(B).__name__}, not nn.Linear"
    if A._parameters.get("bias") is not None or B._parameters.get("bias") is not None:
        return f"adapter {adapter!r} has a bias (lora_bias=True)"
    if type(dropout) is nn.Dropout:
        if dropout.inplace or dropout.p >= P_END:
            return f"lora_dropout of adapter {adapter!r} is {dropout}"
    elif type(dropout) is not nn.Identity:
        return f"lora_dropout of adapter {adapter!r} is {type(dropout).__name__}, not nn.Dropout"
    if _watched(A) or _watched(B) or _watched(dropout):
        return f"lora_A, lora_B or lora_dropout of adapter {adapter!r} has hooks or a replaced forward"
    weight_A, weight_B = plain_weight(A, resting), plain_weight(B, resting)
    if weight_A is None or weight_B is None:
        return f"A or B of adapter {adapter!r} is not an ordinary float tensor"
    if weight_A.dtype is not weight_B.dtype:
        return f"A and B of adapter {adapter!r} differ in dtype: {weight_A.dtype} and {weight_B.dtype}"
    scale = layer.scaling[adapter]
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or not scale.is_floating_point():
            return f"the scaling of adapter {adapter!r} is a {scale.dim()}-d {scale.dtype} tensor, not a 0-d float one"
    elif not isinstance(scale, (float, int)) or not (torch.compiler.is_compiling() or math.isfinite(scale)):
        return f"the scaling of adapter {adapter!r} is {scale!r}, neither a finite number nor a 0-d tensor"
    return None


def call_reason(layer: Any, x: Tensor, active: list[str]) -> str | None:
    """Why this call with input ``x`` and the adapters ``active`` must go to PEFT's own forward, or None."""
    if type(x) not in PLAIN or x.dtype not in _DTYPES:
        return f"its input is {type(x).__name__} {getattr(x, 'dtype', '')}, not an ordinary float tensor"
    if x.layout is not torch.strided or x.is_nested:
        return f"its input is a {'nested' if x.is_nested else x.layout} tensor"
    if torch_module._has_any_global_hook():
        return "a global module hook is registered"
    if transformed():
        return "torch.func, forward-mode differentiation or torch.jit.trace is at work"
    if (reason := base_reason(layer)) is not None:
        return reason
    for adapter in active:
        if (reason := adapter_reason(layer, adapter)) is not None:
            return reason
        if not layer.cast_input_dtype_enabled:
            modules: Any = layer._modules
            if modules["lora_A"]._modules[adapter]._parameters["weight"].dtype is not x.dtype:
                return "casting of the input is disabled and the dtypes of input and adapter differ"
    return None


def layer_reason(layer: Any, fused: type | None) -> str | None:
    """Why ``layer``, any LoRA layer of PEFT, is not to become a ``fused`` (None: no class computes it so), or None.

    Only what lasts counts: a layer that is merged or disabled at the moment is swapped and runs PEFT's forward until
    it is not. A layer with several adapters is swapped when one of them can be fused.
    """
    if fused is None:
        kind = type(layer)
        return f"{kind.__module__}.{kind.__qualname__} has a forward of its own"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance, as accelerate's device hooks do"
    if (reason := base_reason(layer)) is not None:
        return reason
    reasons = [adapter_reason(layer, adapter, resting=True) for adapter in layer.lora_A]
    return reasons[0] if reasons and None not in reasons else None
