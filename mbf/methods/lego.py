"""LoRA-LEGO: the rank-1 units of all tasks' LoRAs, clustered by k-means; the centroids are the merged LoRA.

*Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering*, Zhao et al.,
ICLR 2025, arXiv 2409.16167, of which the abstract was read; details after a third party's implementation. A LoRA is a
set of units u = [a_j ; b_j], row j of A and column j of B: B A = Σ_j b_j a_jᵀ. With all units of T LoRAs in one pool::

    C_1 .. C_K = k-means of the pool, each half of a unit scaled to length 1
    c_k = mean of u over C_k,   c_k ← c_k · (mean of ‖u‖ over C_k) / ‖c_k‖      parameter reweighting
    dW  = s √(r/K) Σ_k b_k a_kᵀ,   [a_k ; b_k] = c_k                            output reweighting

Averaging shrinks a centroid, which the first factor undoes; the second holds the variance of the output at that of a
LoRA of rank r. The norm is the third party's maximum norm, or the Euclidean one. K = r by default.

Ours: the units are balanced first. (c a, b / c) is the same function for every c ≠ 0 but another unit, so both halves
get the same length, and the sign with which the largest entry of a is positive. K-means starts from the longest unit
and goes on with the unit farthest from all chosen so far, over units in an order that does not depend on that of ranks
and tasks: the result doesn't, either. Where ranks differ, r is their mean. The rule merges all tasks at once and says
nothing of a sequence; here every LoRA is kept and the merge made anew after each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._separate import Pair, Separate
from mbf.methods.base import MethodInfo, Options, register


class LegoOptions(Options):
    clusters: int | None = Field(None, ge=1, description="K, the rank of the result; default: that of the first LoRA")
    balance: bool = Field(True, description="both halves of a unit get one length and a fixed sign first (ours)")
    normalise: bool = Field(True, description="k-means sees each half of a unit at length 1")
    reweight_parameters: bool = Field(True, description="centroids get the mean norm of their members")
    reweight_output: bool = Field(True, description="dW times √(r/K)")
    norm: Literal["inf", "l2"] = Field("inf", description="of the parameter reweighting: the largest entry, or ‖·‖₂")
    iterations: int = Field(100, ge=1, description="of k-means at most; it ends when no unit changes its cluster")


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Units of the same b aᵀ with ‖a‖ = ‖b‖ and the largest entry of a positive; a unit without function is zero.

    Args:
        a: [N, d_in].
        b: [N, d_out].
    """
    length_a, length_b = (torch.linalg.vector_norm(half, dim=1, keepdim=True) for half in (a, b))
    length = (length_a * length_b).sqrt()
    sign = torch.where(a.gather(1, a.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(a)
    dead = length == 0
    return (
        torch.where(dead, 0.0, sign * length * a / length_a),
        torch.where(dead, 0.0, sign * length * b / length_b),
    )


def k_means(x: Tensor, K: int, iterations: int) -> Tensor:
    """The cluster of every row of x, int64 [N], by Lloyd's algorithm; some of the K may be empty.

    The start is deterministic: row 0, then again and again the row farthest from all chosen. Each row is a cluster of
    its own where K ≥ N.

    Args:
        x: [N, d].
        K: how many clusters.
        iterations: at most so many; it ends when nothing changes.
    """
    N = len(x)
    if K >= N:
        return torch.arange(N, device=x.device)
    chosen = [0]
    nearest = (x - x[0]).square().sum(1)
    while len(chosen) < K:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    centroids, cluster = x[chosen], x.new_full((N,), -1, dtype=torch.int64)
    for _ in range(iterations):
        distance = centroids.square().sum(1) - 2 * x @ centroids.mT  # ‖x‖² is the same for all clusters
        before, cluster = cluster, distance.argmin(1)
        if torch.equal(before, cluster):
            break
        counts = torch.bincount(cluster, minlength=K)
        sums = torch.zeros_like(centroids).index_add_(0, cluster, x)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    return cluster


@register
class Lego(Separate):
    """The adapter has rank K, or that of all LoRAs together where this is less. An empty cluster is a zero rank."""

    name = "lego"
    Options = LegoOptions
    options: LegoOptions
    info = MethodInfo(
        title="Clustered rank-1 units (LoRA-LEGO)",
        trained="A_i, B_i",
        frozen="W",
        merge="K centroids of all units [a_j ; b_j], × √(r/K)",
        memory="O(TP)",
        grade="3RD",
        source="arXiv 2409.16167",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.changes_rank = self.options.clusters is not None

    def merge_layer(self, n: int, tasks: Sequence[Pair]) -> Pair:
        options = self.options
        a = torch.cat([A for A, _ in tasks]).double()
        b = torch.cat([B for _, B in tasks], dim=1).mT.double()
        if options.balance:
            a, b = balanced(a, b)
        K = min(options.clusters or tasks[0][0].shape[0], len(a))
        order = _canonical(a, b)
        a, b = a[order], b[order]
        cluster = k_means(self._features(a, b), K, options.iterations)
        units = torch.cat([a, b], dim=1)
        counts = torch.bincount(cluster, minlength=K).clamp(min=1)
        centroids = units.new_zeros(K, units.shape[1]).index_add_(0, cluster, units) / counts[:, None]
        if options.reweight_parameters:
            kind = torch.inf if options.norm == "inf" else 2
            norms, now = (torch.linalg.vector_norm(rows, kind, dim=1) for rows in (units, centroids))
            wanted = units.new_zeros(K).index_add_(0, cluster, norms) / counts
            centroids = centroids * torch.where(now > 0, wanted / now, 0.0)[:, None]
        A, B = centroids[:, : a.shape[1]], centroids[:, a.shape[1] :]
        if options.reweight_output:
            B = B * (len(a) / len(tasks) / K) ** 0.5
        return A.to(tasks[0][0].dtype), B.mT.to(tasks[0][1].dtype)

    def _features(self, a: Tensor, b: Tensor) -> Tensor:
        """What k-means sees of the units, [N, d_in + d_out]."""
        if not self.options.normalise:
            return torch.cat([a, b], dim=1)
        lengths = (torch.linalg.vector_norm(half, dim=1, keepdim=True) for half in (a, b))
        return torch.cat([torch.where(c > 0, half / c, 0.0) for half, c in zip((a, b), lengths, strict=True)], dim=1)


def _canonical(a: Tensor, b: Tensor) -> Tensor:
    """An order of the units that does not depend on the given one: by ‖a‖ ‖b‖, longest first, then by the entries."""
    length = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    keys = torch.cat([-length[:, None], a, b], dim=1).tolist()
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), device=a.device)
