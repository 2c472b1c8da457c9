"""LiLoRA: a shared A and B_0, and for each task a LoRA of B's own, mixed by a learnt scalar.

*LoRA in LoRA*, arXiv 2508.06202, and the authors' public code for LLaVA, a decoder LLM (``peft/tuners/lilora.py``,
``train_LiLoRA.py``). For task t, σ the sigmoid of a scalar a_t of each layer::

    dW_t = s (σ(a_t) B_0 + (1 − σ(a_t)) Eb_t Ea_t) A       A [r, d_in], B_0 [d_out, r], Ea_t [r̃, r], Eb_t [d_out, r̃]
    loss + λ Σ_layers (1 − cos(Eb_t Ea_t, Eb_{t−1} Ea_{t−1})) ‖B_0 − B_0,prev‖²_F      for t > 1

A and Ea from Kaiming, B_0 and Eb from zero, a_t from N(0, 1). The cosine of the products is by Grams of r̃ × r̃ and
r × r: <X Y, X' Y'> = tr((X'ᵀ X) (Y Y'ᵀ)). One call computes a layer: with the base product as a LoRA of rank r + r̃,
A_eff = [A; Ea A], B_eff = [B_0, Eb] and a gate of σ and 1 − σ; alone, where the base is quantised, by
``lilora_accumulate``, whose h has r numbers a token.

The paper trains A, B_0, Ea_t, Eb_t, a_t. The released code freezes B_0 after task 1 and has no cosine term, which then
is zero: ``b0_mode="frozen"``. A goes on training in both, so old tasks drift: their Eb, Ea and a are kept bit by bit,
and A and B_0 are the latest.

Inference needs the task: ``learner.select_task(name)``. Without it, ours: the last task's (``agnostic="last"``), or the
mean of all tasks' dW (``"mean"``). λ is not in the sources; the default is ours, and so is r̃ = r/2 as a share of the
adapter's rank (theirs: r = 128, r̃ = 64).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.init import kaiming_uniform_

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import BranchTerms, LiloraTerms, LoraTerms


class LiLoraOptions(Options):
    b0_mode: Literal["paper", "frozen"] = Field("paper", description="B_0 after task 1: trained, or frozen (code)")
    inner: int | None = Field(None, ge=1, description="r̃; none: half of the adapter's rank")
    cosine: float = Field(0.1, ge=0, description="λ of the cosine term (ours)")
    agnostic: Literal["last", "mean"] = Field("last", description="what computes without a task's label (ours)")


def inner_product(X: Tensor, Y: Tensor, other_X: Tensor, other_Y: Tensor) -> Tensor:
    """<X Y, X' Y'> of [d_out, r̃] and [r̃, r] factors."""
    return ((other_X.mT @ X) * (other_Y @ Y.mT)).sum()


def cosine(X: Tensor, Y: Tensor, other_X: Tensor, other_Y: Tensor) -> Tensor:
    """cos(X Y, X' Y') of the flattened products; 0 where one is zero, and then without gradient."""
    lengths = inner_product(X, Y, X, Y) * inner_product(other_X, other_Y, other_X, other_Y)
    if not bool(lengths > 0):
        return lengths.new_zeros(())
    return inner_product(X, Y, other_X, other_Y) / lengths.sqrt()


@register
class LiLora(Method):
    """The adapter holds A and B_0. State: Ea, Eb and a of every task, and whether there was one."""

    name = "lilora"
    Options = LiLoraOptions
    options: LiLoraOptions
    info = MethodInfo(
        title="LoRA in LoRA (LiLoRA)",
        trained="A, B_0, Ea_i, Eb_i, a_i",
        frozen="W, old Ea, Eb, a",
        merge="none (by task)",
        memory="O(P) + O(T (d_out + r) r̃)",
        task_id=True,
        foldable=False,
        grade="CODE",
        source="arXiv 2508.06202",
    )
    learns = True
    adopts = False
    merges_alone = False
    _later = False

    def trains(self, i: int) -> tuple[bool, bool]:
        return True, i == 1 or self.options.b0_mode == "paper"

    def init_adapter(self, i: int) -> None:
        self._later = i > 1
        Ea, Eb, a = [], [], []
        for layer in self.layers:
            r = layer.A.shape[0]
            inner = self.options.inner or max(1, r // 2)
            Ea.append(kaiming_uniform_(torch.empty(inner, r), a=5**0.5).to(layer.A))
            Eb.append(layer.B.new_zeros(len(layer.B), inner))
            a.append(torch.randn(()).to(layer.A))
        for name, values in (("Ea", Ea), ("Eb", Eb), ("a", a)):
            self.learn(name, values)
        self.route(self._training)

    def _training(self, layer: Layer) -> LiloraTerms:
        n = self.index(layer)
        Ea, Eb, a = (self.learned[name][n] for name in ("Ea", "Eb", "a"))
        return LiloraTerms(layer.A, layer.B, Ea, Eb, a.sigmoid(), layer.scale)

    def loss_extra(self) -> Tensor | None:
        if not self._later or not self.options.cosine or self.options.b0_mode == "frozen":
            return None
        terms = []
        for n, layer in enumerate(self.layers):
            old_Ea, old_Eb, _ = self._of(self._tasks(), n)
            like = cosine(self.learned["Eb"][n], self.learned["Ea"][n], old_Eb, old_Ea)
            terms.append((1 - like) * (layer.B - self.merged.B[n]).square().sum())
        return self.options.cosine * torch.stack(terms).sum()

    def after_task(self, i: int, data: Batches | None) -> None:
        kept = {f"{name}{i}": [p.detach().clone() for p in values] for name, values in self.learned.items()}
        self.state = {**self.state, **kept, "tasks": i}

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> BranchTerms:
        if self.options.agnostic == "mean" and i > 1 and weight is None:
            raise ValueError(
                "method 'lilora' with agnostic='mean' computes with the mean over all tasks between them, which "
                "merged_view() does not show; end the task, or evaluate the model as it trains"
            )
        return super().merged_terms(layer, index, i, weight)

    # -- inference -----------------------------------------------------------------------------------------------------

    def _tasks(self) -> int:
        tasks = self.state["tasks"]
        assert isinstance(tasks, int)
        return tasks

    def _of(self, task: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ea, Eb and a of a learnt task in layer n."""
        lists = [self.state[f"{name}{task}"] for name in ("Ea", "Eb", "a")]
        Ea, Eb, a = (values[n] for values in lists if isinstance(values, list))
        return Ea, Eb, a

    def _terms(self, layer: Layer, tasks: list[int]) -> LoraTerms | LiloraTerms:
        """The mean of these tasks' dW; of several as one LoRA."""
        n = self.index(layer)
        parts = [self._of(task, n) for task in tasks]
        if len(parts) == 1:
            Ea, Eb, a = parts[0]
            return LiloraTerms(layer.A, layer.B, Ea, Eb, a.sigmoid(), layer.scale)
        shares = torch.stack([a.sigmoid() for _, _, a in parts])
        gate = [shares.mean().expand(layer.A.shape[0])]
        gate += [((1 - share) / len(parts)).expand(len(Ea)) for share, (Ea, _, _) in zip(shares, parts, strict=True)]
        A = torch.cat([layer.A, *(Ea @ layer.A for Ea, _, _ in parts)])
        B = torch.cat([layer.B, *(Eb for _, Eb, _ in parts)], dim=1)
        return LoraTerms(A, B, layer.scale, gate=torch.cat(gate))

    def _chosen(self, task: int | None) -> list[int]:
        if task is not None:
            return [task]
        return [self._tasks()] if self.options.agnostic == "last" else list(range(1, self._tasks() + 1))

    def select(self, task: int | None) -> None:
        tasks = self._chosen(task)
        self.route(lambda layer: self._terms(layer, tasks))

    def shipped(self) -> Factors:
        """What computes without a label, with the gates in B, as a LoRA of rank r + r̃ (r + T r̃ for the mean)."""
        found = Factors()
        for layer in self.layers:
            A, B, _, gate, *_ = self._terms(layer, self._chosen(None)).lora()
            assert gate is not None
            found.A.append(A.detach())
            found.B.append((B * gate).detach())
        return found
