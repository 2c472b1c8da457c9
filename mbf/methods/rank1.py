"""Rank-1 expert pool: each rank of a LoRA is an expert, a batch votes for those that compute, the busiest are kept.

arXiv 2601.22828, AAAI 2026, and the authors' public code for CLIP (DAC, ``loralib/layers.py``). With r experts
(12), dW = s Σ_j b_j a_jᵀ, for each layer::

    p = softmax(R f(x)) per sample, R [r, d_in], f(x) one vector a sample, which votes for its ``active`` (8) likeliest
    m = the ``active`` experts with the most votes in the batch;   y = W x + s B diag(m) A x;   n_j counts the votes
    loss + λ · mean over layers of Σ |B[:, S]ᵀ B_past|,   λ = 0.1,  S the ``keep`` (4) experts with the largest n
    after the task   W += s B[:, S] A[S];   B[:, S] joins B_past

(the paper's text has a plain mean of inner products, the code the sum of absolute values.) Experts that are not active
get exactly no gradient. In the code the mask is hard, so no gradient reaches R either, which stays the random
projection that it was; so it is here, unless ``straight_through`` (ours) gives it that of p. What is merged needs no
routing.

Ours: f is the layer's input at the last token of the prompt, or its mean over the prompt, as a language model has no
[CLS]; ``active`` and ``keep`` default to these shares of the adapter's rank, 2/3 and 1/3; where several forwards make
an optimiser step, the first one's m holds for all of them, so that what is not active has no gradient in the whole
step, and n counts the votes of all; processes that train together vote together; ties go to the first expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._prompts import prompt_tokens
from mbf.methods._summed import Summed, bounded
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import BranchTerms, LoraTerms, lora_accumulate


class Rank1Options(Options):
    active: int | None = Field(None, ge=1, description="experts that compute; none: 2/3 of the rank (theirs: 8 of 12)")
    keep: int | None = Field(None, ge=1, description="experts that are merged; none: 1/3 of the rank (theirs: 4 of 12)")
    penalty: float = Field(0.1, ge=0, description="λ of Σ |B[:, S]ᵀ B_past|")
    feature: Literal["last", "mean"] = Field("last", description="what of the prompt is routed by (ours)")
    straight_through: bool = Field(False, description="let the router learn as if m were p (ours)")


def pooled(x: Tensor, prompt: Tensor | None, feature: str) -> Tensor:
    """f(x) ``[batch, d]`` of x ``[batch, tokens, d]``: the prompt's last token, or its mean.

    Args:
        x: the layer's input; without tokens, ``[rows, d]``, every row is a sample.
        prompt: bool [batch, tokens]; None, or of another shape: all tokens.
        feature: "last" or "mean".
    """
    if x.dim() < 3:
        return x.reshape(-1, x.shape[-1])
    x = x.flatten(0, -3)
    if prompt is None or prompt.shape != x.shape[:2]:
        prompt = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    prompt = prompt.to(x.device)
    if feature == "mean":
        share = prompt / prompt.sum(1, keepdim=True)
        return (x * share[..., None].to(x.dtype)).sum(1)
    last = prompt.shape[1] - 1 - prompt.flip(1).int().argmax(1)
    return x[torch.arange(len(x), device=x.device), last]


def top(values: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest of ``values`` [..., r], of equals the first; ascending, int64 [..., count]."""
    return values.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def marked(places: Tensor, r: int) -> Tensor:
    """bool [..., r]: whether each of r is among ``places``."""
    return torch.zeros(*places.shape[:-1], r, dtype=torch.bool, device=places.device).scatter_(-1, places, True)


