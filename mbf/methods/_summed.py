"""A new LoRA for every task beside the frozen sum of the old ones, dW = Σ_k s B_k A_k: what many methods start from.

Σ_k g_k B_k A_k = [B_1..B_i] diag(g ⊗ 1_r) [A_1; ..; A_i], so the sum of i LoRAs of rank r is one LoRA of rank i·r: what
is shipped is a plain adapter of that rank. Methods whose papers add B A to W do so here, too: W stays as it is, and the
sum grows up to the rank min(d_out, d_in), which holds any sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method
from mbf.ops import LoraTerms


def bounded(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same B A of a rank of at most min(d_out, d_in); the given ones where these are no smaller.

    Args:
        A: [r, d_in].
        B: [d_out, r].
    """
    r, d_in, d_out = A.shape[0], A.shape[1], B.shape[0]
    if r <= min(d_out, d_in):
        return A, B
    product = (B.float() @ A.float()).to(A.dtype)
    if d_in <= d_out:
        return torch.eye(d_in, dtype=A.dtype, device=A.device), product
    return product, torch.eye(d_out, dtype=B.dtype, device=B.device)


class Summed(Method):
    """Trains (A_i, B_i) beside the frozen [A_1; ..; A_{i−1}], [B_1..B_{i−1}], which are the merged LoRA so far.

    Attributes:
        into_weight: the sum stands for what the paper adds to W: only B A counts, not the factors of each task, and the
            rank is bounded. ``state["ranks"]`` (int64, one a layer) then keeps the rank of a task's LoRA.
    """

    changes_rank = True
    into_weight: bool = False

    def ranks(self, i: int) -> list[int]:
        """The rank of every layer's new LoRA in task i."""
        kept = self.state.get("ranks")
        if isinstance(kept, Tensor):
            return kept.tolist()
        return [A.shape[0] // max(1, i - 1) for A in self.merged.A]

    def start(self, i: int) -> Factors:
        """What task i > 1 trains from."""
        return self.fresh(self.ranks(i))

    def init_adapter(self, i: int) -> None:
        if i > 1:
            self.write(self.start(i))
            self.route(self.with_old)

    def with_old(self, layer: Layer) -> LoraTerms:
        """The old sum and the LoRA in training as one."""
        n = self.index(layer)
        A, B = torch.cat([self.merged.A[n], layer.A]), torch.cat([self.merged.B[n], layer.B], dim=1)
        return LoraTerms(A, B, layer.scale)

    def after_task(self, i: int, data: Batches | None) -> None:
        if i > 1:
            self.append(self.current)
        elif self.into_weight:
            self.state = {**self.state, "ranks": torch.tensor([A.shape[0] for A in self.current.A])}

    def append(self, new: Factors) -> None:
        """Write the sum of the merged LoRA and ``new`` into the adapter."""
        summed = Factors(
            [torch.cat([old, A]) for old, A in zip(self.merged.A, new.A, strict=True)],
            [torch.cat([old, B], dim=1) for old, B in zip(self.merged.B, new.B, strict=True)],
        )
        if self.into_weight:
            pairs = [bounded(A, B) for A, B in zip(summed.A, summed.B, strict=True)]
            summed = Factors([A for A, _ in pairs], [B for _, B in pairs])
        self.write(summed)
