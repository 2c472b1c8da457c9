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
collects at once, is another 26 GB; ``gradient="sketch"`` (ours) makes that 0.6 GB with its 64 columns, for two passes
instead of one. With Ω ``[d_out, l]`` standard normal, seeded by the task::

    first pass     Y = Gᵀ Ω,   Q = orth((I − P) Y);        second pass    Z = Qᵀ Gᵀ = Û_z S V̂ᵀ,   û_j = Q û_z,j

‖G‖² and ‖(I − P) Gᵀ‖² are then estimated, as ‖Y‖²/l and ‖(I − P) Y‖²/l, and a task adds at most l directions.

Where fewer than r directions are free, the other rows of A_i are zero and learn nothing (ours; a warning names the
layers), and they are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._passes import input_moments, mean_gradients
from mbf.methods._subspaces import (
    Subspace,
    count_to_share,
    from_state,
    left_vectors,
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


class KeepLoraOptions(Options):
    variant: Literal["llava", "clip"] = Field(
        "llava", description="B from zero, U grows by gradients; or B from the gradient, U grows by inputs"
    )
    weight_share: float = Field(0.6, ge=0, le=1, description="share of ‖W‖² protected from the start (CLIP: 0.85, 0.2)")
    share: float = Field(0.99, ge=0, le=1, description="share of a learnt task's ‖X‖² that is protected")
    gradient: Literal["full", "sketch"] = Field("full", description="G whole, or two passes of a randomised SVD (ours)")
    sketch: int = Field(64, ge=1, description="l, columns of Ω in a sketch; at least r + 8 are taken")
    batches: int | None = Field(
        None, ge=1, description="batches of the task to look at (the authors': 20 %); none: all"
    )


@dataclass(frozen=True)
class Residual:
    """What a layer's Gᵀ has outside of the protected subspace.

    Attributes:
        U: its left singular vectors, fp64 [d_in, m], orthonormal and outside.
        SV: S V̂ᵀ = Uᵀ Gᵀ, fp64 [m, d_out].
        covered: ‖P Gᵀ‖².
        total: ‖G‖².
    """

    U: Tensor
    SV: Tensor
    covered: float
    total: float

    def directions(self, share: float) -> Tensor:
        """Those that a subspace needs to hold ``share`` of ‖G‖²."""
        return self.U[:, : count_to_share(self.SV.square().sum(1), self.covered, self.total, share)]


def residual(space: Subspace, G: Tensor) -> Residual:
    """Of the whole G ``[d_out, d_in]``."""
    X = G.double().mT
    U = space.leading(X)
    total = float(X.square().sum())
    return Residual(U, U.mT @ X, total - float(space.outside(X).square().sum()), total)


def sketched_residual(space: Subspace, Y: Tensor, Q: Tensor, Z: Tensor) -> Residual:
    """Of G by the module's sketch.

    Args:
        space: what is protected.
        Y: Gᵀ Ω [d_in, l], with Ω standard normal.
        Q: orthonormal and outside [d_in, m].
        Z: Qᵀ Gᵀ [m, d_out].
    """
    U = signed(Q.double() @ left_vectors(Z)[0])
    total = float(Y.double().square().sum()) / Y.shape[1]
    outside = float(space.outside(Y).square().sum()) / Y.shape[1]
    return Residual(U, (U.mT @ Q.double()) @ Z.double(), total - outside, total)


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
        for r, one in zip(self.ranks(i), self._residuals(data, seed=2 * i), strict=True):
            B = rows(one.SV.mT, r).mT
            start.A.append(rows(one.U, r))
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
        return from_state(self.state, self.layers[0].A.device)

    def _of_weight(self, layer: Layer) -> Subspace:
        Wt = layer.weight().mT
        return Subspace.empty(len(Wt), Wt.device).grown(Wt, self.options.weight_share).dual()

    def _grown(self, i: int, data: Batches | None) -> list[Subspace]:
        spaces, share = self._spaces, self.options.share
        if self.options.variant == "llava":
            found = zip(spaces, self._residuals(data, seed=2 * i + 1), strict=True)
            return [space.extended(one.directions(share)) for space, one in found]
        moments = input_moments(self, data, limit=self.options.batches)
        X = [root(C) for C in moments.C]
        return [space.grown(X[of], share) for space, of in zip(spaces, moments.of, strict=True)]

    # -- gradients, whole or sketched --------------------------------------------------------------------------------

    def _residuals(self, data: Batches | None, seed: int) -> Iterator[Residual]:
        """Layer by layer, as all of them together would take several times the memory of G."""
        limit = self.options.batches
        if self.options.gradient == "full":
            gradients = mean_gradients(self, data, limit=limit)
            for n, space in enumerate(self._spaces):
                yield residual(space, gradients[n])
            return
        Omega = self._sketch(seed)
        Y = mean_gradients(self, data, limit=limit, form=lambda n, x, dy: x.mT @ (dy @ Omega[n]))
        Q = [space.leading(y).float() for space, y in zip(self._spaces, Y, strict=True)]
        Z = mean_gradients(self, data, limit=limit, form=lambda n, x, dy: (x @ Q[n]).mT @ dy)
        for space, y, q, z in zip(self._spaces, Y, Q, Z, strict=True):
            yield sketched_residual(space, y, q, z)

    def _sketch(self, seed: int) -> list[Tensor]:
        """Ω of every layer."""
        generator = torch.Generator().manual_seed(seed)
        sketches = []
        for layer, r in zip(self.layers, self.ranks(1), strict=True):
            d_out, d_in = len(layer.B), layer.A.shape[1]
            columns = min(max(self.options.sketch, r + 8), d_out, d_in)
            sketches.append(torch.randn(d_out, columns, generator=generator).to(layer.B.device))
        return sketches
