"""SLAO: Single LoRA continual learning with Orthogonal initialisation via continual merging.

*Merge before Forget: A Single LoRA Continual Learning via Continual Merging*, Qiao and Mahdavi, ICLR 2026,
arXiv 2512.23017. ``Slao.init_adapter`` and ``Slao.after_task`` together are its Algorithm 1; the options are the
paper's ablations, and two additions of ours (``basis="rsvd"``, ``B_start="preserve"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import LoraTerms, merge_, orthonormal_rows, rsvd, task_boundary_

SCHEDULES: dict[str, Callable[[int], float]] = {
    "1/sqrt(i)": lambda i: 1 / math.sqrt(i),
    "1/i": lambda i: 1 / i,
    "1/log(i+1)": lambda i: 1 / math.log(i + 1),
}

ABLATIONS: dict[str, dict[str, str]] = {
    "FREB-MA": {"train": "A", "merge": "A"},
    "FREA-MB": {"train": "B", "merge": "B"},
    "FTBA-MA": {"train": "both", "merge": "A"},
    "FTBA-MBA": {"train": "both", "merge": "both"},
    "FTBA-MB": {"train": "both", "merge": "B"},
}
"""The paper's names for what is trained and merged: FR = frozen, FT = fine-tuned, M = merged."""


class SlaoOptions(Options):
    """The paper's choice is each first value, and the default."""

    start: Literal["last_ft", "last_merge", "zero"] = Field(
        "last_ft", description="where the next task starts: last fine-tuned LoRA, merged LoRA, or fresh A with B = 0"
    )
    A_start: Literal["orthonormal", "as_is", "random"] = Field("orthonormal", description="A at the start of a task")
    train: Literal["both", "B", "A"] = Field("both", description="factors trained from task 2 on; task 1 trains both")
    merge: Literal["B", "A", "both"] = Field("B", description="factors merged; the other is replaced")
    schedule: Literal["1/sqrt(i)", "1/i", "1/log(i+1)"] | float | Callable[[int], float] = Field(
        "1/sqrt(i)", description="λ(i): a name, a constant, or a callable of the task number"
    )
    basis: Literal["qr", "rsvd"] = Field(
        "qr", description="orthonormal A from QR of A_ft, or the leading right singular vectors of B_ft A_ft"
    )
    B_start: Literal["carry", "preserve"] = Field(
        "carry", description="B at the start: B_ft, or B_ft A_ft Aᵀ so that B A is the same function in the new basis"
    )
    rank: int | None = Field(None, ge=1, description="rank from task 2 on (needs basis=rsvd and B_start=preserve)")

    @model_validator(mode="after")
    def _fits_together(self) -> SlaoOptions:
        if self.rank is not None and not (
            self.basis == "rsvd" and self.B_start == "preserve" and self.merge == "B" and self.start != "zero"
        ):
            raise ValueError(
                "rank: only basis='rsvd' with B_start='preserve' and merge='B' can change the rank; set these, or none"
            )
        if self.B_start == "preserve" and (self.A_start == "random" or self.start == "zero"):
            raise ValueError(
                "B_start='preserve' needs an A that spans the last one; use A_start='orthonormal' or 'as_is'"
            )
        if self.basis == "rsvd" and self.A_start != "orthonormal":
            raise ValueError(
                f"basis='rsvd' is a choice of orthonormal A; it does nothing with A_start={self.A_start!r}"
            )
        return self


