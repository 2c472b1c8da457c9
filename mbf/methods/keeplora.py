"""KeepLoRA: each task learns B alone, over the directions of its gradient that W and the old tasks leave free.

*KeepLoRA: Continual Learning with Residual Gradient Adaptation*, Luo et al., ICLR 2026, arXiv 2601.19659, and the
authors' public code. For a layer with G = dL/dW ``[d_out, d_in]``, averaged over batches of the task, and P the
projector on its protected input directions U (``mbf.methods._subspaces``)::

    at first         Wᵀ = Û S V̂ᵀ,   U = û_1 .. û_k,   the least k that holds weight_share of ‖W‖²
    before task i    (I − P) Gᵀ = Û S V̂ᵀ,   A_i = [û_1 .. û_r]ᵀ,  frozen;   B_i = B_0,  trained
    after it         W += s (B_i − B_0) A_i;   U grows until it holds ``share`` of ‖X‖²

``variant="llava"``: B_0 = 0, and X = Gᵀ of the trained model; from the authors' code for LLaVA, a decoder LLM.
``variant="clip"``: B_0ᵀ = S_r V̂_rᵀ = A_i Gᵀ, which is subtracted again, so that the function at the start is that
before the task (the present code for CLIP then sets it to zero), and X Xᵀ = C = mean x xᵀ of the inputs. That code
averages token matrices; with C they are those of the tokens themselves (ours). It also takes the weights' part from W's
output side, which only square matrices allow; here both variants take Wᵀ.

So A_i A_iᵀ = I, A_i U = 0, and inputs within U are mapped as before, up to rounding. A step of SGD on B_i with the rate
η is one of −η s² G A_iᵀ A_i on W. W stays as it is here: as A_i is the same in both, s [A_i; A_i] under [B_i, −B_0] is
s (B_i − B_0) A_i, and that is added to the sum of the earlier tasks.

U grows up to d. Where it is wider than d/2 its complement is stored (ours; the same projector): d · min(k, d − k)
numbers a layer, which for a Llama of 7B, all linear layers, is at most 14 GB (fp32). G of all layers, which a pass
collects at once, is another 26 GB; ``gradient="sketch"`` (ours) makes that 2 GB with its 64 columns, for two passes
instead of one. With Ω_1 ``[d_out, l]`` and Ω_2 ``[d_out, 8]`` standard normal, seeded by the task::

    first pass     Y_1 = Gᵀ Ω_1,  Y_2 = Gᵀ Ω_2,   Q = orth((I − P) Y_1),  Q_P = orth(P Y_1)
    second pass    Z = Qᵀ Gᵀ = Û_z S V̂ᵀ,  Z_P = Q_Pᵀ Gᵀ,   û_j = Q û_z,j
    energies       ‖(I − P) Gᵀ‖² ≈ ‖Z‖² + ‖(I − Q Qᵀ) (I − P) Y_2‖² / 8,   with Q_P, Z_P and P likewise

that is a randomised SVD without power iterations, and traces as Hutch++ (arXiv 2010.09649) estimates them. A task then
adds at most l directions.

Where fewer than r directions are free, the other rows of A_i are zero and learn nothing (ours; a warning names the
layers), and they are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._passes import input_moments, mean_gradients
from mbf.methods._subspaces import (
    Subspace,
    count_to_share,
    from_state,
    left_vectors,
    orthonormal,
    project_out,
    root,
    rows,
    signed,
    to_state,
    warn_if_exhausted,
    without_zero_rows,
)
from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms

PROBES = 8
"""Columns of Ω_2."""


class KeepLoraOptions(Options):
    variant: Literal["llava", "clip"] = Field(
        "llava", description="B from zero, U grows by gradients; or B from the gradient, U grows by inputs"
    )
    weight_share: float = Field(0.6, ge=0, le=1, description="share of ‖W‖² protected from the start (CLIP: 0.85, 0.2)")
    share: float = Field(0.99, ge=0, le=1, description="share of a learnt task's ‖X‖² that is protected")
    gradient: Literal["full", "sketch"] = Field("full", description="G whole, or two passes of a randomised SVD (ours)")
    sketch: int = Field(64, ge=1, description="l, columns of Ω_1; at least r + 8 are taken")
    batches: int | None = Field(
        None, ge=1, description="batches of the task to look at (the authors': 20 %); none: all"
    )


class Residual(Protocol):
    """What a layer's Gᵀ has outside of its protected subspace."""

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """Û and S V̂ᵀ = Ûᵀ Gᵀ of the leading singular triples, fp64 [d_in, m] and [m, d_out] with m ≤ rank."""
        ...

    def grown(self, share: float) -> Subspace:
        """The subspace that holds ``share`` of ‖G‖²."""
        ...


