"""P&M: train under perturbations along the task vector, then merge with the weight that serves all tasks best.

*Perturb-and-Merge*, NeurIPS 2025, arXiv 2505.22389, from a published note with its equations; the authors' repository
was not read. θ̂_{t−1} are the merged weights, θ*_t those after training on task t, D = θ*_t − θ̂_{t−1}, and H_i the
Hessian of task i at θ*_i, in whose place stands the diagonal of the empirical Fisher matrix, F_i::

    θ̂_t = θ̂_{t−1} + α D,   α = − Σ_{i≤t} (θ̂_{t−1} − θ*_i)ᵀ H_i D / Σ_{i≤t} Dᵀ H_i D

the minimum, along D, of the sum of all tasks' losses to second order. One α for the model, or one a layer
(``per_module``), which the note found to perform alike. In training each step takes the LoRA at 1, 1 + ε or 1 − ε of
its scale, with probability 1/3 each, which is a perturbation of the weights along D.

Ours:

- A task's LoRA stands beside θ̂_{t−1}, so D = s B A. It starts new, from θ̂_{t−1} itself; the note leaves open whether
  from θ*_{t−1} instead, which is ``start="last"``: from A_{t−1} and (1 − α) B_{t−1}, as θ̂ + (1 − α) D = θ*.
- F is of the adapted weights, in weight space. ``fisher="dense"``: of F_i and F_i ⊙ θ*_i only the sums over the tasks
  are needed, S_1 and S_2, exactly; they take twice the adapted weights' memory however many tasks come. As F is as
  large as W and of no low rank, B A is formed there, one layer at a time.
- ``fisher="factored"``: F_i ≈ u_i v_iᵀ with u the squared output gradients of a sample, summed over its tokens, and v
  the mean square of the inputs at tokens that have a gradient. <u vᵀ ⊙ B A, B' A'> =
  tr((Bᵀ diag(u) B') (A' diag(v) Aᵀ)), so nothing of W's size is formed, and it takes T (d_out + d_in) numbers a layer,
  beside all tasks' factors.
- A sample's gradient, which is squared exactly, is that of its part of the batch's loss, times the rows of the batch.
- α is kept within [0, 1], and is 1/t where all F are zero. ε is drawn by (task, step), the same on every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._passes import of_all, watch_gradients
from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms


class PmOptions(Options):
    eps: float = Field(0.5, ge=0, description="ε: the LoRA is trained at 1, 1 + ε and 1 − ε of its scale")
    fisher: Literal["dense", "factored"] = Field("dense", description="F of every weight, or u vᵀ (ours)")
    start: Literal["merged", "last"] = Field("merged", description="a task trains from θ̂_{t−1} or from θ*_{t−1} (ours)")
    per_module: bool = Field(False, description="an α a layer instead of one for the model")
    batches: int | None = Field(None, ge=1, description="batches of the task to take F of; none: all")


def optimum(sums: Tensor, t: int, per_module: bool) -> Tensor:
    """α of every layer, ``[layers]``, from −Σ (θ̂ − θ*_i)ᵀ F_i D and Σ Dᵀ F_i D of each, ``[layers, 2]``."""
    numerators, denominators = (sums if per_module else sums.sum(0).expand(len(sums), 2)).unbind(1)
    alpha = torch.where(denominators > 0, numerators / denominators, 1 / t)
    return alpha.clamp(0, 1)


def by_sample(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's inputs and each sample's own gradients at its outputs, ``[batch, tokens, width]`` in fp32.

    Args:
        x: [batch, ..., d_in].
        dy: [batch, ..., d_out], of a loss that is the mean over the samples.
    """
    rows = len(x)
    return x.float().reshape(rows, -1, x.shape[-1]), rows * dy.float().reshape(rows, -1, dy.shape[-1])


