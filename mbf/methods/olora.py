"""O-LoRA: IncLoRA whose new A is pushed towards rows orthogonal to those of every old A.

*Orthogonal Subspace Learning for Language Model Continual Learning*, Wang et al., arXiv 2310.14152, and the authors'
public code (``uie_trainer_lora.py``).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods.base import MethodInfo, Options, register
from mbf.methods.inclora import IncLora


class OLoraOptions(Options):
    l1: float = Field(0.5, ge=0, description="weight of Σ_{k<i} Σ |A_k A_iᵀ|")
    l2: float = Field(0.0, ge=0, description="weight of Σ (‖A_i‖_F + ‖B_i‖_F)")


@register
class OLora(IncLora):
    """Adds ``l1 Σ_layers Σ_{k<i} Σ |A_k A_iᵀ| + l2 Σ_layers (‖A_i‖ + ‖B_i‖)`` to the loss.

    The first term is zero iff the row spaces are orthogonal. Only A is constrained, so the interference of B A on a
    general x is not exactly zero. The authors train the first task with a learning rate ten times that of the later
    ones, which is the training loop's to choose.
    """

    name = "olora"
    Options = OLoraOptions
    options: OLoraOptions
    info = MethodInfo(
        title="Orthogonal subspaces (O-LoRA)",
        trained="A_i, B_i",
        frozen="W, old A, B",
        merge="sum (concatenated)",
        memory="O(TP)",
        grade="CODE",
        source="arXiv 2310.14152",
    )

    def loss_extra(self) -> Tensor | None:
        penalties: list[Tensor] = []
        if self.options.l1 and self.terms is not None:
            overlaps = (A_old @ layer.A.mT for A_old, layer in zip(self.merged.A, self.layers, strict=True))
            penalties += [self.options.l1 * overlap.abs().sum() for overlap in overlaps]
        if self.options.l2:
            penalties += [self.options.l2 * (layer.A.norm() + layer.B.norm()) for layer in self.layers]
        return torch.stack(penalties).sum() if penalties else None