@dataclass(frozen=True)
class WholeResidual:
    """Of G ``[d_out, d_in]``."""

    space: Subspace
    G: Tensor

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        U = self.space.leading(self.G.mT, rank)
        return U, U.mT @ self.G.double().mT

    def grown(self, share: float) -> Subspace:
        return self.space.grown(self.G.mT, share)


@dataclass(frozen=True)
class SketchedResidual:
    """Of the module's sketch: Y_2 ``[d_in, 8]``, Q and Q_P ``[d_in, m]``, Z and Z_P ``[m, d_out]``."""

    space: Subspace
    Y_2: Tensor
    Q: Tensor
    Q_P: Tensor
    Z: Tensor
    Z_P: Tensor

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        Q = self.Q.double()
        U = signed(Q @ left_vectors(self.Z, rank)[0])
        return U, (U.mT @ Q) @ self.Z.double()

    def energies(self) -> tuple[float, float]:
        """‖P Gᵀ‖² and ‖(I − P) Gᵀ‖²: exact in what the sketch spans, estimated without bias beyond."""
        outside = self.space.outside(self.Y_2)
        inside = self.Y_2.double() - outside
        return _energy(self.Z_P, project_out(inside, self.Q_P)), _energy(self.Z, project_out(outside, self.Q))

    def grown(self, share: float) -> Subspace:
        U, SV = self.leading(self.Q.shape[1])
        covered, outside = self.energies()
        m = count_to_share(SV.square().sum(1), covered, covered + outside, share)
        return self.space.extended(orthonormal(U[:, :m]))


def _energy(Z: Tensor, rest: Tensor) -> float:
    return float(Z.double().square().sum() + rest.square().sum() / PROBES)


