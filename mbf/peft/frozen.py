"""``FrozenLinear``: the linear layers around the adapters, where this machine's torch is slow at them."""

from __future__ import annotations

from torch import Tensor, nn

from mbf.ops import frozen_linear
from mbf.ops._operands import autocasts
from mbf.ops.frozen_linear import gains
from mbf.peft.eligibility import PLAIN, plain_weight, transformed

_MANY = 1 << 20  # rows


class FrozenLinear(nn.Linear):
    """``nn.Linear`` that computes by ``mbf.ops.frozen_linear`` whenever that is faster and nothing in it trains.

    ``fuse`` sets the class of a layer to this one and ``unfuse`` sets it back. Any call that is not plain (autocast,
    tensor subclasses, torch.func, a weight that trains, another device) is computed by ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name for x
        """As ``nn.Linear.forward``: [..., d_in] to [..., d_out]."""
        if type(self) is FrozenLinear and _eligible(self, input):
            return frozen_linear(input, self.weight, self.bias)
        return nn.Linear.forward(self, input)  # super() would fail where a hook calls this after unfuse

    def _get_name(self) -> str:
        return nn.Linear.__name__


LINEARS = (nn.Linear, FrozenLinear)
"""The classes that compute exactly ``x Wᵀ + b``."""


def plain_linear(layer: nn.Module, x: Tensor) -> bool:
    """Whether ``layer`` is exactly ``x Wᵀ + b`` on ordinary tensors in x's dtype."""
    if type(layer) not in LINEARS:
        return False
    weight = plain_weight(layer)
    if weight is None or weight.dtype is not x.dtype:
        return False
    bias = layer._parameters["bias"]
    return bias is None or (type(bias) in PLAIN and bias.dtype is x.dtype)


def trains(layer: nn.Module) -> bool:
    """Whether a parameter of ``layer`` itself requires a gradient."""
    return any(parameter is not None and parameter.requires_grad for parameter in layer._parameters.values())


def worth_swapping(layer: nn.Module) -> bool:
    """Whether ``layer`` is a plain linear layer, frozen at the moment, that could compute faster on this machine."""
    if type(layer) not in LINEARS or "forward" in layer.__dict__:
        return False
    weight = plain_weight(layer)
    return weight is not None and weight.device.type == "cpu" and not trains(layer) and gains(weight.dtype, _MANY)


def _eligible(layer: FrozenLinear, x: Tensor) -> bool:
    if type(x) not in PLAIN or x.device.type != "cpu" or x.dim() == 0:
        return False
    width = x.shape[-1]
    if width == 0 or not gains(x.dtype, x.numel() // width) or autocasts(x) or transformed():
        return False
    if not plain_linear(layer, x) or trains(layer):
        return False
    weight = layer.weight
    return weight.device == x.device and weight.shape[1] == width  # nn.Linear complains in torch's words
