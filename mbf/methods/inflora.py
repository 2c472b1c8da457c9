"""InfLoRA: each task learns B alone, over a frozen A whose rows are orthogonal to what the old tasks' inputs span.

*InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning*, Liang and Li, CVPR 2024, arXiv 2404.00228, and
the authors' public code (``methods/inflora.py``). For a layer with inputs x, C = mean x xᵀ over the tokens of task i,
and P the projector on the protected subspace M::

    before task i    C' = (I − P) C = Û S V̂ᵀ,   A_i = [û_1 .. û_r]ᵀ / √3,  frozen;   B_i = 0,  trained
    after it         C again, of the trained model;   M grows until it holds ε_i of ‖C‖²   (``mbf.methods._subspaces``)
    ε_i              eps + (eps_last − eps) (i − 1) / T

so A_i A_iᵀ = I/3, and the task changes nothing for x in M: B_i A_i x = 0, up to rounding. A step of SGD on B_i with the
rate η is one of −η s² G A_iᵀ A_i on W, with G = dL/dW: the gradient, projected on the rows of A_i. The LoRAs of all
tasks are summed.

‖C‖² sums squared eigenvalues of C, fourth powers of x; ``energy="C^1/2"`` (ours) takes x itself, as GPM does. In a
decoder that is no detail, as a direction that all tokens share outweighs the others: in SmolLM2-135M 0.95 of ‖C‖² is 1
or 2 of the 576 directions that q and v read, 0.95 of ‖C^1/2‖² is 79 to 314 of them (32 rows of a news task).

Where 2 dim M > d its complement is stored instead ("retain" instead of "remove"), which takes d · min(k, d − k) numbers
for every distinct layer input: q, k and v share one basis, and so do gate and up. In a Llama of 7B, all linear layers,
that is at most 11 GB (fp32), and C of all layers, which a pass collects at once, 22 GB. ε near 1 protects whatever the
task's inputs have, and soon nothing is left to learn in: where there are fewer than r directions, the other rows of A_i
are zero and learn nothing (ours; a warning names the layers), and they are not kept.

Ours, too: the scale s of the adapter (the authors have none); every adapted layer instead of k and v; T as an option,
as nobody knows how many tasks come; the least basis that *reaches* ε_i in task 1 as in later ones, where the code stops
one direction short in task 1; ``skip``.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from mbf.methods._passes import Moments, input_moments
from mbf.methods._subspaces import Subspace, from_state, root, rows, to_state, warn_if_exhausted, without_zero_rows
from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, MethodInfo, Options, register


class InfLoraOptions(Options):
    eps: float = Field(0.95, ge=0, le=1, description="share of ‖C‖² that is protected after task 1")
    eps_last: float = Field(1.0, ge=0, le=1, description="what this share moves towards, and has after task T + 1")
    tasks: int = Field(10, ge=1, description="T of the schedule from eps to eps_last (the authors': all tasks)")
    energy: Literal["C", "C^1/2"] = Field("C", description="what the share is of: C, or the inputs themselves (ours)")
    skip: int = Field(0, ge=0, description="tokens at the start of each row that do not count in C (ours)")
    batches: int | None = Field(None, ge=1, description="batches of the task to look at; none: all")


@register
class InfLora(Summed):
    """State: the rank of a task's LoRA, and the protected subspace of every distinct layer input."""

    name = "inflora"
    Options = InfLoraOptions
    options: InfLoraOptions
    info = MethodInfo(
        title="Interference-free (InfLoRA)",
        trained="B_i",
        frozen="W, A_i, old A, B",
        merge="sum; A_i ⟂ inputs of old tasks",
        memory="O(TP), at most O(d_out d_in); O(dk), k ≤ d/2",
        grade="CODE",
        source="arXiv 2404.00228",
    )
    needs_data = True
    adopts = False
    merges_alone = False
    into_weight = True
    _A: list[Tensor]

    def trains(self, i: int) -> tuple[bool, bool]:
        return False, True

    def share(self, i: int) -> float:
        """ε_i; from task T + 1 on it is ``eps_last``."""
        o = self.options
        return o.eps + (o.eps_last - o.eps) * min(1.0, (i - 1) / o.tasks)

    def before_task(self, i: int, data: Batches | None) -> None:
        moments, ranks = self._moments(data), self.ranks(i)
        U = [space.leading(C, max(ranks)) for space, C in zip(self._spaces(moments), moments.C, strict=True)]
        self._A = [rows(U[of], r) / math.sqrt(3) for of, r in zip(moments.of, ranks, strict=True)]
        warn_if_exhausted(self, i, self._A, "Lower eps and eps_last, or look at more of the task's data.")

    def init_adapter(self, i: int) -> None:
        A, self._A = self._A, []
        self.write(
            Factors(A, [layer.B.new_zeros(len(layer.B), len(a)) for layer, a in zip(self.layers, A, strict=True)])
        )
        if i > 1:
            self.route(self.with_old)

    def append(self, new: Factors) -> None:
        super().append(without_zero_rows(new))

    def after_task(self, i: int, data: Batches | None) -> None:
        super().after_task(i, data)
        moments, share = self._moments(data), self.share(i)
        spaces = [
            space.grown(C if self.options.energy == "C" else root(C), share).dual()
            for space, C in zip(self._spaces(moments), moments.C, strict=True)
        ]
        self.state = {**self.state, **to_state(spaces)}

    def _moments(self, data: Batches | None) -> Moments:
        return input_moments(self, data, skip=self.options.skip, limit=self.options.batches)

    def _spaces(self, moments: Moments) -> list[Subspace]:
        """What is protected of each distinct input."""
        spaces = from_state(self.state) or [Subspace.empty(len(C), C.device) for C in moments.C]
        if [len(space.basis) for space in spaces] != [len(C) for C in moments.C]:
            raise ValueError(
                f"inflora protects {len(spaces)} layer inputs of widths {sorted({len(s.basis) for s in spaces})}, and "
                f"the task's layers read {len(moments.C)} of widths {sorted({len(C) for C in moments.C})}; go on with "
                "the model and the target modules of the earlier tasks"
            )
        return [space.to(C.device) for space, C in zip(spaces, moments.C, strict=True)]
