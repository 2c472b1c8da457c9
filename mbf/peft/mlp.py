"""The MLP of Llama-like models, ``down(act(gate(x)) · up(x))``: computed whole by one ``lora_mlp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mbf.ops import GroupLayer, lora_mlp
from mbf.ops.lora_mlp import Activation
from mbf.peft.eligibility import _watched
from mbf.peft.groups import SharedInput
from mbf.peft.linear import FusedLinear, calls

LAYERS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS: dict[tuple[str, str], Activation] = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
}


def activation_of(mlp: nn.Module) -> Activation | None:
    """The name that ``lora_mlp`` has for ``mlp.act_fn``, None if it has none or somebody watches the module."""
    module = mlp._modules.get("act_fn")
    if module is None or _watched(module):
        return None
    return _ACTIVATIONS.get((type(module).__module__, type(module).__qualname__))


def _returned(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _named_and_returned(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # as transformers writes it


def _meaning(forward: Any) -> tuple[Any, ...] | None:
    """What two functions that compute the same in the same steps have in common, whatever their arguments' names."""
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    constants = [constant for constant in code.co_consts if constant is not None and constant != forward.__doc__]
    return code.co_names, code.co_code, constants, code.co_argcount, forward.__defaults__


_FORMULAS = [_meaning(forward) for forward in (_returned, _named_and_returned)]


def computes_the_formula(kind: type[nn.Module]) -> bool:
    """Whether ``kind.forward`` is as transformers wrote it: step by step what this Python makes of the formula."""
    return _meaning(kind.forward) in _FORMULAS


class FusedMlp(SharedInput):
    """Mixed into the class of an MLP: a forward by one ``lora_mlp``.

    Where the call cannot be computed so (a layer that is not fused or not plain at the moment, hooks inside the MLP,
    another activation, torch.compile), the module's own forward runs, with the input of gate and up shared.
    """

    members = ("gate_proj", "up_proj")
    _recompute = False  # set on the module by fuse(memory="low")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward: x [..., d_in] to [..., d_in]."""
        if not isinstance(self, FusedMlp):  # as in FusedForward.forward
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            x = args[0]
            activation = activation_of(self)
            if activation is not None and (layers := self._layers(x)) is not None:
                calls["fast"] += len(layers)
                return lora_mlp(x, *layers, activation=activation, recompute=self._recompute)
        return super().forward(*args, **kwargs)

    def _layers(self, x: Tensor) -> list[GroupLayer] | None:
        """Gate, up and down, or None where one of them must be called."""
        if not computes_the_formula(self.plain_class):
            return None
        found = []
        for name in LAYERS:
            layer = self._modules.get(name)
            # x stands for what down reads as well: the layers keep its dtype.
            if type(layer) is not FusedLinear or (adapter := layer.sole_adapter(x)) is None:
                return None
            found.append((layer, adapter))
        return [layer.group_layer(adapter) for layer, adapter in found]
