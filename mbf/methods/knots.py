"""KnOTS: all tasks' LoRAs in the basis of one joint SVD, merged there entry by entry.

*Model merging with SVD to tie the Knots*, Stoica et al., arXiv 2410.19735, and the authors' public code
(``task_merger.py``, ``masking_ops.py``). With dW_t = s B_t A_t, concatenated along the inputs::

    [dW_1 .. dW_T] = U S [V_1 .. V_T],  singular values of 10⁻⁵ and less dropped
    Z_t = S V_t = Uᵀ dW_t,   so dW_t = U Z_t
    dW  = U Z,   Z = λ TIES(Z_1 .. Z_T)

TIES (arXiv 2306.01708): of each Z_t the ``top`` share of entries by magnitude, over all layers together; for every
entry the sign of the sum over tasks; the mean of the non-zero Z_t of that sign. DARE before it (arXiv 2311.03099)
drops entries of Z_t at random with probability p and divides the rest by 1 − p. Task arithmetic takes the plain mean,
which on Z is that on dW. λ = 0.5 and ``top`` of everything are the authors' for Llama 3 8B (λ = 0.4 and p = 0.8 with
DARE).

The SVD is that of a core of rank Σ r_t, never of a [d_out, T d_in] matrix: with [B_1 .. B_T] = Q R and A_t = L_t Q_t,
R blockdiag(A_t) has the left singular vectors u of [R_1 L_1 .. R_T L_T], R_t the columns of R that belong to task t; so
U = Q u and Z_t = uᵀ R_t A_t.

Ours: the rule merges all tasks at once and says nothing of a sequence; here every LoRA is kept and the merge made anew
after each task. Entries whose sum is exactly zero take the majority's sign of their layer, in the authors' code that of
the whole model. Random numbers are drawn layer by layer from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._separate import Pair, Separate, layer_pairs
from mbf.methods._summed import bounded
from mbf.methods.base import Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms


class KnotsOptions(Options):
    merge: Literal["ties", "dare_ties", "task_arithmetic"] = Field("ties", description="how the Z_t become one Z")
    scaling: float = Field(0.5, gt=0, description="λ; the authors take 0.4 with dare_ties")
    aggregate: Literal["mean", "sum"] = Field("mean", description="of the entries that TIES leaves, or of all")
    top: float = Field(1.0, gt=0, le=1, description="share of each task's entries that TIES keeps, by magnitude")
    drop: float = Field(0.8, ge=0, lt=1, description="p of DARE (dare_ties)")
    seed: int = Field(0, ge=0, description="of DARE's masks (ours: a generator of their own)")
    threshold: float = Field(1e-5, ge=0, description="singular values up to this are dropped")


def align(tasks: Sequence[Pair], scale: float, threshold: float) -> tuple[Tensor, Tensor]:
    """U and Z of the module's formula for B_t A_t, in fp64 and from the factors alone.

    Args:
        tasks: (A_t [r_t, d_in], B_t [d_out, r_t]).
        scale: s, which counts for the threshold only.
        threshold: singular values of s B_t A_t up to this are dropped, but for the largest.

    Returns:
        U [d_out, k] with orthonormal columns, and Z [T, k, d_in], with ``B_t A_t = U Z[t]``.
    """
    Q, R = torch.linalg.qr(torch.cat([B for _, B in tasks], dim=1).double())
    blocks = R.split([A.shape[0] for A, _ in tasks], dim=1)
    core = [R_t @ torch.linalg.qr(A.double().mT).R.mT for R_t, (A, _) in zip(blocks, tasks, strict=True)]
    u, S, _ = torch.linalg.svd(torch.cat(core, dim=1), full_matrices=False)
    u = u[:, : max(1, int((abs(scale) * S > threshold).sum()))]
    Z = [(u.mT @ R_t) @ A.double() for R_t, (A, _) in zip(blocks, tasks, strict=True)]
    return Q @ u, torch.stack(Z)


def ties(Z: Tensor, least: Tensor, aggregate: str) -> Tensor:
    """TIES of Z [T, k, d]: of the entries of at least ``least[t]`` those with the sign of their sum, combined.

    Args:
        Z: [T, k, d].
        least: [T], the smallest magnitude that counts, by task.
        aggregate: "mean" over the entries that are left, or "sum".
    """
    Z = torch.where(Z.abs() >= least[:, None, None], Z, 0.0)
    sign = Z.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    Z = torch.where(sign > 0, Z.clamp(min=0), Z.clamp(max=0))
    total = Z.sum(0)
    return total / (Z != 0).sum(0).clamp(min=1) if aggregate == "mean" else total


@register
class Knots(Separate):
    """The adapter has the rank of the joint SVD: at most Σ r_t, d_out and d_in."""

    name = "knots"
    Options = KnotsOptions
    options: KnotsOptions
    changes_rank = True
    info = MethodInfo(
        title="Joint SVD and TIES (KnOTS)",
        trained="A_i, B_i",
        frozen="W",
        merge="U · λ TIES(Z_1 .. Z_T), [dW_1 .. dW_T] = U [Z_1 .. Z_T]",
        memory="O(TP)",
        grade="CODE",
        source="arXiv 2410.19735",
    )

    def merge(self, tasks: Sequence[Factors]) -> Factors:
        least = self._least(tasks)
        pairs = [self._merge_layer(n, layer_pairs(tasks, n), least) for n in range(len(self.layers))]
        return Factors([A for A, _ in pairs], [B for _, B in pairs])

    def merge_layer(self, n: int, tasks: Sequence[Pair]) -> Pair:
        return self._merge_layer(n, tasks, None)

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> LoraTerms:
        if self._compares_layers:
            raise ValueError(
                f"knots with top={self.options.top:g} compares the entries of all layers, so a single layer has no "
                "view of the merge; end the task to see it, or use top=1"
            )
        return super().merged_terms(layer, index, i, weight)

    @property
    def _compares_layers(self) -> bool:
        return self.options.top < 1 and self.options.merge != "task_arithmetic"

    def _aligned(self, n: int, tasks: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """U and Z of layer ``n``, with what DARE drops dropped."""
        U, Z = align(tasks, self.layers[n].scale, self.options.threshold)
        if self.options.merge == "dare_ties" and self.options.drop:
            keep = 1 - self.options.drop
            generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + n)  # on the CPU: one everywhere
            Z = Z * (torch.rand(Z.shape, generator=generator, dtype=torch.float32) < keep).to(Z) / keep
        return U, Z

    def _least(self, tasks: Sequence[Factors]) -> Tensor | None:
        """[T]: of every task the magnitude that the ``top`` share of its entries reaches; None: all count."""
        if not self._compares_layers:
            return None
        magnitudes = [
            self._aligned(n, layer_pairs(tasks, n))[1].abs().flatten(1).cpu() for n in range(len(self.layers))
        ]
        everything = torch.cat(magnitudes, dim=1)
        entries = everything.shape[1]
        return everything.kthvalue(entries + 1 - max(1, int(self.options.top * entries)), dim=1).values

    def _merge_layer(self, n: int, tasks: Sequence[Pair], least: Tensor | None) -> Pair:
        U, Z = self._aligned(n, tasks)
        if self.options.merge == "task_arithmetic":
            merged = Z.mean(0) if self.options.aggregate == "mean" else Z.sum(0)
        else:
            merged = ties(Z, Z.new_zeros(len(Z)) if least is None else least.to(Z), self.options.aggregate)
        A, B = tasks[0]
        return bounded((self.options.scaling * merged).to(A.dtype), U.to(B.dtype))
