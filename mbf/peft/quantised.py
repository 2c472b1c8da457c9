"""The fused classes: ``FusedLinear`` for ``lora.Linear``, and one for each of PEFT's LoRA layers of quantised bases.

The latter run the base layer as it is, whatever it keeps its numbers in, and add the branch with ``lora_accumulate``,
which leaves the base output alone. They are told by their names, as most are defined only where the package of their
format is installed, and importing that takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from mbf.peft.linear import FusedForward, FusedLinear

QUANTISED = {
    ("peft.tuners.lora.aqlm", "AqlmLoraLinear"): False,
    ("peft.tuners.lora.awq", "AwqLoraLinear"): True,
    ("peft.tuners.lora.bnb", "Linear4bit"): True,
    ("peft.tuners.lora.bnb", "Linear8bitLt"): True,
    ("peft.tuners.lora.gptq", "GPTQLoraLinear"): False,
    ("peft.tuners.lora.hqq", "HqqLoraLinear"): True,
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"): False,
}
"""Module and name of PEFT's classes; whether their forward lets autocast widen the base output's dtype."""


class FusedOverQuantised(FusedForward):
    """Mixed in before a class of ``QUANTISED``."""

    def _base_output(self, x: Tensor) -> Tensor:
        y = super()._base_output(x)
        # These forwards skip their casts under autocast of CUDA, whatever x is on, and add the branch in its dtype.
        if torch.is_autocast_enabled() and QUANTISED[_name(self.peft_class)]:
            y = y.to(torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda")))
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copies and pickles name what it is made of.
        plain: Any = super().__reduce_ex__(2)
        return _rebuild, (self.peft_class,), *plain[2:]


def fused_class(kind: type) -> type[FusedForward] | None:
    """The class that layers of PEFT's class ``kind`` take when they are fused; None where there is none."""
    if issubclass(kind, FusedForward):
        return kind
    if kind is Linear:
        return FusedLinear
    return _over(kind) if _name(kind) in QUANTISED else None


_made: dict[type, type[FusedForward]] = {}


def _over(kind: type) -> type[FusedForward]:
    if kind not in _made:
        names = {"__module__": __name__, "__doc__": f"PEFT's ``{kind.__name__}``, its branch by ``lora_accumulate``."}
        _made[kind] = type(f"Fused{kind.__name__}", (FusedOverQuantised, kind), {**names, "peft_class": kind})
    return _made[kind]


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _rebuild(kind: type) -> FusedForward:
    made = _over(kind)
    return made.__new__(made)