@register
class KeepLora(Summed):
    """State: the rank of a task's LoRA, and the protected subspace of every layer; B_0 within a task of ``clip``."""

    name = "keeplora"
    Options = KeepLoraOptions
    options: KeepLoraOptions
    info = MethodInfo(
        title="Residual gradients (KeepLoRA)",
        trained="B_i",
        frozen="W, A_i, old A, B",
        merge="sum; A_i ⟂ leading directions of W, old tasks",
        memory="O(TP), at most O(d_out d_in); O(dk), k ≤ d/2",
        grade="CODE",
        source="arXiv 2601.19659",
    )
    needs_data = True
    adopts = False
    merges_alone = False
    into_weight = True
    _start: Factors

    def trains(self, i: int) -> tuple[bool, bool]:
        return False, True

    def before_task(self, i: int, data: Batches | None) -> None:
        if i == 1:
            self.state = {**self.state, **to_state([self._of_weight(layer) for layer in self.layers])}
        start = Factors()
        for r, found in zip(self.ranks(i), self._residuals(data, seed=2 * i), strict=True):
            U, SV = found.leading(r)
            B = rows(SV.mT, r).mT
            start.A.append(rows(U, r))
            start.B.append(B if self.options.variant == "clip" else torch.zeros_like(B))
        self._start = start
        warn_if_exhausted(self, i, start.A, "Lower share and weight_share, or look at more of the task's data.")

    def init_adapter(self, i: int) -> None:
        self.write(self._start)
        self._start = Factors()
        if self.options.variant == "clip":
            self.state = {**self.state, "B_0": self.current.clone().B}
        if i > 1 or self.options.variant == "clip":
            self.route(self._alone if i == 1 else self.with_old)

    def with_old(self, layer: Layer) -> LoraTerms:
        n, new = self.index(layer), self._alone(layer)
        A, B = torch.cat([self.merged.A[n], new.A]), torch.cat([self.merged.B[n], new.B], dim=1)
        return LoraTerms(A, B, layer.scale)

    def _alone(self, layer: Layer) -> LoraTerms:
        """The task's own s (B − B_0) A."""
        B_0 = self.state.get("B_0")
        B = layer.B - B_0[self.index(layer)] if isinstance(B_0, list) else layer.B
        return LoraTerms(layer.A, B, layer.scale)

    def after_task(self, i: int, data: Batches | None) -> None:
        B_0 = self.state.get("B_0")
        if isinstance(B_0, list):
            now = self.current
            self.write(Factors(now.A, [B - start for B, start in zip(now.B, B_0, strict=True)]))
            self.state = {key: value for key, value in self.state.items() if key != "B_0"}
        super().after_task(i, data)
        self.state = {**self.state, **to_state([space.dual() for space in self._grown(i, data)])}

    def append(self, new: Factors) -> None:
        super().append(without_zero_rows(new))

    # -- what is protected -------------------------------------------------------------------------------------------

    @property
    def _spaces(self) -> list[Subspace]:
        return [space.to(layer.A.device) for space, layer in zip(from_state(self.state), self.layers, strict=True)]

    def _of_weight(self, layer: Layer) -> Subspace:
        Wt = layer.weight().mT
        return Subspace.empty(len(Wt), Wt.device).grown(Wt, self.options.weight_share).dual()

    def _grown(self, i: int, data: Batches | None) -> list[Subspace]:
        share = self.options.share
        if self.options.variant == "llava":
            return [found.grown(share) for found in self._residuals(data, seed=2 * i + 1)]
        moments = input_moments(self, data, limit=self.options.batches)
        X = [root(C) for C in moments.C]
        return [space.grown(X[of], share) for space, of in zip(self._spaces, moments.of, strict=True)]

    # -- gradients, whole or sketched --------------------------------------------------------------------------------

    def _residuals(self, data: Batches | None, seed: int) -> Iterator[Residual]:
        """Layer by layer, as what is computed of all of them would take several times the memory of G."""
        limit = self.options.batches
        if self.options.gradient == "full":
            yield from map(WholeResidual, self._spaces, mean_gradients(self, data, limit=limit))
            return
        Omega = self._sketch(seed)
        Y = mean_gradients(self, data, limit=limit, form=lambda n, x, dy: x.mT @ (dy @ Omega[n]))
        pairs = [
            (space.leading(y[:, :-PROBES]).float(), space.opposite().leading(y[:, :-PROBES]).float())
            for space, y in zip(self._spaces, Y, strict=True)
        ]
        Q = [torch.cat(pair, dim=1) for pair in pairs]
        Z = mean_gradients(self, data, limit=limit, form=lambda n, x, dy: (x @ Q[n]).mT @ dy)
        for space, y, (q, q_p), z in zip(self._spaces, Y, pairs, Z, strict=True):
            yield SketchedResidual(space, y[:, -PROBES:], q, q_p, z[: q.shape[1]], z[q.shape[1] :])

    def _sketch(self, seed: int) -> list[Tensor]:
        """[Ω_1, Ω_2] of every layer."""
        generator = torch.Generator().manual_seed(seed)
        sketches = []
        for layer, r in zip(self.layers, self.ranks(1), strict=True):
            d_out, d_in = len(layer.B), layer.A.shape[1]
            columns = min(max(self.options.sketch, r + 8), d_out, d_in)
            sketches.append(torch.randn(d_out, columns + PROBES, generator=generator).to(layer.B.device))
        return sketches
