"""Every task trains a LoRA of its own on W alone; the adapter is the merge of them all, made anew after each task.

What offline merging rules need, run as a continual method: the state keeps every (A_t, B_t), nothing of the merge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method
from mbf.ops import LoraTerms

Pair = tuple[Tensor, Tensor]
"""(A [r, d_in], B [d_out, r]) of one layer in one task."""


class Separate(Method):
    """A subclass gives ``merge_layer``, and ``merge`` if layers depend on one another."""

    def merge_layer(self, n: int, tasks: Sequence[Pair]) -> Pair:
        """The merge of layer ``n`` from its LoRAs in the order of the tasks."""
        raise NotImplementedError

    def merge(self, tasks: Sequence[Factors]) -> Factors:
        """The merge of whole LoRAs."""
        pairs = [self.merge_layer(n, layer_pairs(tasks, n)) for n in range(len(self.layers))]
        return Factors([A for A, _ in pairs], [B for _, B in pairs])

    def tasks(self) -> list[Factors]:
        """The LoRAs of the tasks learnt, in their order."""
        found: list[Factors] = []
        while isinstance(kept := self.state.get(f"task{len(found) + 1}"), Factors):
            found.append(kept)
        return found

    def init_adapter(self, i: int) -> None:
        if i > 1:
            self.write(self.fresh([A.shape[0] for A in self.tasks()[0].A]))

    def after_task(self, i: int, data: Batches | None) -> None:
        self.state = {**self.state, f"task{i}": self.current.clone()}
        self.write(self.merge(self.tasks()))

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> LoraTerms:
        """The merge with the LoRA in training as it is now, made anew in every forward and without gradients."""
        if weight is not None:
            super().merged_terms(layer, index, i, weight)  # says that there is none
        with torch.no_grad():
            A, B = self.merge_layer(index, [*layer_pairs(self.tasks(), index), layer.values()])
        return LoraTerms(A, B, layer.scale)


def layer_pairs(tasks: Sequence[Factors], n: int) -> list[Pair]:
    """(A, B) of layer ``n`` in every task."""
    return [(task.A[n], task.B[n]) for task in tasks]
