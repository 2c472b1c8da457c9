"""LoRAC-IPC: old LoRAs weighted anew, rows of A kept orthonormal across tasks, and the most important layers frozen.

LoRA composition with important parameter constraints, after the authors' public code, written for ViT
(``peft/lora/comp_ilora_mask.py``, ``engines/comp_ilora_mask_engine.py``). In task i, for each layer::

    dW_i = s (Σ_{k<i} ω_k B_k A_k + m B_i A_i)        A_i, B_i and all ω trained; A_k, B_k frozen; ω_k from 1
    loss + λ Σ_layers ‖Q Qᵀ − I‖_F                     Q = [A_1; ..; A_i], the old rows without gradient

(the "QR" of their names is Aᵀ as Q and B as R; nothing is decomposed). Importance, as AdaLoRA has it, of every entry θ
of A_i and B_i, over the optimiser's steps::

    I = |θ · dL/dθ|,   Ī ← β₁ Ī + (1 − β₁) I,   U ← β₂ U + (1 − β₂) |I − Ī|
    importance of a layer = mean of Ī U over A_i + mean of Ī U over B_i

After a task the ``threshold`` most important share of layers is frozen for all later tasks: m = 0 there, and ω stays as
it is. The sum of all LoRAs with the latest ω is what is evaluated and shipped.

Ours: the share is of the layers that are not frozen yet, rounded down; the authors' learning rate of ω, apart from that
of the LoRA, is ``omega_scale``: ω moves so many times as far as the parameter that the optimiser steps; no class
prototypes, which are of classifiers; a warning where i r > d_in, as so many rows cannot be orthonormal.
"""

from __future__ import annotations

import warnings

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms


class LoracIpcOptions(Options):
    penalty: float = Field(0.5, ge=0, description="λ of ‖Q Qᵀ − I‖ (authors: 0.5 to 1)")
    threshold: float = Field(0.05, ge=0, le=1, description="share of layers frozen after a task (authors: 0.05, 0.1)")
    beta1: float = Field(0.85, ge=0, lt=1, description="β₁ of the importance")
    beta2: float = Field(0.85, ge=0, lt=1, description="β₂ of its deviation")
    omega_scale: float = Field(
        1.0, gt=0, description="how far ω moves with a step of the optimiser (authors: 0.1 to 1)"
    )


def off_orthonormal(old: Tensor, A: Tensor) -> Tensor:
    """‖Q Qᵀ − I‖_F for Q = [old; A], of A ``[r, d]`` alone differentiable."""
    Q = torch.cat([old.detach(), A])
    return torch.linalg.matrix_norm(Q @ Q.mT - torch.eye(len(Q), dtype=Q.dtype, device=Q.device))


def importance(mean: Tensor, deviation: Tensor) -> Tensor:
    """Mean of Ī U."""
    return (mean * deviation).mean()


