"""LoRAC-IPC: old LoRAs weighted anew, rows of A kept orthonormal across tasks, and the most important layers frozen.

*A Close Look at Important Parameter Changes in Continual Learning under Orthogonal LoRA Tuning*, Ling et al., known to
us by the authors' public code (``peft/lora/comp_ilora_mask.py``, ``engines/comp_ilora_mask_engine.py``), which is for
vision transformers. In task i, for each layer::

    dW_i = s (Σ_{k<i} ω_k B_k A_k + m B_i A_i)        A_i, B_i and all ω trained; A_k, B_k frozen; ω_k from 1; m = 1
    loss + λ Σ_layers ‖Q Qᵀ − I‖_F                     Q = [A_1; ..; A_i], the old rows without gradient

(the "QR" of their composition is Aᵀ as Q and B as R; nothing is decomposed). Importance, as AdaLoRA has it, of every
entry θ of A_i and B_i, over the optimiser's steps, the penalty in the gradient::

    I = |θ · dL/dθ|,   Ī ← β₁ Ī + (1 − β₁) I,   U ← β₂ U + (1 − β₂) |I − Ī|
    importance of a layer = mean of Ī U over A_i + mean of Ī U over B_i

After a task the most important layers, as many as are the ``threshold`` share of all, are frozen for all later tasks:
m = 0 there, and ω stays as it is. ``threshold=0`` is LoRAC. The sum of all LoRAs with the latest ω is what is evaluated
and shipped.

Ours: I is taken before a step, where the gradient was (the code: after it). The number of layers is rounded down, and
only layers that have learnt something count (the code freezes ties together and cannot freeze none). A frozen layer's
later LoRAs, which add nothing, are not kept. The authors' learning rate of ω, apart from that of the LoRA, is
``omega_scale``: ω moves so many times as far as the parameter that the optimiser steps, so Adam's steps of ω are so
many times as long, and SGD's the square of it. No class prototypes, which are of classifiers. A warning where
i r > d_in, as so many rows cannot be orthonormal.
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


def off_orthonormal(old: Tensor, A: Tensor, rest: Tensor | None = None) -> Tensor:
    """‖Q Qᵀ − I‖_F for Q = [old; A], of A alone differentiable.

    Args:
        old: [R, d_in].
        A: [r, d_in].
        rest: ‖old oldᵀ − I‖_F, a 0-d tensor, which does not change while A does; None computes it.
    """
    old = old.detach()
    rest = off_identity(old).norm() if rest is None else rest
    across = 2**0.5 * (old @ A.mT)  # Q Qᵀ has it twice
    return torch.linalg.vector_norm(torch.cat([rest[None], across.flatten(), off_identity(A).flatten()]))


def off_identity(A: Tensor) -> Tensor:
    """A Aᵀ − I."""
    return A @ A.mT - torch.eye(len(A), dtype=A.dtype, device=A.device)


@register
class LoracIpc(Summed):
    """State: B of every task as it was trained, ω, which layers are frozen; within a task Ī and U, in fp32, of all
    entries of A_i and B_i in the layers that are not. The adapter's B has ω in it.
    """

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

    def ranks(self, i: int) -> list[int]:
        return [B.shape[1] // len(omega) for B, omega in zip(self._list("B"), self._list("omega"), strict=True)]

    def init_adapter(self, i: int) -> None:
        self._learns_in = [not frozen for frozen in self._frozen()]
        old = [A[:0] for A in self.current.A] if i == 1 else self.merged.A
        self._old = [A.float() for A in old]
        self._rest = [off_identity(A).norm() for A in self._old]
        if i > 1:
            self.write(self.start(i))
            self.learn("omega", self._list("omega"))
            self._warn_if_crowded(i)
            self.route(self.with_old)
        self.state = {key: value for key, value in self.state.items() if key not in ("mean", "deviation")}
        if self.options.threshold and any(self._learns_in):
            zeros = [torch.zeros_like(p, dtype=torch.float32) for p in self._learning()]
            self.state = {**self.state, "mean": zeros, "deviation": zeros}

    def _warn_if_crowded(self, i: int) -> None:
        for layer, old, learns in zip(self.layers, self._old, self._learns_in, strict=True):
            rows, d_in = len(old) + len(layer.A), layer.A.shape[1]
            if self.options.penalty and learns and rows > d_in:
                warnings.warn(
                    f"method 'lorac_ipc', task {i}: {rows} rows of {layer.name} cannot be orthonormal, as d_in is "
                    f"{d_in}; the penalty only spreads them. Lower the rank, or set penalty=0",
                    stacklevel=3,
                )
                return

    def _learning(self) -> list[Tensor]:
        """A and B in training, of one layer after another, where m is 1."""
        layers = [layer for layer, learns in zip(self.layers, self._learns_in, strict=True) if learns]
        return [p for layer in layers for p in (layer.A, layer.B)]

    def _omega(self, n: int) -> Tensor:
        """ω of the old tasks in layer n: ``[K]``. A frozen layer's has a gradient of zero, as DDP waits for one."""
        kept, moves = self._list("omega")[n], self.options.omega_scale if self._learns_in[n] else 0.0
        return kept + moves * (self.learned["omega"][n] - kept)

    def with_old(self, layer: Layer) -> LoraTerms:
        n, r = self.index(layer), len(layer.A)
        omega = self._omega(n)
        m = omega.new_full((r,), float(self._learns_in[n]))
        A, B = torch.cat([self.merged.A[n], layer.A]), torch.cat([self._list("B")[n], layer.B], dim=1)
        return LoraTerms(A, B, layer.scale, gate=torch.cat([omega.repeat_interleave(r), m]))

    def loss_extra(self) -> Tensor | None:
        if not self.options.penalty:
            return None
        live = [n for n, learns in enumerate(self._learns_in) if learns]
        found = [off_orthonormal(self._old[n], self.layers[n].A.float(), self._rest[n]) for n in live]
        return self.options.penalty * torch.stack(found).sum() if found else None

    def after_backward(self) -> None:
        if "mean" not in self.state:
            return
        now = [
            torch.zeros_like(p, dtype=torch.float32) if p.grad is None else (p.float() * p.grad.float()).abs()
            for p in self._learning()
        ]
        mean = torch._foreach_lerp(self._list("mean"), now, 1 - self.options.beta1)
        apart = torch._foreach_abs(torch._foreach_sub(now, mean))
        deviation = torch._foreach_lerp(self._list("deviation"), apart, 1 - self.options.beta2)
        self.state = {**self.state, "mean": list(mean), "deviation": list(deviation)}

    # -- after it ------------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        new, frozen = self.current.clone(), self._frozen()
        A, B, omega = new.A, new.B, [A.new_ones(1) for A in new.A]
        if i > 1:
            A, B, old = list(self.merged.A), list(self._list("B")), self._list("omega")
            for n in range(len(self.layers)):
                if frozen[n]:
                    omega[n] = old[n]
                    continue
                A[n], B[n] = torch.cat([A[n], new.A[n]]), torch.cat([B[n], new.B[n]], dim=1)
                omega[n] = torch.cat([self._omega(n).detach(), omega[n]])
        frozen = self._with_the_most_important(frozen)
        self.state = {"B": B, "omega": omega, "frozen": torch.tensor(frozen, dtype=torch.int64)}
        scaled = [b * w.repeat_interleave(b.shape[1] // len(w)) for b, w in zip(B, omega, strict=True)]
        self.write(Factors(A, scaled))

    def _with_the_most_important(self, frozen: list[bool]) -> list[bool]:
        """Those frozen so far, and of the others the most important, as many as are the threshold share of all."""
        if "mean" not in self.state:  # threshold 0, all are frozen, or an adapter that was trained elsewhere
            return frozen
        products = torch._foreach_mul(self._list("mean"), self._list("deviation"))
        means = [float(product.mean()) for product in products]
        free = [n for n, is_frozen in enumerate(frozen) if not is_frozen]
        scores = {n: means[2 * k] + means[2 * k + 1] for k, n in enumerate(free)}
        count = int(self.options.threshold * len(frozen) + 1e-9)  # 0.29 · 100 is 28.999…
        chosen = sorted((n for n in free if scores[n] > 0), key=lambda n: -scores[n])[:count]
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
