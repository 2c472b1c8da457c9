"""What a layer's branch computes with, whichever operator computes it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BranchTerms(Protocol):
    """The operands of a branch; ``LoraTerms`` and the terms of the operators with a form of their own are such.

    Those that are one LoRA in another form also have ``lora() -> LoraTerms``, so that the base product can be computed
    with them; without it they are routed with ``own_operator=True``.
    """

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``y + branch(drop(x))`` in y's dtype, y ``[..., d_out]`` as it was; the mask's seed is drawn."""
        ...