def weighted_product(u: Tensor, v: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """<(u vᵀ) ⊙ B A, B' A'> for ``left`` (A, B) and ``right`` (A', B'), from small products."""
    (A, B), (other_A, other_B) = left, right
    return ((B.mT @ (u[:, None] * other_B)) * ((A * v) @ other_A.mT)).sum()


@register
class Pm(Summed):
    """State: the LoRA's rank and, dense, S_1 and S_2 of each layer; or, factored, u, v and B of every task, and α.

    With ``start="last"`` also A_t and (1 − α) B_t of the last task.
    """

    name = "pm"
    Options = PmOptions
    options: PmOptions
    info = MethodInfo(
        title="Perturb and merge (P&M)",
        trained="A_i, B_i",
        frozen="W, merged LoRA",
        merge="θ̂ + α (θ* − θ̂), α by Fisher",
        memory="O(d_out d_in) + O(TP), at most O(d_out d_in)",
        grade="NOTE",
        source="arXiv 2505.22389",
    )
    needs_data = True
    adopts = False
    merges_alone = False
    _task = 1
    _factor = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.into_weight = self.options.fisher == "dense"

    def init_adapter(self, i: int) -> None:
        self._task, self._factor = i, 1.0
        super().init_adapter(i)
        if i == 1:
            self.route(self.with_old)

    def start(self, i: int) -> Factors:
        last = self.state.get("last")
        return last if isinstance(last, Factors) else super().start(i)

    def forward_mod(self, step: int, inputs: Mapping[str, Any]) -> None:
        draw = torch.randint(3, (), generator=torch.Generator().manual_seed(1_000_003 * self._task + step))
        self._factor = (1.0, 1.0 + self.options.eps, 1.0 - self.options.eps)[int(draw)]

    def with_old(self, layer: Layer) -> LoraTerms:
        return self._at(layer, self._factor if layer.module.training else 1.0)

    def _at(self, layer: Layer, factor: float | Tensor) -> LoraTerms:
        """θ̂ + factor · D."""
        if self._task == 1:
            return LoraTerms(layer.A, layer.B, layer.scale * factor)
        old, r = self.merged.A[self.index(layer)], layer.A.shape[0]
        factor = torch.as_tensor(factor, dtype=layer.A.dtype, device=layer.A.device)
        gate = torch.cat([old.new_ones(len(old)), factor.expand(r)])
        return super().with_old(layer)._replace(gate=gate)

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> LoraTerms:
        """θ̂ + weight · D; the method's own α is known after a pass over the data only."""
        if weight is None:
            raise ValueError("method 'pm' finds its weight by a pass over the task's data; call merged_view(weight)")
        return self._at(layer, weight)

    # -- after a task --------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        new = self.current.clone()
        if i == 1:
            self.state = {"ranks": torch.tensor([len(A) for A in new.A])}
        else:
            self.append(new)  # θ*_i, where F is taken
        merge = self._dense if self.options.fisher == "dense" else self._factored
        alpha = merge(i, new, data)
        scaled = Factors(new.A, [B * a.to(B) for B, a in zip(new.B, alpha, strict=True)])
        if i == 1:
            self.write(scaled)
        else:
            self.append(scaled)
        if self.options.start == "last":
            rest = [B * (1 - a).to(B) for B, a in zip(new.B, alpha, strict=True)]
            self.state = {**self.state, "last": Factors(new.A, rest)}

    def _dense(self, i: int, new: Factors, data: Batches | None) -> Tensor:
        F = self._fisher(data)
        S_1, S_2 = self._list("S1"), self._list("S2")
        found = []
        for n, layer in enumerate(self.layers):
            D = layer.scale * new.B[n].float() @ new.A[n].float()
            merged = layer.scale * self.merged.B[n].float() @ self.merged.A[n].float() if i > 1 else torch.zeros_like(D)
            S_1[n] = F[n] + (S_1[n] if i > 1 else 0)
            S_2[n] = F[n] * (merged + D) + (S_2[n] if i > 1 else 0)
            numerator = ((S_2[n] - S_1[n] * merged) * D).sum(dtype=torch.float64)
            found.append(torch.stack([numerator, (S_1[n] * D.square()).sum(dtype=torch.float64)]).cpu())
        self.state = {**self.state, "S1": S_1, "S2": S_2}
        return optimum(torch.stack(found), i, self.options.per_module)

    def _list(self, key: str) -> list[Tensor]:
        value = self.state.get(key)
        return list(value) if isinstance(value, list) else [layer.A.new_empty(0) for layer in self.layers]

    def _fisher(self, data: Batches | None) -> list[Tensor]:
        """E[(dL_n/dW)²] over samples n, per layer ``[d_out, d_in]`` in fp32."""
        sums: dict[int, Tensor] = {}
        samples: Counter[int] = Counter()

        def add(n: int, x: Tensor, dy: Tensor) -> None:
            samples[n] += len(x)
            for x_n, dy_n in zip(*by_sample(x, dy), strict=True):
                square = (dy_n.mT @ x_n).square_()
                sums[n] = sums[n].add_(square) if n in sums else square

        watch_gradients(self, data, add, limit=self.options.batches)
        of_all(self, sums, samples)
        return [sums[n] / samples[n] for n in range(len(self.layers))]

    # -- the same with F = u vᵀ ----------------------------------------------------------------------------------------

    def _factored(self, i: int, new: Factors, data: Batches | None) -> Tensor:
        u, v = self._fisher_factors(data)
        if i > 1:
            u = [torch.cat(pair) for pair in zip(self._list("u"), u, strict=True)]
            v = [torch.cat(pair) for pair in zip(self._list("v"), v, strict=True)]
            B = [torch.cat(pair, dim=1) for pair in zip(self._list("B"), new.B, strict=True)]
            alphas = self.state["alpha"]
            assert isinstance(alphas, Tensor)
        else:
            B, alphas = new.B, torch.zeros(len(self.layers), 0, dtype=torch.float64)
        found = []
        for n, layer in enumerate(self.layers):
            A = torch.cat([self.merged.A[n], new.A[n]]) if i > 1 else new.A[n]
            D, r = (new.A[n].double(), layer.scale * new.B[n].double()), len(new.A[n])
            numerator = denominator = torch.zeros((), dtype=torch.float64)
            for k in range(i):  # θ̂ − θ*_k = Σ_j c_j D_j, j up to i
                c = torch.cat([alphas[n], alphas.new_zeros(1)])
                c[:k] -= alphas[n][:k]
                c[k] -= 1
                apart = (A.double(), layer.scale * B[n].double() * c.repeat_interleave(r).to(A.device))
                numerator = numerator - weighted_product(u[n][k].double(), v[n][k].double(), apart, D)
                denominator = denominator + weighted_product(u[n][k].double(), v[n][k].double(), D, D)
            found.append(torch.stack([numerator, denominator]).cpu())
        alpha = optimum(torch.stack(found), i, self.options.per_module)
        self.state = {**self.state, "u": u, "v": v, "B": B, "alpha": torch.cat([alphas, alpha[:, None]], dim=1)}
        return alpha

    def _fisher_factors(self, data: Batches | None) -> tuple[list[Tensor], list[Tensor]]:
        """u and v of every layer, ``[1, d_out]`` and ``[1, d_in]``."""
        sums: dict[int, list[Tensor]] = {}
        samples: Counter[int] = Counter()

        def add(n: int, x: Tensor, dy: Tensor) -> None:
            samples[n] += len(x)
            x, dy = by_sample(x, dy)
            reached = dy.any(-1)  # neither padding nor what the loss does not read
            new = [dy.square().sum((0, 1)), x[reached].square().sum(0), reached.sum()]
            sums[n] = [old + more for old, more in zip(sums[n], new, strict=True)] if n in sums else new

        watch_gradients(self, data, add, limit=self.options.batches)
        flat = {3 * n + k: part for n, parts in sums.items() for k, part in enumerate(parts)}
        of_all(self, flat, samples)
        sums = {n: [flat[3 * n + k] for k in range(3)] for n in sums}
        u = [sums[n][0][None] / samples[n] for n in range(len(self.layers))]
        return u, [sums[n][1][None] / sums[n][2].clamp(min=1) for n in range(len(self.layers))]
