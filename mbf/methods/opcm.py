"""OPCM: continual merging by projecting each new task vector away from the merged one.

*Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging*, Tang et al.,
and the authors' public code (``fusion_bench/method/opcm``). With D the merged task vector, τ the new one (both against
θ_0), D = U S Vᵀ and k the least number of singular values whose sum exceeds the share α of all::

    τ' = τ − U_k (U_kᵀ τ V_k) V_kᵀ − Σ_{k < j ≤ rank D} (u_jᵀ τ v_j) u_j v_jᵀ
    D ← (λ_{i−1} D + τ') / λ_i,   λ_i such that ‖D‖ over all layers is the mean of ‖τ_1‖..‖τ_i‖

so ⟨D, τ'⟩ = 0. The authors zero the diagonal of Uᵀ τ V over the full basis, whose part beyond the rank of D is
arbitrary; only the non-zero singular pairs are used here (ours, deterministic). Their code counts k from 0, so that its
block is one smaller and covers less than α; ours is the block that covers it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import BranchTerms


class OpcmOptions(Options):
    alpha: float = Field(0.5, ge=0, le=1, description="share of singular mass whose block is projected away")


def project_out(tau: Tensor, D: Tensor, alpha: float) -> Tensor:
    """τ' of the module's formula, in fp64: τ without what D's leading block and diagonal already hold.

    Args:
        tau: [m, n], the new task vector.
        D: [m, n], the merged one.
        alpha: share of the singular mass of D that the leading block covers.
    """
    U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    # That of fp32 for half types, too: their ε times a width is more than 1.
    negligible = S[0] * max(D.shape) * min(torch.finfo(D.dtype).eps, torch.finfo(torch.float32).eps)
    rank = int((negligible < S).sum())
    if rank == 0:
        return tau.clone()
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    k = min(int((S.cumsum(0) / S.sum() <= alpha).sum()) + 1, rank)
    core = U.mT @ tau.double() @ Vh.mT
    removed = torch.diag(core.diagonal())
    removed[:k, :k] = core[:k, :k]
    return (tau.double() - U @ removed @ Vh).to(tau.dtype)


@register
class Opcm(Method):
    """Applied to A and B alike, as two parameters of the layer. Every task starts from θ_0, as in the paper.

    How the SLAO paper ran OPCM on LoRA is not settled by its text beyond "A and B alike".
    """

    name = "opcm"
    Options = OpcmOptions
    options: OpcmOptions
    merges_alone = False
    info = MethodInfo(
        title="Orthogonal projection (OPCM)",
        trained="A, B",
        frozen="W",
        merge="D ← (λ D + τ')/λ_i, τ' ⟂ D",
        memory="O(P)",
        grade="CODE",
        source="fusion_bench, method opcm",
    )

    def init_adapter(self, i: int) -> None:
        if i == 1:
            self.state = {"origin": self.current.clone()}
        else:
            origin = self.state["origin"]
            assert isinstance(origin, Factors)
            self.write(origin)

    def after_task(self, i: int, data: Batches | None) -> None:
        origin = self.state.get("origin")
        if not isinstance(origin, Factors):
            raise ValueError(
                "opcm needs the LoRA from which task 1 started, which an adapter trained elsewhere does not carry; "
                "begin with an untrained adapter"
            )
        theta_0 = [*origin.A, *origin.B]
        finetuned = self.current
        tau = [t - o for t, o in zip([*finetuned.A, *finetuned.B], theta_0, strict=True)]
        norm, lam, mean_norm = _norm(tau), 1.0, _norm(tau)
        if i > 1:
            previous = [t - o for t, o in zip([*self.merged.A, *self.merged.B], theta_0, strict=True)]
            lam_before, mean_before = self.state["lam"], self.state["mean_norm"]
            assert isinstance(lam_before, float) and isinstance(mean_before, float)
            mean_norm = ((i - 1) * mean_before + norm) / i
            combined = [
                lam_before * D + project_out(t, D, self.options.alpha) for D, t in zip(previous, tau, strict=True)
            ]
            lam = _norm(combined) / mean_norm if mean_norm else 1.0
            tau = [D / lam for D in combined]
        self.state = {"origin": origin, "lam": lam, "mean_norm": mean_norm}
        merged = [o + D for o, D in zip(theta_0, tau, strict=True)]
        self.write(Factors(merged[: len(origin.A)], merged[len(origin.A) :]))

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> BranchTerms:
        if i > 1 and weight is None:
            raise ValueError(
                "method 'opcm' scales every layer by a norm over all of them, so a single layer has no view of the "
                "merge and merged_view() cannot show it; end the task, or evaluate the model as it trains"
            )
        return super().merged_terms(layer, index, i, weight)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
