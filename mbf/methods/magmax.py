"""MagMax: sequential fine-tuning, merged by the entry of largest magnitude over all task vectors.

*MagMax: Leveraging Model Merging for Seamless Continual Learning*, Marczak et al., arXiv 2407.06322, and the authors'
public code. Task i starts from task i − 1's weights; τ_i = θ_i − θ_0; the merged task vector is, entry by entry, the
τ_i of largest |τ_i| (ties: the later task), times λ. The maximum is associative, so one running LoRA is enough.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods.base import Batches, Factors, Method, MethodInfo, Options, register
from mbf.ops import rsvd


class MagMaxOptions(Options):
    scaling: float = Field(0.5, gt=0, description="λ of the merged task vector")
    space: Literal["factors", "delta"] = Field(
        "factors", description="task vectors of A and B apart, or of the dense B A (kept as d_out × d_in per layer)"
    )


def max_magnitude(running: Tensor, new: Tensor) -> Tensor:
    """The entry of larger |·|; ties go to ``new``, the later task."""
    return torch.where(new.abs() >= running.abs(), new, running)


@register
class MagMax(Method):
    """θ_0 is the LoRA as task 1 found it (B = 0).

    What is merged is not settled by the paper, which merges whole models: ``space="factors"`` treats A and B as two
    parameters; ``space="delta"`` takes dW = B A, whose maximum is dense, and ships its best approximation of the
    adapter's rank by randomised SVD (ours).
    """

    name = "magmax"
    Options = MagMaxOptions
    options: MagMaxOptions
    info = MethodInfo(
        title="Largest magnitude (MagMax)",
        trained="A, B",
        frozen="W",
        merge="entrywise max |τ| × 0.5",
        memory="O(P)",
        grade="CODE",
        source="arXiv 2407.06322",
    )

    def init_adapter(self, i: int) -> None:
        if i == 1:
            self.state = {"origin": self.current.clone()}
        else:
            self.write(self._factors("ft"))

    def after_task(self, i: int, data: Batches | None) -> None:
        finetuned = self.current.clone()
        if self.options.space == "delta":
            self._merge_delta(finetuned)
        else:
            self._merge_factors(finetuned)

    def _merge_factors(self, finetuned: Factors) -> None:
        if "origin" not in self.state:
            raise ValueError(
                "magmax with space='factors' needs the LoRA from which task 1 started, which an adapter trained "
                "elsewhere does not carry; use space='delta', or begin with an untrained adapter"
            )
        origin = self._factors("origin")
        tau = Factors(
            [A - A_0 for A, A_0 in zip(finetuned.A, origin.A, strict=True)],
            [B - B_0 for B, B_0 in zip(finetuned.B, origin.B, strict=True)],
        )
        if "tau" in self.state:
            best = self._factors("tau")
            tau = Factors(
                [max_magnitude(a, b) for a, b in zip(best.A, tau.A, strict=True)],
                [max_magnitude(a, b) for a, b in zip(best.B, tau.B, strict=True)],
            )
        self.state = {"origin": origin, "ft": finetuned, "tau": tau}
        lam = self.options.scaling
        self.write(
            Factors(
                [A_0 + lam * t for A_0, t in zip(origin.A, tau.A, strict=True)],
                [B_0 + lam * t for B_0, t in zip(origin.B, tau.B, strict=True)],
            )
        )

    def _merge_delta(self, finetuned: Factors) -> None:
        delta = [B @ A for A, B in zip(finetuned.A, finetuned.B, strict=True)]
        if "delta" in self.state:
            best = self.state["delta"]
            assert isinstance(best, list)
            delta = [max_magnitude(a, b) for a, b in zip(best, delta, strict=True)]
        self.state = {"ft": finetuned, "delta": delta}
        # A generator of its own: merging must not move the training's random stream.
        generator = torch.Generator(device=delta[0].device).manual_seed(0)
        merged = Factors()
        for dW, A in zip(delta, finetuned.A, strict=True):
            U, S, Vh = rsvd(self.options.scaling * dW, A.shape[0], generator=generator)
            merged.A.append((S.sqrt()[:, None] * Vh).to(A))
            merged.B.append((U * S.sqrt()).to(A))
        self.write(merged)

    def _factors(self, key: str) -> Factors:
        value = self.state[key]
        assert isinstance(value, Factors)
        return value
