"""SD-LoRA: the directions of old tasks' LoRAs stay, and how far to go along each is learnt anew with every task.

*SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning*, Wu et al., ICLR 2025 (arXiv
2501.13198), and the authors' public code (``backbone/lora.py``). With the direction D_k = B_k A_k / (‖B_k‖ ‖A_k‖) of
task k, Frobenius norms::

    y = W x + s (Σ_{k<i} α_k c_k D_k x + α_i B_i A_i x)      A_i, B_i and all α trained; D_k frozen

As in the code, the product of the norms stands for ‖B A‖, the direction in training is not normalised, α starts at 0.8
(the paper: 1), and all layers share one α a task (``shared``). The authors have no scale s.

Ours: when task i becomes an old one its term would jump from α_i B_i A_i to α_i D_i. So c_i = ‖B_i‖ ‖A_i‖ is kept with
it, and the function goes on as it was trained; ``handover="jump"`` has c = 1, as the authors do.

``ranks`` is the paper's RR variant, e.g. {5: 8, 9: 6}: from task 5 on rank 8, from task 9 on rank 6. ``absorb`` is its
KD variant (its threshold: 9e-4): after a task least squares look for x with c_i D_i ≈ Σ_k x_k c_k D_k, over all layers
that share α. If the squared distance is below that part of ‖c_i D_i‖² (relative: ours), α_k += α_i x_k, and A_i, B_i
are dropped. All products are traces of r × r matrices: <B A, B' A'> = tr((B'ᵀ B) (A A'ᵀ)).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import BranchTerms, LoraTerms


class SdLoraOptions(Options):
    alpha_init: float = Field(0.8, description="α of a new task at its start (code: 0.8, paper: 1)")
    shared: bool = Field(True, description="one α a task for all layers, or one a layer")
    handover: Literal["rescale", "jump"] = Field("rescale", description="keep the term's length (ours), or D alone")
    ranks: dict[int, int] | None = Field(None, description="rank of the LoRAs from a task on (RR); none: the adapter's")
    absorb: float = Field(0.0, ge=0, description="share of a task's direction that may be lost in dropping it (KD)")

    @field_validator("ranks")
    @classmethod
    def _are_ranks(cls, ranks: dict[int, int] | None) -> dict[int, int] | None:
        if ranks and (min(ranks) < 2 or min(ranks.values()) < 1):
            raise ValueError(
                f"found {ranks}, wanted {{task: rank}}, tasks from 2 (the first has the adapter's), ranks ≥ 1"
            )
        return ranks


def norms(A: Tensor, B: Tensor, sizes: list[int]) -> Tensor:
    """‖B_k‖ ‖A_k‖ of the parts of A ``[Σ r_k, d_in]`` and B ``[d_out, Σ r_k]``, ``[K]``; sizes are r_k."""
    pairs = zip(A.split(sizes), B.split(sizes, 1), strict=True)
    return torch.stack([torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b) for a, b in pairs])


def products(A: Tensor, B: Tensor, sizes: list[int]) -> Tensor:
    """<B_j A_j, B_k A_k> for all pairs of parts, ``[K, K]`` in fp64.

    Args:
        A: [Σ r_k, d_in], the parts below one another.
        B: [d_out, Σ r_k], the parts side by side.
        sizes: r_k.
    """
    A, B = A.double(), B.double()
    both = (A @ A.mT) * (B.mT @ B)
    return torch.stack([torch.stack([block.sum() for block in row.split(sizes, 1)]) for row in both.split(sizes)])


def spread(values: Tensor, sizes: list[int]) -> Tensor:
    """values_k, r_k times each: ``[Σ r_k]`` of ``[K]``. The sizes are no tensor: no GPU has to be waited for."""
    return torch.cat([value.expand(r) for value, r in zip(values, sizes, strict=True)])


def combination(gram: Tensor) -> tuple[Tensor, float]:
    """x that minimises ‖D_K − Σ_{k<K} x_k D_k‖², and that over ‖D_K‖².

    Args:
        gram: <D_j, D_k>, [K, K], fp64, positive semi-definite.
    """
    gram = gram.cpu()  # where lstsq takes matrices that lack rank
    x = torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1:], driver="gelsd").solution[:, 0]
    difference = torch.cat([-x, x.new_ones(1)])
    rest = difference @ gram @ difference
    return x, float(rest.clamp(min=0) / gram[-1, -1]) if gram[-1, -1] > 0 else 0.0


@register
class SdLora(Summed):
    """State: B of every task as it was trained, α, c, and the tasks' ranks. The adapter's B has these factors in it."""

    name = "sdlora"
    Options = SdLoraOptions
    options: SdLoraOptions
    info = MethodInfo(
        title="Decoupled magnitude and direction (SD-LoRA)",
        trained="A_i, B_i, all α",
        frozen="W, old directions",
        merge="Σ α_k B_k A_k / (‖B_k‖ ‖A_k‖)",
        memory="O(TP)",
        grade="CODE",
        source="ICLR 2025; github.com/WuYichen-97/SD-Lora-CL",
    )
    learns = True
    merges_alone = False

    # -- a task --------------------------------------------------------------------------------------------------------

    def ranks(self, i: int) -> list[int]:
        steps = {task: r for task, r in (self.options.ranks or {}).items() if task <= i}
        return [steps[max(steps)]] * len(self.layers) if steps else self._tensor("sizes")[:, 0].tolist()

    def init_adapter(self, i: int) -> None:
        alphas = self.layers[0].A.new_zeros(1 if self.options.shared else len(self.layers), 0)
        if i > 1:
            self.write(self.start(i))
            alphas = self._tensor("alpha").to(alphas)
            self._old = [self._lengths(n, A) for n, A in enumerate(self.merged.A)]
            self._sizes = self._tensor("sizes").tolist()
        new = alphas.new_full((len(alphas), 1), self.options.alpha_init)
        self.learn("alpha", torch.cat([alphas, new], dim=1))
        self.route(self._first if i == 1 else self.with_old)

    def _first(self, layer: Layer) -> LoraTerms:
        return LoraTerms(layer.A, layer.B, layer.scale, gate=self._alpha(self.index(layer)).expand(len(layer.A)))

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> BranchTerms:
        if self.options.handover == "jump" and weight is None:
            raise ValueError(
                "method 'sdlora' with handover='jump' computes something else once the task is an old one, which "
                "merged_view() cannot show; end the task, or evaluate the model as it trains"
            )
        return super().merged_terms(layer, index, i, weight)

    def with_old(self, layer: Layer) -> LoraTerms:
        n = self.index(layer)
        alpha = self._alpha(n)
        gate = [spread(alpha[:-1] * self._old[n], self._sizes[n]), alpha[-1].expand(len(layer.A))]
        A, B = torch.cat([self.merged.A[n], layer.A]), torch.cat([self._B()[n], layer.B], dim=1)
        return LoraTerms(A, B, layer.scale, gate=torch.cat(gate))

    def _alpha(self, n: int) -> Tensor:
        """α of all tasks in training, for layer n: ``[K]``."""
        learned = self.learned["alpha"]
        return learned[0 if len(learned) == 1 else n]

    # -- after it ------------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        new = self.current.clone()
        if self.learned:
            alpha = torch.stack([one.detach() for one in self.learned["alpha"]])
        else:  # an adapter that was trained elsewhere stands for task 1
            alpha = new.A[0].new_ones(1 if self.options.shared else len(self.layers), 1)
        c = torch.stack([norms(A, B, [len(A)]) for A, B in zip(new.A, new.B, strict=True)])
        if self.options.handover == "jump":
            c = torch.ones_like(c)
        sizes = torch.tensor([[len(A)] for A in new.A], device=c.device)
        if i > 1:
            new = Factors(
                [torch.cat(pair) for pair in zip(self.merged.A, new.A, strict=True)],
                [torch.cat(pair, dim=1) for pair in zip(self._B(), new.B, strict=True)],
            )
            c, sizes = torch.cat([self._tensor("c"), c], dim=1), torch.cat([self._tensor("sizes"), sizes], dim=1)
        self.state = {"B": new.B, "alpha": alpha, "c": c, "sizes": sizes}
        A = self._absorbed(new.A) if i > 1 and self.options.absorb else new.A
        lengths = [self._lengths(n, one) for n, one in enumerate(A)]
        alpha, sizes = self._tensor("alpha"), self._tensor("sizes")
        factors = [spread(alpha[min(n, len(alpha) - 1)] * one, sizes[n].tolist()) for n, one in enumerate(lengths)]
        self.write(Factors(A, [B * factor for B, factor in zip(self._B(), factors, strict=True)]))

    def _absorbed(self, A: list[Tensor]) -> list[Tensor]:
        """A without the last task, if that is a combination of the old ones; the state follows."""
        alpha, sizes, grams = self._tensor("alpha"), self._tensor("sizes"), []
        for n, (A_n, B_n) in enumerate(zip(A, self._B(), strict=True)):
            length = self._lengths(n, A_n).double()
            grams.append(products(A_n, B_n, sizes[n].tolist()) * torch.outer(length, length))
        found = [combination(gram) for gram in ([torch.stack(grams).sum(0)] if self.options.shared else grams)]
        if max(rest for _, rest in found) > self.options.absorb:
            return A
        last = sizes[:, -1].tolist()
        self.state = {
            "B": [B[:, : B.shape[1] - r].clone() for B, r in zip(self._B(), last, strict=True)],
            "alpha": alpha[:, :-1] + alpha[:, -1:] * torch.stack([x for x, _ in found]).to(alpha),
            "c": self._tensor("c")[:, :-1].clone(),
            "sizes": sizes[:, :-1].clone(),
        }
        return [one[: len(one) - r] for one, r in zip(A, last, strict=True)]

    def _lengths(self, n: int, A: Tensor) -> Tensor:
        """c_k / (‖B_k‖ ‖A_k‖) of the kept tasks in layer n, with A of all: a gate that makes c_k D_k of B_k A_k."""
        found = norms(A, self._B()[n], self._tensor("sizes")[n].tolist())
        return torch.where(found > 0, self._tensor("c")[n].to(found) / found, 0.0)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _tensor(self, key: str) -> Tensor:
        """``alpha`` [1 or layers, K], ``c`` or ``sizes`` [layers, K], of the K tasks that are kept."""
        value = self.state[key]
        assert isinstance(value, Tensor)
        return value

    def _B(self) -> list[Tensor]:
        B = self.state["B"]
        assert isinstance(B, list)
        return B
