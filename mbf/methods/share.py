"""Share: all tasks' LoRAs as coefficients in one basis a layer, which is rebuilt after every task.

*Shared LoRA Subspaces for Almost Strict Continual Learning*, arXiv 2602.06043, after a published note with its
equations; the authors' code was not public. β ``[d_out, k]`` and α ``[d_in, k]`` have orthonormal columns::

    task t       dW_t = s (β ε_β^t) (α ε_α^t)ᵀ,   ε ``[k, p]``
    phase 1      β, α = leading left singular vectors of [B_1] and [A_1ᵀ],   ε_β = βᵀ B_1,  ε_α = αᵀ A_1ᵀ
    phase 2      task i > 1 trains (β' ε_β)(α' ε_α)ᵀ: φ < k temporary vectors β', α', begun as the first of β and α,
                 and ε ``[φ, p]`` ~ N(0, σ²); nothing else is trained, A and B neither
    phase 3      β, α anew from [β ε_β^1 .. β ε_β^{i−1}, β' ε_β] and the same of α; all ε by projection on them

k is the smallest that explains ``variance`` (60 %) of both stacks. Inference names its task (``learner.select_task``)::

    y = W x + s β G (αᵀ x),   G = ε_β^t ε_α^tᵀ

one ``mix`` of k × k numbers on a basis that all tasks share. Not done: tuning coefficients after phase 3.

Ours, as the sources leave it open:

- Without a label the layers compute with the mean of G over the tasks, that is, with the mean of all dW_t. (A mean of
  ε_β and ε_α apart would hang on the signs of singular vectors.) It is the adapter's own A = αᵀ, B = β G, so plain PEFT
  loads it.
- k never falls. By the rule alone phase 3 would cut 60 % out of what it cut before, task after task.
- A LoRA enters in balanced form (``balance``): B = U √S, A = √S Vᵀ of its SVD, so that the stacks weigh directions by
  what they do, and cutting it to p < r columns is the best approximation of that rank.
- p = r by default. The paper uses less, down to 1, where LoRAs trained at rank r are projected.
- φ = max(1, k/4), which the note gives as the upper end, and σ = 0.1.
- ``centre`` takes the singular vectors of the stacks with their mean column subtracted, as the paper does, and keeps
  the mean's direction as one more basis vector. Off by default: then all of k is used for what is reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, register
from mbf.ops import LoraTerms, rsvd


class ShareOptions(Options):
    variance: float = Field(0.6, gt=0, le=1, description="share of the stacks' squared norm that the basis explains")
    basis: int | None = Field(None, ge=1, description="k itself, whatever variance says")
    columns: int | None = Field(None, ge=1, description="p; default: the adapter's rank (ours), which is its most")
    temporary: int | None = Field(None, ge=1, description="φ; default: max(1, k/4) (ours)")
    sigma: float = Field(0.1, ge=0, description="standard deviation of new coefficients (ours)")
    balance: bool = Field(True, description="a LoRA enters as B = U √S, A = √S Vᵀ (ours)")
    centre: bool = Field(False, description="subtract the mean column before the SVD; its direction stays (ours)")
    coeff: Literal["mean", "last"] = Field("mean", description="without a label: mean of all G, or the last (ours)")


class Shared(NamedTuple):
    """One layer: β [d_out, k], α [d_in, k] with orthonormal columns, ε_β and ε_α [T, k, p]; fp32."""

    beta: Tensor
    alpha: Tensor
    coeff_beta: Tensor
    coeff_alpha: Tensor

    def lora(self, t: int) -> tuple[Tensor, Tensor]:
        """(B_t [d_out, p], A_tᵀ [d_in, p]), the columns that stand in the stacks."""
        return self.beta @ self.coeff_beta[t], self.alpha @ self.coeff_alpha[t]

    def mixes(self) -> Tensor:
        """G of every task, [T, k, k]."""
        return self.coeff_beta @ self.coeff_alpha.mT


def columns(A: Tensor, B: Tensor, p: int, balance: bool) -> tuple[Tensor, Tensor]:
    """B and Aᵀ of at most p columns, for the same B A or its best approximation of rank p.

    Args:
        A: [r, d_in].
        B: [d_out, r].
    """
    r = min(A.shape[0], A.shape[1], B.shape[0])
    if not balance and p >= A.shape[0]:
        return B.float(), A.mT.float()
    U, S, Vh = rsvd((B.double(), A.double()), min(p, r))
    return (U * S.sqrt()).float(), (Vh.mT * S.sqrt()).float()


def basis(stack: Tensor, k: int, centre: bool) -> Tensor:
    """k orthonormal columns for those of ``stack`` [d, n], k ≤ d, n: its leading left singular vectors.

    With ``centre`` those of the stack less its mean column, after the mean's own direction.
    """
    X = stack.double()
    if not centre:
        return _left(X, k)
    first = _left(X.mean(1, keepdim=True), 1)
    rest = X - first @ (first.mT @ X)  # the mean goes with its direction
    orthonormal: Tensor = torch.linalg.qr(torch.cat([first, _left(rest, k - 1)], dim=1)).Q
    return orthonormal


def explaining(stack: Tensor, variance: float, centre: bool) -> int:
    """The least number of columns of ``basis`` that explain this share of ‖stack‖², with ``centre`` of its variance."""
    X, along = stack.double(), []
    if centre:
        first = _left(X.mean(1, keepdim=True), 1)
        X = X - X.mean(1, keepdim=True)
        along = [(first.mT @ X).square().sum()[None]]
        X = X - first @ (first.mT @ X)
    energy = torch.cat([*along, torch.linalg.svdvals(X).square()])
    total = energy.sum()
    # A share is reached up to rounding: 1 asks for the whole rank, not for noise.
    return 1 + int((energy.cumsum(0) < (variance - 1e-12) * total).sum())


def shared(
    loras: Sequence[tuple[Tensor, Tensor]], least: int, variance: float, k: int | None = None, centre: bool = False
) -> Shared:
    """Basis and coefficients of (B_t, A_tᵀ), as ``columns`` gives them: phases 1 and 3.

    Args:
        loras: of every task.
        least: the width below which k does not fall.
        variance: share of both stacks that the basis explains, if ``k`` does not say how wide it is.
        k: its width.
        centre: as for ``basis``.
    """
    sides = [list(side) for side in zip(*loras, strict=True)]
    stacks = [torch.cat(side, dim=1) for side in sides]
    widest = min(stacks[0].shape[0], stacks[1].shape[0], stacks[0].shape[1])
    k = min(widest, max(least, k or max(explaining(stack, variance, centre) for stack in stacks)))
    p = max(B.shape[1] for B in sides[0])
    found = [basis(stack, k, centre) for stack in stacks]
    coefficients = [
        torch.stack([_padded(vectors.mT @ one.double(), p) for one in side])
        for vectors, side in zip(found, sides, strict=True)
    ]
    return Shared(*(t.float() for t in (*found, *coefficients)))


@register
class Share(Method):
    """State: ``beta``, ``alpha``, ``coeff_beta``, ``coeff_alpha``, lists over the layers, as in ``Shared``."""

    name = "share"
    Options = ShareOptions
    options: ShareOptions
    learns = True
    changes_rank = True
    info = MethodInfo(
        title="Shared LoRA subspaces (Share)",
        trained="β', α', ε (task 1: A, B)",
        frozen="W, β, α",
        merge="β, α ← SVD of all LoRAs rebuilt; ε by projection",
        memory="O((d_in + d_out) k + T k p)",
        task_id=True,
        foldable=False,
        grade="NOTE",
        source="arXiv 2602.06043",
    )

    def trains(self, i: int) -> tuple[bool, bool]:
        return i == 1, i == 1

    # -- phase 2 -------------------------------------------------------------------------------------------------------

    def init_adapter(self, i: int) -> None:
        if i == 1:
            return
        shared = [self._shared(n) for n in range(len(self.layers))]
        counts = [min(one.beta.shape[1], self.options.temporary or max(1, one.beta.shape[1] // 4)) for one in shared]
        self.learn("beta", [one.beta[:, :phi] for one, phi in zip(shared, counts, strict=True)])
        self.learn("alpha", [one.alpha[:, :phi] for one, phi in zip(shared, counts, strict=True)])
        for name in ("coeff_beta", "coeff_alpha"):
            drawn = [torch.randn(phi, one.coeff_beta.shape[2]) for one, phi in zip(shared, counts, strict=True)]
            self.learn(name, [self.options.sigma * e.to(one.beta.device) for e, one in zip(drawn, shared, strict=True)])
        self.route(self.temporary)

    def temporary(self, layer: Layer) -> LoraTerms:
        """The LoRA in training, (β' ε_β)(α' ε_α)ᵀ."""
        beta, alpha, coeff_beta, coeff_alpha = self._temporary(self.index(layer))
        return _terms(beta, alpha, coeff_beta @ coeff_alpha.mT, layer)

    def _temporary(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        names = ("beta", "alpha", "coeff_beta", "coeff_alpha")
        beta, alpha, coeff_beta, coeff_alpha = (self.learned[name][n] for name in names)
        return beta, alpha, coeff_beta, coeff_alpha

    # -- phases 1 and 3 ------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        rebuilt = [self._rebuilt(n) for n in range(len(self.layers))]
        self.state = {
            "beta": [one.beta for one in rebuilt],
            "alpha": [one.alpha for one in rebuilt],
            "coeff_beta": [one.coeff_beta for one in rebuilt],
            "coeff_alpha": [one.coeff_alpha for one in rebuilt],
        }
        pairs = [self._unlabelled(one) for one in rebuilt]
        self.write(Factors([A for A, _ in pairs], [B for _, B in pairs]))

    def _rebuilt(self, n: int) -> Shared:
        """Basis and coefficients of layer ``n`` with the LoRA in training taken in, after task 1 of it alone."""
        options, old = self.options, self._shared(n) if "beta" in self.state else None
        if self.learned:
            beta, alpha, coeff_beta, coeff_alpha = self._temporary(n)
            A, B = (alpha @ coeff_alpha).mT, beta @ coeff_beta
        else:  # a LoRA: of task 1, or one that was trained elsewhere and is merged
            A, B = self.layers[n].values()
        p = min(A.shape[0], options.columns or A.shape[0])
        loras = [] if old is None else [old.lora(t) for t in range(len(old.coeff_beta))]
        loras.append(columns(A, B, p, options.balance))
        least = 1 if old is None else old.beta.shape[1]
        return shared(loras, least, options.variance, options.basis, options.centre)

    def _shared(self, n: int) -> Shared:
        lists = [self.state[name] for name in Shared._fields]
        assert all(isinstance(one, list) for one in lists)
        return Shared(*(one[n] for one in lists if isinstance(one, list)))

    # -- inference -----------------------------------------------------------------------------------------------------

    def select(self, task: int | None) -> None:
        self.route(None if task is None else lambda layer: self._of_task(layer, task))

    def _of_task(self, layer: Layer, task: int) -> LoraTerms:
        one = self._shared(self.index(layer))
        return _terms(one.beta, one.alpha, one.coeff_beta[task - 1] @ one.coeff_alpha[task - 1].mT, layer)

    def _unlabelled(self, one: Shared) -> tuple[Tensor, Tensor]:
        """A and B that compute without a task's label."""
        mixes = one.mixes()
        return one.alpha.mT, one.beta @ (mixes.mean(0) if self.options.coeff == "mean" else mixes[-1])

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> LoraTerms:
        """What computes without a label once this task is taken in, made anew in every forward, without gradients."""
        if weight is not None:
            super().merged_terms(layer, index, i, weight)  # says that there is none
        with torch.no_grad():
            A, B = self._unlabelled(self._rebuilt(index))
        return LoraTerms(A.to(layer.A), B.to(layer.B), layer.scale)


def _terms(beta: Tensor, alpha: Tensor, mix: Tensor, layer: Layer) -> LoraTerms:
    return LoraTerms(alpha.mT.to(layer.A.dtype), beta.to(layer.B.dtype), layer.scale, mix=mix)


def _left(X: Tensor, k: int) -> Tensor:
    """k left singular vectors of X [d, n], k ≤ n."""
    U: Tensor = torch.linalg.svd(X, full_matrices=False).U
    return U[:, :k]


def _padded(coefficients: Tensor, p: int) -> Tensor:
    """[k, p]: zero columns beyond those that there are."""
    k, there = coefficients.shape
    return torch.cat([coefficients, coefficients.new_zeros(k, p - there)], dim=1)
