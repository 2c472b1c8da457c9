"""LoDA: each task learns in directions that all tasks share and in directions that are its own.

*LoDA: Low-rank Decomposition and Adaptation*, arXiv 2603.00191 (ICML 2026), and the authors' code (HHHLF/LoDA_ICML2026:
``models/decomposed_lora.py``, ``methods/dlora.py``), for vision transformers. With C_i = mean x xᵀ of a layer's input
over task i and C_prev = Σ_{j<i} C_j, it learns a general and a private branch::

    y = W x + s (g_S B_S A_S x + g_P B_P A_P x)
    A_S = [v_1..v_r]ᵀ / √3         v_k eigenvectors of C_i + C_prev
    A_P = qr([u_1..u_r]).Qᵀ / √3   u_k = L⁻ᵀ w_k,  w_k eigenvectors of L⁻¹ C_i L⁻ᵀ,  C_prev + ε I = L Lᵀ

so u_1 maximises uᵀ C_i u / uᵀ C_prev u; ε grows tenfold until the Cholesky factor exists. Only B_S and B_P train, from
zero. Task 1 has the general branch alone, and trains its A, too. After task i > 1, with the C_i of the trained model,
row a_k of A_S is shrunk by how much old tasks use it, 1 − η_k = argmin_c c² a_k C_prev a_kᵀ + γ (c − 1)² a_k C_i a_kᵀ::

    η_k = a_k C_prev a_kᵀ / (a_k C_prev a_kᵀ + γ a_k C_i a_kᵀ + 10⁻¹²)
    W ← W + s (g_S Σ_k (1 − η_k) b_k a_k + g_P B_P A_P),   C_prev ← C_prev + C_i

and g_S B_S A_S is added as it is after task 1. Gradient alignment (GAO) splits the batch into two groups and takes the
gradient of each where a step against that of the other leads, tensor by tensor, u ~ U(0, 1) once a batch::

    g_2' = ∇L_2(θ − ρ u ∇L_1(θ) / ‖∇L_1(θ)‖),   g_1' = ∇L_1(θ − ρ u ∇L_2(θ) / ‖∇L_2(θ)‖)

Ours:

- The authors split by classes and step the optimiser with g_2', then with g_1', each from where it then is. A hook has
  one step a batch: the rows are split at random, and the step is made with (g_1' + g_2') / 2. That replaces the loop's
  own gradient, whose pass is spent all the same, so a step costs three passes over the batch instead of one (the
  authors': two), the micro-batches of an accumulated step included.
- Processes that train together split the rows that each has, and average their gradients.
- The loss is the model's own, each group's averaged over its labels. What a loop adds to it, and its clipping, do not
  reach these gradients. A step with a single row keeps the loop's gradient.
- W is never changed: the sums are kept as the adapter. Only s is PEFT's.
- ε starts at 10⁻¹² of mean(diag C_prev). Padding and the first token of a row (``skip``) are left out of C: a
  decoder's first token has massive activations, which would be all that C holds.
- C_prev takes C_i once. The authors add it again, as measured after the merge (``count_twice``), maybe unintended.
  Their configurations may say ``avg``, which halves g_S and g_P.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mbf.methods._groups import Group, Groups
from mbf.methods._passes import Moments, input_moments
from mbf.methods._subspaces import orthonormal, signed
from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import BranchTerms, LoraTerms


class LodaOptions(Options):
    rank: int | None = Field(
        None, ge=1, description="ours: rank of each branch from task 2 on; None: r of task 1, so that both have 2r"
    )
    g_S: float = Field(0.5, gt=0, description="weight of the general branch, also alone in task 1")
    g_P: float = Field(1.0, gt=0, description="weight of the private branch")
    gamma: float = Field(3.0, ge=0, allow_inf_nan=False, description="γ: how much the new task outweighs the old ones")
    gao: bool = Field(True, description="gradient alignment; costs two more passes over every batch")
    rho: float = Field(0.7, ge=0, description="ρ: the longest move of a tensor in gradient alignment")
    count_twice: bool = Field(False, description="the authors' code: C_prev takes C_i again, after the merge")
    batches: int | None = Field(None, ge=1, description="batches to look at for C; None is all")
    skip: int = Field(1, ge=0, description="ours: tokens left out of C at the start of each row")


def general_directions(C: Tensor, r: int) -> Tensor:
    """Leading eigenvectors of the symmetric C [d, d], as columns [d, r], in fp64."""
    return signed(torch.linalg.eigh(C.double())[1].flip(1)[:, :r])


def private_directions(C: Tensor, C_prev: Tensor, r: int) -> Tensor:
    """u_1 .. u_r of the largest uᵀ C u / uᵀ C_prev u, as columns [d, r] in fp64, C_prev-orthonormal.

    Args:
        C, C_prev: [d, d], symmetric and positive semi-definite.
    """
    regular = C_prev.double()
    identity = torch.eye(len(regular), dtype=regular.dtype, device=regular.device)
    eps = 1e-12 * (float(regular.diagonal().mean()) or 1.0)
    L, failed = torch.linalg.cholesky_ex(regular)
    while failed:
        regular, eps = regular + eps * identity, 10 * eps
        L, failed = torch.linalg.cholesky_ex(regular)
    half = torch.linalg.solve_triangular(L, C.double(), upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return torch.linalg.solve_triangular(L.mT, general_directions((whitened + whitened.mT) / 2, r), upper=True)


def shrinkage(A: Tensor, C_prev: Tensor, C: Tensor, gamma: float) -> Tensor:
    """η of every row of A [r, d], in fp64."""
    A = A.double()
    old, new = (((A @ M.double()) * A).sum(1).clamp_min(0) for M in (C_prev, C))
    return old / (old + gamma * new + 1e-12)


@register
class Loda(Summed):
    """A general and a private branch for each task, summed. State: C_prev, d_in × d_in of each distinct layer input."""

    name = "loda"
    into_weight = True
    needs_data = True
    adopts = False
    merges_alone = False
    Options = LodaOptions
    options: LodaOptions
    info = MethodInfo(
        title="General and private directions (LoDA)",
        trained="B_S, B_P (task 1: A_S, B_S)",
        frozen="W, A_S, A_P",
        merge="W ← W + g_S B_S diag(1 − η) A_S + g_P B_P A_P",
        memory="O(d²) + O(TP), at most O(d_out d_in)",
        grade="CODE",
        source="arXiv 2603.00191",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._continues = False
        self._start: list[Tensor] = []  # A of the coming task
        self._gates: list[Tensor] = []  # g_S and g_P by the rows of A
        self._general: list[int] = []  # how many rows of A are A_S
        self._groups = Groups(self)

    def trains(self, i: int) -> tuple[bool, bool]:
        return i == 1, True

    def ranks(self, i: int) -> list[int]:
        """The rank of every layer's branches in task i, each."""
        ranks = super().ranks(i)
        return ranks if i == 1 or self.options.rank is None else [self.options.rank] * len(ranks)

    # -- before a task -------------------------------------------------------------------------------------------------

    def before_task(self, i: int, data: Batches | None) -> None:
        ranks = self.ranks(i)
        for layer, r in zip(self.layers, ranks, strict=True):
            if r > (d_in := layer.A.shape[1]):
                raise ValueError(
                    f"method 'loda' takes r of the {d_in} directions of {layer.name}, r is {r}; use r ≤ {d_in}"
                )
        moments = self._measure(data)
        C_prev = self._C_prev(moments)
        self._start = [torch.empty(0)] * len(ranks)
        for place, (C, old) in enumerate(zip(moments.C, C_prev, strict=True)):
            here = [n for n, of in enumerate(moments.of) if of == place]
            most = max(ranks[n] for n in here)  # a smaller r takes the first rows: they are the same
            general = general_directions(C + old, most)
            private = orthonormal(private_directions(C, old, most)) if i > 1 else general[:, :0]
            for n in here:
                self._start[n] = torch.cat([general[:, : ranks[n]], private[:, : ranks[n]]], dim=1).mT * 3**-0.5

    def _measure(self, data: Batches | None) -> Moments:
        """C of every distinct input, of the model as it is."""
        moments = input_moments(self, data, skip=self.options.skip, limit=self.options.batches)
        for place, C in enumerate(moments.C):
            if not bool(torch.isfinite(C).all()):
                raise ValueError(
                    f"method 'loda': inputs of {self.layers[moments.of.index(place)].name} have inf or NaN in the "
                    "task's data; run the model in a wider dtype"
                )
        return moments

    def _C_prev(self, moments: Moments) -> list[Tensor]:
        """The sum over the old tasks; zero before there is one."""
        kept = self.state.get("C")
        return kept if isinstance(kept, list) else [torch.zeros_like(C) for C in moments.C]

    def start(self, i: int) -> Factors:
        A, self._start = self._start, []
        layers = list(zip(A, self.layers, strict=True))
        zeros = [layer.B.new_zeros(layer.B.shape[0], len(a)) for a, layer in layers]
        return Factors([a.to(layer.A) for a, layer in layers], zeros)

    def init_adapter(self, i: int) -> None:
        self._groups.forget()
        self._continues, self._general = i > 1, self.ranks(i)
        self.write(self.start(i))
        self._gates = [torch.full_like(layer.A[:, 0], self.options.g_P) for layer in self.layers]
        for gate, r in zip(self._gates, self._general, strict=True):
            gate[:r] = self.options.g_S
        self.route(self.with_old)

    def with_old(self, layer: Layer) -> LoraTerms:
        """The old sum, and the branches by their weights."""
        n = self.index(layer)
        if not self._continues:
            return LoraTerms(layer.A, layer.B, layer.scale, gate=self._gates[n])
        A, B = torch.cat([self.merged.A[n], layer.A]), torch.cat([self.merged.B[n], layer.B], dim=1)
        gate = torch.cat([torch.ones_like(self.merged.A[n][:, 0]), self._gates[n]])
        return LoraTerms(A, B, layer.scale, gate=gate)

    # -- gradient alignment --------------------------------------------------------------------------------------------

    def forward_mod(self, step: int, inputs: Mapping[str, Any]) -> None:
        if self.options.gao:
            self._groups.see(inputs)

    def after_backward(self) -> None:
        if not self.options.gao:
            return
        first, second = self._groups.split()
        parameters = self._trained()
        if first and second:
            length = self.options.rho * float(torch.rand(()))
            crossed = [self._crossed(first, second, length), self._crossed(second, first, length)]
            gradients = [(g_1 + g_2) / 2 for g_1, g_2 in zip(*crossed, strict=True)]
        else:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # Processes that train together take one step: no wrapper's hooks have averaged these gradients.
        one = torch.cat([g.flatten() for g in (*gradients, gradients[0].new_ones(1))])
        *summed, processes = self.total(one).split([*(p.numel() for p in parameters), 1])
        for p, g in zip(parameters, summed, strict=True):
            p.grad = (g / processes).view_as(p)

    def _trained(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in (layer.A, layer.B) if p.requires_grad]

    def _crossed(self, before: Group, after: Group, length: float) -> list[Tensor]:
        """The gradients of ``after`` where a move against those of ``before`` leads."""
        parameters, way_out = self._trained(), "set gao=False"
        gradients = self._groups.gradients(before, parameters, way_out)
        kept = [p.detach().clone() for p in parameters]
        cuts = {id(layer.B): r for layer, r in zip(self.layers, self._general, strict=True)}
        for p, g in zip(parameters, gradients, strict=True):
            # B_S and B_P are one parameter here, and two tensors of the paper.
            for move, part in zip(*(t.tensor_split([cuts.get(id(p), t.shape[1])], dim=1) for t in (p, g)), strict=True):
                move.sub_(length * part / (part.norm() + 1e-12))
        try:
            return self._groups.gradients(after, parameters, way_out)
        finally:
            for p, values in zip(parameters, kept, strict=True):
                p.copy_(values)

    # -- after it ------------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        ranks, trained = self.ranks(i), self.current.clone()
        weighted = [B * gate for B, gate in zip(trained.B, self._gates, strict=True)]
        self._add(i, Factors(trained.A, weighted))  # C_i is that of the trained model
        moments = self._measure(data)
        C_prev = self._C_prev(moments)
        if i > 1:
            for n, (A, B, r) in enumerate(zip(trained.A, weighted, ranks, strict=True)):
                place = moments.of[n]
                eta = shrinkage(A[:r], C_prev[place], moments.C[place], self.options.gamma)
                B[:, :r] *= (1 - eta).to(B)
            self._add(i, Factors(trained.A, weighted))
        C = [old + new for old, new in zip(C_prev, moments.C, strict=True)]
        if self.options.count_twice:
            C = [old + new for old, new in zip(C, self._measure(data).C, strict=True)]
        self.state = {"C": C, "ranks": torch.tensor(ranks)}

    def _add(self, i: int, new: Factors) -> None:
        if i > 1:
            self.append(new)
        else:
            self.write(new)

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> BranchTerms:
        if i > 1 and weight is None:
            raise ValueError(
                "method 'loda' merges by statistics that take a pass of the trained model over the task's data, so "
                "merged_view() cannot show the merge; end the task, or evaluate the model as it trains"
            )
        return super().merged_terms(layer, index, i, weight)
