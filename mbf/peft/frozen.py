"""``FrozenLinear``: the linear layers around the adapters, where this machine's torch is slow at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mbf.ops import frozen_linear
from mbf.ops._operands import autocasts
from mbf.ops.frozen_linear import gains
from mbf.peft.eligibility import PLAIN, plain_weight

_MANY = 1 << 20  # rows


class FrozenLinear(nn.Linear):
    """``nn.Linear`` that computes by ``mbf.ops.frozen_linear`` whenever that is faster and nothing in it trains.

    ``fuse`` sets the class of a layer to this one and ``unfuse`` sets it back. Any call that is not plain (autocast,
    tensor subclasses, torch.func, a weight that trains, another device) is computed by ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name for x
        """As ``nn.Linear.forward``: [..., d_in] to [..., d_out]."""
        if _eligible(self, input):
            return frozen_linear(input, self.weight, self.bias)
        return super().forward(input)

    def _get_name(self) -> str:
        return nn.Linear.__name__


LINEARS = (nn.Linear, FrozenLinear)
"""The classes that compute exactly ``x Wᵀ + b``."""


def worth_swapping(layer: nn.Module) -> bool:
    """Whether ``layer`` is a plain linear layer, frozen at the moment, that could compute faster on this machine."""
    if type(layer) not in LINEARS or "forward" in layer.__dict__:
        return False
    weight = plain_weight(layer)
    if weight is None or weight.device.type != "cpu" or any(p.requires_grad for p in layer.parameters()):
        return False
    return gains(weight.dtype, _MANY)


def _eligible(layer: nn.Linear, x: Tensor) -> bool:
    if type(x) not in PLAIN or x.device.type != "cpu" or x.dim() == 0:
        return False
    width = x.shape[-1]
    if width == 0 or not gains(x.dtype, x.numel() // width) or autocasts(x):
        return False
    for parameter in layer._parameters.values():
        if parameter is None:
            continue
        if type(parameter) not in PLAIN or parameter.dtype is not x.dtype or parameter.requires_grad:
            return False
        if parameter.device != x.device:
            return False
    if layer._parameters["weight"].shape[1] != width:  # type: ignore[union-attr]
        return False  # nn.Linear says it in torch's words
    if torch.compiler.is_compiling():
        return True
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
