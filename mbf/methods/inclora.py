"""IncLoRA: a new LoRA for every task; the old ones are frozen and all are summed, dW = Σ_k s B_k A_k.

Σ_k B_k A_k = [B_1..B_i] [A_1; ..; A_i], so the sum of i LoRAs of rank r is one LoRA of rank i·r: what is shipped is a
plain adapter of that rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mbf.methods.base import Factors, Layer, Method, MethodInfo, register
from mbf.ops import LoraTerms


@register
class IncLora(Method):
    """Trains (A_i, B_i) beside the frozen [A_1; ..; A_{i−1}], [B_1..B_{i−1}], which are the merged LoRA so far."""

    name = "inclora"
    changes_rank = True
    info = MethodInfo(
        title="A new LoRA for every task (IncLoRA)",
        trained="A_i, B_i",
        frozen="W, old A, B",
        merge="sum (concatenated)",
        memory="O(TP)",
    )

    def init_adapter(self, i: int) -> None:
        if i == 1:
            return
        self.write(self.fresh([A.shape[0] // (i - 1) for A in self.merged.A]))
        index = {layer.name: n for n, layer in enumerate(self.layers)}

        def with_old(layer: Layer) -> LoraTerms:
            n = index[layer.name]
            return LoraTerms(
                torch.cat([self.merged.A[n], layer.A]), torch.cat([self.merged.B[n], layer.B], dim=1), layer.scale
            )

        self.route(with_old)

    def after_task(self, i: int, data: Iterable[Mapping[str, Tensor]] | None) -> None:
        if i == 1:
            return
        new = self.current
        self.write(
            Factors(
                [torch.cat([old, A]) for old, A in zip(self.merged.A, new.A, strict=True)],
                [torch.cat([old, B], dim=1) for old, B in zip(self.merged.B, new.B, strict=True)],
            )
        )
