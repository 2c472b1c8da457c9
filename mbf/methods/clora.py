"""C-LoRA: one LoRA for ever, its rows routed by a small matrix that grows from task to task.

arXiv 2502.17920, class-incremental learning with ViT. Known are, from published summaries and a formalisation of its
equations 3 to 17 and 26 in Lean, not from the paper or its code: A and B are shared by all tasks, and::

    dW_i = s B (R_old + R_Δ) A          R [r, r]; R_old keeps its value and has no gradient
    dL/dB = s dy hᵀ R_Δᵀ,   dL/dA = s R_Δᵀ Bᵀ dy xᵀ,   dL/dR_Δ = s Bᵀ dy hᵀ,   h = A x
    loss + λ ‖R_oldᵀ R_Δ‖²_F            so that new routes use other directions than old ones
    after the task   R_old ← R_old + R_Δ

A and B learn through R_Δ alone (Theorem 3.1). A block-diagonal R with one scalar a block is a mixture of LoRAs.

By the concat identity one call computes it: s [B, B⁰] diag(R_Δ, R_old) [A; A⁰] x, A⁰ and B⁰ the same without gradient.

Ours: in task 1 there is no old route, R_old = 0, and R_Δ starts from I (B from zero), which is plain LoRA with a
trained R. With R_old = I and a small R_Δ, A and B would follow R_Δ's share of the gradient alone, which need not
descend: the loss of a small model then rose under SGD. From task 2 on that is the method, and later tasks learn more
slowly than by plain fine-tuning; R_Δ starts near zero there, from N(0, delta_std²), as a remark says, and with R_Δ = 0
neither A nor B would have a gradient. The "declared old basis" of the penalty is read as R_old, its weight is our
choice: where R_old has full rank only R_Δ = 0 makes it vanish, so it then is a pull of R_Δ towards zero. ``freeze``
keeps A or B after task 1, which the sources leave open.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import LoraTerms


class CLoraOptions(Options):
    penalty: float = Field(0.01, ge=0, description="λ of ‖R_oldᵀ R_Δ‖² (ours)")
    delta_std: float = Field(0.02, gt=0, description="standard deviation of R_Δ at the start of a task (ours)")
    freeze: Literal["none", "A", "B", "both"] = Field("none", description="factors kept from task 2 on")


def overlap(old: Tensor, delta: Tensor) -> Tensor:
    """‖R_oldᵀ R_Δ‖²_F."""
    return (old.mT @ delta).square().sum()


def routed(A: Tensor, B: Tensor, old: Tensor, delta: Tensor, scale: float) -> LoraTerms:
    """s B (R_old + R_Δ) A with gradients through R_Δ only.

    Args:
        A: [r, d_in].
        B: [d_out, r].
        old, delta: [r, r].
        scale: s.
    """
    return LoraTerms(
        torch.cat([A, A.detach()]), torch.cat([B, B.detach()], dim=1), scale, mix=torch.block_diag(delta, old)
    )


@register
class CLora(Method):
    """State: R_old and B as it is shared; the adapter's B is B R_old."""

    name = "clora"
    Options = CLoraOptions
    options: CLoraOptions
    info = MethodInfo(
        title="Continual routing (C-LoRA)",
        trained="A, B, R_Δ",
        frozen="W, R_old",
        merge="R_old ← R_old + R_Δ",
        memory="O(P + r²)",
        grade="ABS",
        source="arXiv 2502.17920",
    )
    learns = True
    merges_alone = False
    _first = True

    def trains(self, i: int) -> tuple[bool, bool]:
        freeze = self.options.freeze if i > 1 else "none"
        return freeze not in ("A", "both"), freeze not in ("B", "both")

    def init_adapter(self, i: int) -> None:
        self._first = i == 1
        if i > 1:
            self.write(Factors(self.merged.A, self._list("B")))
        start = []
        for layer in self.layers:
            r = layer.A.shape[0]
            delta = torch.eye(r) if i == 1 else self.options.delta_std * torch.randn(r, r)
            start.append(delta.to(layer.A))
        self.learn("R", start)
        self.route(self._routed)

    def _old(self, n: int) -> Tensor:
        return torch.zeros_like(self.learned["R"][n].data) if self._first else self._list("R")[n]

    def _routed(self, layer: Layer) -> LoraTerms:
        n = self.index(layer)
        delta = self.learned["R"][n]
        if self._first:  # there is nothing without gradient yet
            return LoraTerms(layer.A, layer.B, layer.scale, mix=delta)
        return routed(layer.A, layer.B, self._old(n), delta, layer.scale)

    def loss_extra(self) -> Tensor | None:
        if self._first or not self.options.penalty:
            return None
        pairs = enumerate(self.learned["R"])
        return self.options.penalty * torch.stack([overlap(self._old(n), delta) for n, delta in pairs]).sum()

    def after_task(self, i: int, data: Batches | None) -> None:
        now = self.current.clone()
        if self.learned:
            R = [self._old(n) + delta.detach() for n, delta in enumerate(self.learned["R"])]
        else:  # an adapter that was trained elsewhere stands for task 1
            R = [torch.eye(len(A)).to(A) for A in now.A]
        self.state = {"B": now.B, "R": R}
        self.write(Factors(now.A, [B @ R_n for B, R_n in zip(now.B, R, strict=True)]))

    def _list(self, key: str) -> list[Tensor]:
        value = self.state[key]
        assert isinstance(value, list)
        return value