@register
class Slao(Method):
    """Algorithm 1 of arXiv 2512.23017. State: one LoRA beside the adapter, however many tasks came."""

    name = "slao"
    Options = SlaoOptions
    options: SlaoOptions
    info = MethodInfo(
        title="Merge before Forget (SLAO)",
        trained="A, B",
        frozen="W",
        merge="A ← A_ft;  B ← B + (B_ft − B)/√i",
        memory="O(P)",
        grade="paper",
        source="arXiv 2512.23017",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.changes_rank = self.options.rank is not None
        self._projected_B_merge: list[Tensor] | None = None  # in a task that changes the rank
        self._basis_of: tuple[Factors, list[Tensor]] | None = None  # the last (A_ft, B_ft), and Q of A_ft

    def trains(self, i: int) -> tuple[bool, bool]:
        return i == 1 or self.options.train != "B", i == 1 or self.options.train != "A"

    def merge_weight(self, i: int) -> float:
        """λ(i); the paper's is 1/√i. The first task has nothing to be merged with."""
        if i == 1:
            return 1.0
        schedule = self.options.schedule
        if callable(schedule):
            return float(schedule(i))
        return SCHEDULES[schedule](i) if isinstance(schedule, str) else schedule

    # -- Algorithm 1, before a task ----------------------------------------------------------------------------------

    def init_adapter(self, i: int) -> None:
        self._projected_B_merge = None
        if i == 1:  # ordinary LoRA: A Kaiming uniform, B zero
            return
        if self.options.start == "zero":
            self.write(self.fresh())
            return
        last = self._last_finetuned()  # (A_ft, B_ft) of task i − 1
        A = self._start_A(last)  # A_ftᵀ = Q R, Q ← Q sign(diag R), A = Qᵀ
        B = last.B  # B = B_ft, not B_merge
        if self.options.B_start == "preserve":
            B = [B_ft @ (A_ft @ A_i.mT) for A_ft, B_ft, A_i in zip(last.A, last.B, A, strict=True)]
        if self.options.rank is not None:
            self._projected_B_merge = self._merged_in_basis(A)
        self.write(Factors(A, B))

    # -- and after it --------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        finetuned = self.current.clone()  # A_ft, B_ft
        merged = finetuned  # task 1: A_merge = A_ft, B_merge = B_ft
        if i > 1:
            merged = self._merge(finetuned, self.merge_weight(i))  # A_merge = A_ft, B_merge += λ(i) (B_ft − B_merge)
        self.write(merged)  # evaluate and ship (A_merge, B_merge) ...
        if self.options.start == "last_ft":
            self.state = {"ft": finetuned}  # ... and keep (A_ft, B_ft) for the next start

    def select(self, task: int | None) -> None:
        self._projected_B_merge = None  # the task is over, or undone

    def ahead_bytes(self) -> int:
        return sum(Q.numel() * Q.element_size() for Q in self._basis_of[1]) if self._basis_of else 0

    # -- the same with the options of the ablations ------------------------------------------------------------------

    def _last_finetuned(self) -> Factors:
        if self.options.start == "last_merge":
            return self.merged
        last = self.state["ft"]
        assert isinstance(last, Factors)
        return last

    def _start_A(self, last: Factors) -> list[Tensor]:
        match self.options.A_start:
            case "as_is":
                return last.A
            case "random":
                return self.fresh().A
        if self.options.basis == "qr":
            (of, Q), self._basis_of = self._basis_of or (None, []), None
            return Q if of is last else orthonormal_rows(last.A)
        ranks = [self.options.rank or A.shape[0] for A in last.A]
        leading = _right_singular_vectors(last, [min(r, A.shape[0]) for r, A in zip(ranks, last.A, strict=True)])
        if all(Vh.shape[0] == r for Vh, r in zip(leading, ranks, strict=True)):
            return leading
        grown = self.fresh(ranks).A  # a rank that grows: random rows, made orthonormal to the leading ones
        return orthonormal_rows([torch.cat([Vh, new[Vh.shape[0] :]]) for Vh, new in zip(leading, grown, strict=True)])

    @property
    def _B_merge(self) -> list[Tensor]:
        return self.merged.B if self._projected_B_merge is None else self._projected_B_merge

    def _merged_in_basis(self, A: list[Tensor]) -> list[Tensor]:
        """B of the merged LoRA, projected on the rows of the new A: the only way to merge across a change of rank."""
        old = zip(self.merged.A, self.merged.B, A, strict=True)
        return [B_merge @ (A_merge @ A_i.mT) for A_merge, B_merge, A_i in old]

    def _merge(self, finetuned: Factors, weight: float) -> Factors:
        A_merge, B_merge = finetuned.A, finetuned.B
        options = self.options
        if (options.merge, options.start, options.A_start, options.basis) == ("B", "last_ft", "orthonormal", "qr"):
            B_merge = [B.clone() for B in self._B_merge]
            Q = task_boundary_((A_merge, B_merge), (finetuned.A, finetuned.B), weight)  # both sides of the boundary
            self._basis_of = finetuned, Q
            return Factors(A_merge, B_merge)
        if self.options.merge != "A":
            B_merge = [B.clone() for B in self._B_merge]
            merge_(B_merge, finetuned.B, weight)
        if self.options.merge != "B":
            A_merge = [A.clone() for A in self.merged.A]
            merge_(A_merge, finetuned.A, weight)
        return Factors(A_merge, B_merge)

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> LoraTerms:
        """Time-aware scaling: B_merge + λ (B_ft − B_merge) is interpolated by the operator, nothing is written."""
        weight = self.merge_weight(i) if weight is None else weight
        A: Tensor = layer.A
        if self.options.merge != "B":
            A = torch.lerp(self.merged.A[index], A, torch.as_tensor(weight, dtype=A.dtype, device=A.device))
        if self.options.merge == "A":
            return LoraTerms(A, layer.B, layer.scale)
        return LoraTerms(A, layer.B, layer.scale, merged_B=self._B_merge[index], merge_weight=weight)


def _right_singular_vectors(factors: Factors, ranks: list[int]) -> list[Tensor]:
    """Vh [r, d_in] of every B A; layers of one rank are one batch."""
    leading: dict[int, Tensor] = {}
    for rank in dict.fromkeys(ranks):
        here = [n for n, r in enumerate(ranks) if r == rank]
        triples = rsvd([(factors.B[n], factors.A[n]) for n in here], rank)
        leading |= {n: Vh for n, (_, _, Vh) in zip(here, triples, strict=True)}
    return [leading[n] for n in range(len(ranks))]