class Experts(NamedTuple):
    """The terms of a forward: the old sum, and a pool of r experts that the batch chooses among.

    Terms of their own, not ``LoraTerms`` with a gate: the choice needs x, which a route sees in its operator only.
    """

    method: Rank1
    place: int
    A: Tensor
    B: Tensor
    scale: float
    router: Tensor

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``y + s [B_old, B] diag(1, m) [A_old; A] x``."""
        r = len(self.router)
        gate = self.method.mask(self.place, x, self.router)
        gate = torch.cat([gate.new_ones(len(self.A) - r), gate])
        return lora_accumulate(y, x, self.A, self.B, scale=self.scale, gate=gate, dropout_p=dropout_p)


@register
class Rank1(Summed):
    """State: the rank of a pool, and B_past; within a task the votes so far and the routers."""

    name = "rank1"
    Options = Rank1Options
    options: Rank1Options
    info = MethodInfo(
        title="Rank-1 expert pool",
        trained="A_i, B_i",
        frozen="W, router, old A, B",
        merge="sum of the busiest third of the ranks",
        memory="O(TP), at most O(d_out d_in) + O(T d_out)",
        grade="CODE",
        source="arXiv 2601.22828",
    )
    own_operator = True
    adopts = False
    merges_alone = False
    into_weight = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.learns = self.options.straight_through
        self._later = False
        self._prompt: Tensor | None = None
        self._step: int | None = None
        self._masks: dict[int, Tensor] = {}  # of the step
        self._votes: dict[int, Tensor] = {}  # of the last forward
        self._pending: dict[int, Tensor] = {}  # of those before it that are not in n yet

    def _count(self, r: int, chosen: int | None, share: float) -> int:
        return min(r, chosen) if chosen is not None else max(1, round(share * r))

    # -- routing -------------------------------------------------------------------------------------------------------

    def init_adapter(self, i: int) -> None:
        self._later, self._prompt, self._step = i > 1, None, None
        self._masks, self._votes, self._pending = {}, {}, {}
        if i > 1:
            self.write(self.start(i))
        routers = [(torch.randn(layer.A.shape) / layer.A.shape[1] ** 0.5).to(layer.A) for layer in self.layers]
        counts = [torch.zeros(len(R), dtype=torch.int64, device=R.device) for R in routers]
        if self.options.straight_through:
            self.learn("router", routers)
            self.state = {**self.state, "counts": counts}
        else:
            self.state = {**self.state, "counts": counts, "router": routers}
        self.route(self._experts)

    def _experts(self, layer: Layer) -> Experts:
        n = self.index(layer)
        A: Tensor = layer.A
        B: Tensor = layer.B
        if self._later:
            A, B = torch.cat([self.merged.A[n], A]), torch.cat([self.merged.B[n], B], dim=1)
        router = self.learned["router"][n] if self.options.straight_through else self._list("router")[n]
        return Experts(self, n, A, B, layer.scale, router)

    def mask(self, n: int, x: Tensor, router: Tensor) -> Tensor:
        """m ``[r]`` of layer n for its input x, in the router's dtype.

        While the model trains its votes are noted, and m is the one of the step, of all processes.
        """
        features = pooled(x.detach(), self._prompt, self.options.feature).to(router.dtype)
        p = (features @ router.mT).softmax(-1)
        r = len(router)
        count = self._count(r, self.options.active, 2 / 3)
        votes = marked(top(p.detach(), count), r).sum(0)
        if self.layers[n].module.training:
            self._votes[n] = votes  # not added: a recomputed forward votes again
            if n not in self._masks:
                self._masks[n] = marked(top(self.total(votes), count), r)
            m = self._masks[n].to(router.dtype)
        else:
            m = marked(top(votes, count), r).to(router.dtype)
        if self.options.straight_through:
            share = p.mean(0)
            m = m + (share - share.detach())
        return m

    def _see(self, inputs: Mapping[str, Any]) -> None:
        read = next((inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None), None)
        self._prompt = None if read is None else prompt_tokens(inputs, read.shape[1], len(read))

    def forward_mod(self, step: int, inputs: Mapping[str, Any]) -> None:
        self._end_forward()
        if step != self._step:
            self._step, self._masks = step, {}
        self._see(inputs)

    def inference_adapter(self, inputs: Mapping[str, Any]) -> None:
        self._see(inputs)

    def _end_forward(self) -> None:
        for n, votes in self._votes.items():
            self._pending[n] = self._pending[n] + votes if n in self._pending else votes
        self._votes = {}

    def _count_votes(self) -> None:
        """n_j += the votes of the forwards since the last call, on all processes."""
        self._end_forward()
        if self._pending:
            counts = self._list("counts")
            new = [self._pending.get(n, torch.zeros_like(count)).to(counts[0].device) for n, count in enumerate(counts)]
            parts = self.total(torch.cat(new)).split([len(count) for count in counts])
            counts = [count + part.to(count.device) for count, part in zip(counts, parts, strict=True)]
            self.state, self._pending = {**self.state, "counts": counts}, {}

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _busiest(self, n: int) -> Tensor:
        """S of layer n: int64 [keep]."""
        counts = self._list("counts")[n]
        return top(counts, self._count(len(counts), self.options.keep, 1 / 3))

    def loss_extra(self) -> Tensor | None:
        self._count_votes()
        if not (self._later and self.options.penalty):
            return None
        overlaps = [
            (layer.B[:, self._busiest(n)].mT @ past).abs().sum()
            for n, (layer, past) in enumerate(zip(self.layers, self._list("past"), strict=True))
        ]
        return self.options.penalty * torch.stack(overlaps).mean()

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> BranchTerms:
        """The old sum and the busiest experts of now."""
        if weight is not None:
            return super().merged_terms(layer, index, i, weight)
        S = self._busiest(index)
        A, B = layer.A[S], layer.B[:, S]
        if self._later:
            A, B = torch.cat([self.merged.A[index], A]), torch.cat([self.merged.B[index], B], dim=1)
        return LoraTerms(A, B, layer.scale)

    def after_task(self, i: int, data: Batches | None) -> None:
        self._count_votes()
        now, S = self.current, [self._busiest(n) for n in range(len(self.layers))]
        kept = Factors(
            [A[s] for A, s in zip(now.A, S, strict=True)], [B[:, s].clone() for B, s in zip(now.B, S, strict=True)]
        )
        past = kept.B
        if i == 1:
            ranks = torch.tensor([len(A) for A in now.A])
            pairs = [bounded(A, B) for A, B in zip(kept.A, kept.B, strict=True)]
            self.write(Factors([A for A, _ in pairs], [B for _, B in pairs]))
            self.state = {"ranks": ranks, "past": past}
        else:
            past = [torch.cat(pair, dim=1) for pair in zip(self._list("past"), past, strict=True)]
            self.append(kept)
            self.state = {"ranks": self.state["ranks"], "past": past}

    def _list(self, key: str) -> list[Tensor]:
        value = self.state[key]
        assert isinstance(value, list)
        return value