@register
class LoracIpc(Summed):
    """State: B of every task as it was trained, ω, which layers are frozen; within a task Ī and U of all entries."""

    name = "lorac_ipc"
    Options = LoracIpcOptions
    options: LoracIpcOptions
    info = MethodInfo(
        title="Composition with important layers kept (LoRAC-IPC)",
        trained="A_i, B_i, ω",
        frozen="W, old A, B, important layers",
        merge="Σ ω_k B_k A_k",
        memory="O(TP)",
        grade="CODE",
        source="github.com/learninginvision/LoRAC-IPC",
    )
    learns = True
    merges_alone = False

    # -- a task --------------------------------------------------------------------------------------------------------

    def init_adapter(self, i: int) -> None:
        self.state = {key: value for key, value in self.state.items() if key not in _WITHIN}
        if i == 1:
            return
        self.write(self.start(i))
        self.learn("omega", self._list("omega"))
        crowded = [layer for layer in self.layers if i * layer.A.shape[0] > layer.A.shape[1]]
        if self.options.penalty and crowded:
            r, d_in = crowded[0].A.shape
            warnings.warn(
                f"method 'lorac_ipc', task {i}: {i * r} rows of {crowded[0].name} cannot be orthonormal, as d_in is "
                f"{d_in}; the penalty only spreads them. Lower the rank, or set penalty=0",
                stacklevel=2,
            )
        self.route(self.with_old)

    def _omega(self, n: int) -> Tensor:
        """ω of the old tasks in layer n: ``[K]``."""
        kept, learned = self._list("omega")[n], self.learned["omega"][n]
        if self._frozen()[n]:
            return kept
        return kept + self.options.omega_scale * (learned - kept)

    def with_old(self, layer: Layer) -> LoraTerms:
        n, r = self.index(layer), len(layer.A)
        omega = self._omega(n)
        m = omega.new_full((r,), 0.0 if self._frozen()[n] else 1.0)
        A, B = torch.cat([self.merged.A[n], layer.A]), torch.cat([self._list("B")[n], layer.B], dim=1)
        return LoraTerms(A, B, layer.scale, gate=torch.cat([omega.repeat_interleave(r), m]))

    def loss_extra(self) -> Tensor | None:
        if not self.options.penalty:
            return None
        first = not self.learned
        live = [n for n in range(len(self.layers)) if first or not self._frozen()[n]]
        found = [off_orthonormal(self.merged.A[n][:0] if first else self.merged.A[n], self.layers[n].A) for n in live]
        return self.options.penalty * torch.stack(found).sum() if found else None

    def after_backward(self) -> None:
        names = list(_WITHIN)
        before = [self.state.get(name) for name in names]
        after: list[list[Tensor]] = [[] for _ in names]
        for n, layer in enumerate(self.layers):
            for offset, theta in ((0, layer.A), (2, layer.B)):
                mean, deviation = (
                    one[n] if isinstance(one, list) else torch.zeros_like(theta) for one in before[offset : offset + 2]
                )
                if theta.grad is not None:
                    now = (theta * theta.grad).abs()
                    mean = self.options.beta1 * mean + (1 - self.options.beta1) * now
                    deviation = self.options.beta2 * deviation + (1 - self.options.beta2) * (now - mean).abs()
                after[offset].append(mean)
                after[offset + 1].append(deviation)
        self.state = {**self.state, **dict(zip(names, after, strict=True))}

    # -- after it ------------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        new = self.current.clone()
        one = [A.new_ones(1) for A in new.A]
        frozen = self._frozen()
        if i == 1:
            A, B, omega = new.A, new.B, one
        else:
            A = [torch.cat(pair) for pair in zip(self.merged.A, new.A, strict=True)]
            added = [torch.zeros_like(B) if frozen[n] else B for n, B in enumerate(new.B)]
            B = [torch.cat(pair, dim=1) for pair in zip(self._list("B"), added, strict=True)]
            omega = [torch.cat([self._omega(n).detach(), one[n]]) for n in range(len(self.layers))]
        frozen = self._with_the_most_important(frozen)
        self.state = {"B": B, "omega": omega, "frozen": torch.tensor(frozen, dtype=torch.int64)}
        scaled = [b * w.repeat_interleave(b.shape[1] // len(w)) for b, w in zip(B, omega, strict=True)]
        self.write(Factors(A, scaled))

    def _with_the_most_important(self, frozen: list[bool]) -> list[bool]:
        """Those frozen so far, and the threshold share of the others."""
        if any(name not in self.state for name in _WITHIN):  # an adapter that was trained elsewhere
            return frozen
        lists = [self._list(name) for name in _WITHIN]
        scores = [float(importance(a, b) + importance(c, d)) for a, b, c, d in zip(*lists, strict=True)]
        free = [n for n, is_frozen in enumerate(frozen) if not is_frozen]
        count = int(self.options.threshold * len(free) + 1e-9)
        chosen = sorted(free, key=lambda n: -scores[n])[:count]
        return [is_frozen or n in chosen for n, is_frozen in enumerate(frozen)]

    # -- state ---------------------------------------------------------------------------------------------------------

    def _frozen(self) -> list[bool]:
        """For each layer, whether it is frozen."""
        frozen = self.state.get("frozen")
        return [bool(one) for one in frozen.tolist()] if isinstance(frozen, Tensor) else [False] * len(self.layers)

    def _list(self, key: str) -> list[Tensor]:
        value = self.state[key]
        assert isinstance(value, list)
        return value


_WITHIN = ("mean_A", "deviation_A", "mean_B", "deviation_B")
