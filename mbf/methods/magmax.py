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

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import LoraTerms, rsvd


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
        if self.options.space == "factors" and "origin" not in self.state:
            raise ValueError(
                "magmax with space='factors' needs the LoRA from which task 1 started, which an adapter trained "
                "elsewhere does not carry; use space='delta', or begin with an untrained adapter"
            )
        finetuned = self.current.clone()
        largest = [self._largest(n, A, B) for n, (A, B) in enumerate(zip(finetuned.A, finetuned.B, strict=True))]
        merged = [self._lora(n, taus) for n, taus in enumerate(largest)]
        if self.options.space == "delta":
            self.state = {"ft": finetuned, "delta": [taus[0] for taus in largest]}
        else:
            tau = Factors([taus[0] for taus in largest], [taus[1] for taus in largest])
            self.state = {"origin": self._factors("origin"), "ft": finetuned, "tau": tau}
        self.write(Factors([A for A, _ in merged], [B for _, B in merged]))

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> LoraTerms:
        """The merge with the LoRA in training as it is now, made anew in every forward and without gradients."""
        if weight is not None:
            super().merged_terms(layer, index, i, weight)  # says that there is none
        with torch.no_grad():
            A, B = self._lora(index, self._largest(index, *layer.values()))
        return LoraTerms(A, B, layer.scale)

    def _largest(self, n: int, A: Tensor, B: Tensor) -> list[Tensor]:
        """The merged task vectors of layer n with (A, B) as the latest task: of A and of B, or of B A alone."""
        if self.options.space == "delta":
            new, kept = [B @ A], self.state.get("delta")
            running = [kept[n]] if isinstance(kept, list) else new
        else:
            origin = self._factors("origin")
            new = [A - origin.A[n], B - origin.B[n]]
            running = [self._factors("tau").A[n], self._factors("tau").B[n]] if "tau" in self.state else new
        return [max_magnitude(old, tau) for old, tau in zip(running, new, strict=True)]

    def _lora(self, n: int, taus: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(A, B) of layer n for its merged task vectors."""
        lam, layer = self.options.scaling, self.layers[n]
        if self.options.space == "factors":
            origin = self._factors("origin")
            return origin.A[n] + lam * taus[0], origin.B[n] + lam * taus[1]
        # A generator of its own: merging must not move the training's random stream.
        generator = torch.Generator(device=taus[0].device).manual_seed(0)
        U, S, Vh = rsvd(lam * taus[0], layer.A.shape[0], generator=generator)
        return (S.sqrt()[:, None] * Vh).to(layer.A), (U * S.sqrt()).to(layer.B)

    def _factors(self, key: str) -> Factors:
        value = self.state[key]
        assert isinstance(value, Factors)
        return value
