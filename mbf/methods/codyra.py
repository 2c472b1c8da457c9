"""CoDyRA: every rank of a task's LoRA has a weight of its own, which L1 drives to zero where it is not needed.

*Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with Dynamic
Rank-Selective LoRA*, Lu et al., arXiv 2412.01004 (v7 has LLaMA and Gemma), and the authors' public code
(``loralib/codyra.py``, ``main.py``). For each task A Kaiming, B zero, and g ``[r]`` from N(0, 1) are new::

    dW_i = B diag(g) A                       A, B, g trained; no alpha scaling
    g ← soft(g, κ) = sign(g) max(|g| − κ, 0)   after every optimiser step of the second half
    g_j ← 0 where |g_j| < κ                  the code's cut, so in effect |g_j| < 2 κ before the step dies
    κ from 0 to kappa_max in 50 equal levels over these steps

after which the ranks with g_j = 0 are dropped and W += B diag(g) A. The step of the proximal operator is κ itself, not
the learning rate times κ, as in the code. It acts on g alone: Adam's momenta go on as if nothing had happened, so an
entry at zero may come back by a step longer than κ, and is cut again while its steps are shorter than 2 κ.

Ours: how many steps a task has is not known to a method; it is the option ``steps``, or what ``begin_task`` was told,
or else the number of batches in the task's data times ``epochs``. A gate carries g / s, so that alpha does not scale
(``scaled`` lets it). A layer that has lost every rank adds nothing to the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sized

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms


class CodyraOptions(Options):
    kappa_max: float = Field(0.005, ge=0, description="κ at the end of a task (the code's runner; its default: 7e-4)")
    levels: int = Field(50, ge=1, description="steps in which κ grows")
    dense_share: float = Field(0.5, ge=0, le=1, description="share of a task's steps before the first of them")
    hard_cut: bool = Field(True, description="set what is below κ after the soft threshold to zero")
    steps: int | None = Field(None, ge=1, description="optimiser steps of a task; none: as begin_task is told")
    epochs: int = Field(1, ge=1, description="passes over the data, where nothing tells the steps")
    scaled: bool = Field(False, description="let s = alpha / r scale dW, which the paper does not")


def soft(g: Tensor, kappa: float) -> Tensor:
    """argmin_z ½ (z − g)² + κ |z|, elementwise."""
    return g.sign() * (g.abs() - kappa).clamp(min=0)


@register
class Codyra(Summed):
    """State: the rank of a task's LoRA and, within a task, its number of steps."""

    name = "codyra"
    Options = CodyraOptions
    options: CodyraOptions
    info = MethodInfo(
        title="Dynamic rank-selective LoRA (CoDyRA)",
        trained="A_i, B_i, g",
        frozen="W, old A, B",
        merge="zero ranks dropped; sum of B diag(g) A",
        memory="O(TP), at most O(d_out d_in)",
        grade="CODE",
        source="arXiv 2412.01004",
    )
    learns = True
    merges_alone = False
    into_weight = True

    def before_task(self, i: int, data: Batches | None) -> None:
        steps = self.options.steps or self.steps
        if steps is None:
            if not isinstance(data, Sized):
                found = "none" if data is None else f"a {type(data).__name__}, which has no length"
                raise ValueError(
                    "codyra needs the number of a task's optimiser steps: found no steps, and as data "
                    f"{found}; call task(name, steps=...), or pass a list or a DataLoader as data"
                )
            steps = len(data) * self.options.epochs
        self.state = {**self.state, "steps": steps}

    def init_adapter(self, i: int) -> None:
        if i > 1:
            self.write(self.start(i))
        self.learn("g", [torch.randn(layer.A.shape[0]).to(layer.A) for layer in self.layers])
        self.route(self._first if i == 1 else self.with_old)

    def _gate(self, layer: Layer) -> Tensor:
        g: Tensor = self.learned["g"][self.index(layer)]
        return g if self.options.scaled else g / layer.scale

    def _first(self, layer: Layer) -> LoraTerms:
        return LoraTerms(layer.A, layer.B, layer.scale, gate=self._gate(layer))

    def with_old(self, layer: Layer) -> LoraTerms:
        gate = self._gate(layer)
        old = gate.new_ones(self.merged.A[self.index(layer)].shape[0])
        return super().with_old(layer)._replace(gate=torch.cat([old, gate]))

    def kappa(self, step: int) -> float:
        """κ after optimiser step ``step`` of the task, counted from 1."""
        steps = self.state["steps"]
        assert isinstance(steps, int)
        dense = self.options.dense_share * steps
        if step <= dense:
            return 0.0
        level = math.ceil(self.options.levels * (step - dense) / max(steps - dense, 1))
        return self.options.kappa_max * min(1.0, level / self.options.levels)

    def after_step(self, step: int) -> None:
        kappa = self.kappa(step)
        if not kappa:
            return
        for g in self.learned["g"]:
            thresholded = soft(g.data, kappa)
            if self.options.hard_cut:
                thresholded[thresholded.abs() < kappa] = 0
            g.data.copy_(thresholded)

    def after_task(self, i: int, data: Batches | None) -> None:
        if not self.learned:  # an adapter that was trained elsewhere stands for task 1
            super().after_task(i, data)
            return
        kept = self._kept()
        if i == 1:
            super().after_task(1, data)  # the rank, before some are dropped
            empty = [not len(A) for A in kept.A]
            self.write(
                Factors(
                    [A.new_zeros(1, A.shape[1]) if e else A for A, e in zip(kept.A, empty, strict=True)],
                    [B.new_zeros(len(B), 1) if e else B for B, e in zip(kept.B, empty, strict=True)],
                )
            )
        else:
            self.append(kept)
        self.state = {key: value for key, value in self.state.items() if key != "steps"}

    def _kept(self) -> Factors:
        """A and B diag(g) of the ranks that are left."""
        now, kept = self.current, Factors()
        for layer, A, B, g in zip(self.layers, now.A, now.B, self.learned["g"], strict=True):
            alive = g != 0
            kept.A.append(A[alive])
            kept.B.append(B[:, alive] * self._gate(layer)[alive].detach())
        return kept
