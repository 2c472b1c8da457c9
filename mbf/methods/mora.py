"""MoRA: a square matrix in the place of A and B, with as many parameters and a much higher rank.

*High-Rank Updating for Parameter-Efficient Fine-Tuning*, arXiv 2405.12130, and the authors' public code (kongds/MoRA).
M ``[q, q]`` of each layer, q = ⌊√((d_out + d_in) r) + ½⌋, starts from zero and has no alpha::

    dW x = decompress(M compress(x))        (equation 6)

``kind=1`` shares rows and columns, which the paper prefers for large r: x folded to q numbers, their M repeated.
``kind=6`` turns every chunk of x as rotary embeddings do, for small r. ``mbf.ops.mora_accumulate`` has the equations.

MoRA is a parametrisation, not a continual method; both rules are ours. ``merge="none"``: M is trained from task to
task, as ``seqlora`` does. ``merge="slao"``: each task trains on from the last fine-tuned M, and then, as SLAO merges B,
M_m += (M − M_m) / √i; as dW is linear in M, the dW are merged by the same rule. (ReMoRA's merges into W inside a task
are for pretraining and not here.)

What is shipped as a plain LoRA is exact: of rank q for kind 1, compress and decompress M; of rank min(d_out, d_in) for
kind 6, whose dW needs it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import MoraTerms, mora_accumulate, mora_size

SHARING = 1


class MoraOptions(Options):
    kind: Literal[1, 6] = Field(6, description="compression: 1 shares (for large r), 6 rotates (for small r)")
    merge: Literal["none", "slao"] = Field("none", description="M trained on, or merged with weight 1/√i (ours)")


def update(M: Tensor, d_out: int, d_in: int, kind: int) -> Tensor:
    """dW of M, ``[d_out, d_in]``."""
    x = torch.eye(d_in, dtype=M.dtype, device=M.device)
    return mora_accumulate(x.new_zeros(d_in, d_out), x, M, kind=kind).T


def plain_lora(M: Tensor, d_out: int, d_in: int, kind: int) -> tuple[Tensor, Tensor]:
    """A and B with ``B A`` = dW of M."""
    q = len(M)
    if kind == SHARING and q < min(d_out, d_in):
        one = torch.eye(q, dtype=M.dtype, device=M.device)
        return update(one, q, d_in, kind).contiguous(), update(M, d_out, q, kind).contiguous()
    dW = update(M, d_out, d_in, kind).contiguous()
    one = torch.eye(min(d_out, d_in), dtype=M.dtype, device=M.device)
    return (one, dW) if d_in <= d_out else (dW, one)


@register
class Mora(Method):
    """The adapter gives r and is not used. State: M of each layer, merged; for SLAO's rule also the last M."""

    name = "mora"
    Options = MoraOptions
    options: MoraOptions
    info = MethodInfo(
        title="High-rank square update (MoRA)",
        trained="M",
        frozen="W",
        merge="none, or M_m + (M − M_m)/√i",
        memory="O(P)",
        grade="CODE",
        source="arXiv 2405.12130",
    )
    own_operator = True
    learns = True
    adopts = False
    merges_alone = False
    _task = 1

    def trains(self, i: int) -> tuple[bool, bool]:
        return False, False

    def init_adapter(self, i: int) -> None:
        self._task = i
        self.learn("M", self._kept("last" if self.options.merge == "slao" else "M") if i > 1 else self._zeros())
        self.route(lambda layer: self._terms(self.learned["M"][self.index(layer)]))

    def merge_weight(self, i: int) -> float | None:
        return 1 / math.sqrt(i) if self.options.merge == "slao" else None

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> MoraTerms:
        """What ``after_task`` would keep, or the same with another weight."""
        if weight is not None and self.options.merge == "none":
            super().merged_terms(layer, index, i, weight)  # says that there is none
        weight = self.merge_weight(i) if weight is None else weight
        return self._terms(self._merged(index, self.learned["M"][index], i, weight))

    def after_task(self, i: int, data: Batches | None) -> None:
        trained = [M.detach().clone() for M in self.learned["M"]]
        weight = self.merge_weight(i)
        self.state = {"M": [self._merged(n, M, i, weight) for n, M in enumerate(trained)]}
        if self.options.merge == "slao":
            self.state["last"] = [M.clone() for M in trained]  # files hold no tensor twice

    def select(self, task: int | None) -> None:
        self.route(lambda layer: self._terms(self._kept("M")[self.index(layer)]))

    def shipped(self) -> Factors:
        """dW of every layer as a plain LoRA, exactly."""
        found = Factors()
        for layer, M in zip(self.layers, self._kept("M"), strict=True):
            A, B = plain_lora(M, len(layer.B), layer.A.shape[1], self.options.kind)
            found.A.append(A)
            found.B.append(B / layer.scale)
        return found

    # -- M ---------------------------------------------------------------------------------------------------------

    def _zeros(self) -> list[Tensor]:
        sizes = [mora_size(len(layer.B), layer.A.shape[1], len(layer.A), self.options.kind) for layer in self.layers]
        return [layer.A.new_zeros(q, q) for layer, q in zip(self.layers, sizes, strict=True)]

    def _kept(self, key: str) -> list[Tensor]:
        value = self.state[key]
        assert isinstance(value, list)
        return value

    def _merged(self, n: int, M: Tensor, i: int, weight: float | Tensor | None) -> Tensor:
        if i == 1 or weight is None:
            return M
        return torch.lerp(self._kept("M")[n], M, weight if isinstance(weight, Tensor) else float(weight))

    def _terms(self, M: Tensor) -> MoraTerms:
        return MoraTerms(M, self.options.kind)
