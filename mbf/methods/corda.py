"""CorDA: an adapter made of the components of W that given inputs use least, so that training leaves the rest alone.

*CorDA: Context-Oriented Decomposition Adaptation of Large Language Models*, Yang et al., arXiv 2406.05223, and the
authors' code (``cordalib/decomposition.py``; PEFT has it as ``init_lora_weights="corda"``). With C = mean x xᵀ of a
layer's input over calibration data, before a task::

    C ← C + λ mean(diag C) I,   λ = 0.01, doubled until ‖C C⁻¹ − I‖ < 0.05
    W_i C = U S Vᵀ,   so   W_i = U S (Vᵀ C⁻¹)
    s B_0 A_0 = U_r S_r (V_rᵀ C⁻¹),   B_0 = U_r √(S_r / s),   A_0 = √(S_r / s) V_rᵀ C⁻¹
    y = (W_i − s B_0 A_0) x + s B A x,   B, A trained from B_0, A_0

where r are the smallest singular values in the knowledge-preserving mode, ‖s B_0 A_0 C‖² = Σ S_r², and the largest in
the instruction-previewed one. As A and B change, what W_i does to the inputs behind C changes least, or most.

It is a baseline of the SLAO paper, whose text leaves its use for task after task open. Ours:

- W_i is the base W and all that was learnt so far, and is decomposed again before each task. W itself is never changed:
  the layer computes W x + s [B_<i, B, −B_0] [A_<i; A; A_0] x, and after the task B A − B_0 A_0, of rank 2r, joins the
  sum. The adapter's dropout acts on that difference, so training starts from exactly W_i x.
- Knowledge-preserving calibration is on the old tasks: C is the sum of their C, each measured once, with the model as
  merged after it. While there is none, and always in the instruction-previewed mode, it is on the task's own data.
- C is the mean over tokens, all alike; the authors first divide the inputs of every sample by their max |x|. It is then
  divided by mean(diag C): B_0 A_0 does not depend on that, the balance between B_0 and A_0 does.
- The first token of a row is left out (``skip``), and all of it is computed in fp64: the smallest components of W C are
  below what fp32 resolves.

W_i C, d_out × d_in, is formed, one layer at a time: the decomposition is of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mbf.methods._passes import Moments, input_moments
from mbf.methods._subspaces import signed
from mbf.methods._summed import Summed, bounded
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms

Mode = Literal["kpm", "ipm"]


class CordaOptions(Options):
    mode: Mode = Field(
        "kpm",
        description="trains the r smallest components (knowledge-preserving) or largest (instruction-previewed)",
    )
    damping: float = Field(0.01, gt=0, description="λ of C + λ mean(diag C) I, doubled while C cannot be inverted")
    calibration: Callable[[int], Batches] | None = Field(
        None, description="ours: batches to calibrate on before task i, instead of the tasks' own; not stored"
    )
    batches: int | None = Field(None, ge=1, description="batches to look at for C; None is all")
    skip: int = Field(1, ge=0, description="ours: tokens left out of C at the start of each row")


def damped(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C over its mean diagonal, with the least damping that lets it be inverted, and its inverse; in fp64.

    Args:
        C: [d, d], symmetric and positive semi-definite. A zero one stands for the identity.
        damping: λ to begin with.

    Raises:
        ValueError: C has inf or NaN.
    """
    if not bool(torch.isfinite(C).all()):
        raise ValueError("the calibration inputs of a layer have inf or NaN; run the model in a wider dtype")
    C = C.double()
    identity, mean = torch.eye(C.shape[0], dtype=C.dtype, device=C.device), C.diagonal().mean()
    if not mean > 0:
        return identity, identity
    while True:
        regular = C / mean + damping * identity
        inverse, status = torch.linalg.inv_ex(regular)
        if not status and torch.dist(regular @ inverse, identity) < 0.05:
            return regular, inverse
        damping *= 2


def components(W: Tensor, C: Tensor, inverse: Tensor, r: int, mode: Mode) -> tuple[Tensor, Tensor]:
    """The r components of W = U S (Vᵀ C⁻¹), W C = U S Vᵀ, with the smallest S or the largest.

    Args:
        W: [d_out, d_in].
        C, inverse: [d_in, d_in], symmetric.
        r: at most min(d_out, d_in).
        mode: which ones.

    Returns:
        √S_r V_rᵀ C⁻¹ [r, d_in] and U_r √S_r [d_out, r], in the dtype of W; each left vector with its largest entry
        positive.
    """
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(len(S) - r, None) if mode == "kpm" else slice(r)
    U, S, Vh = U[:, chosen], S[chosen], Vh[chosen]
    positive = signed(U)
    signs = (positive * U).sum(0).sign()  # 1 or −1 for each unit vector
    return (S.sqrt() * signs)[:, None] * (Vh @ inverse), positive * S.sqrt()


@register
class Corda(Summed):
    """Re-decomposes before each task, adds after it. State: C, d_in × d_in of each distinct layer input, in fp32.

    With ``calibration``, which needs no data of the tasks, or in the instruction-previewed mode, no C is kept.
    """

    name = "corda"
    into_weight = True
    needs_data = True
    merges_alone = False
    Options = CordaOptions
    options: CordaOptions
    info = MethodInfo(
        title="Context-oriented decomposition (CorDA)",
        trained="A, B: r components of W",
        frozen="the rest of W",
        merge="W ← W + B A − B_0 A_0, decomposed again",
        memory="O(d²) + O(TP), at most O(d_out d_in)",
        grade="CODE",
        source="arXiv 2406.05223",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs_data = self.options.calibration is None
        self._continues = False
        self._moments: Moments | None = None

    # -- before a task -------------------------------------------------------------------------------------------------

    def before_task(self, i: int, data: Batches | None) -> None:
        for layer, r in zip(self.layers, self.ranks(i), strict=True):
            if r > (most := min(layer.A.shape[1], layer.B.shape[0])):
                raise ValueError(
                    f"method 'corda' takes r of the {most} components of {layer.name}, r is {r}; use r ≤ {most}"
                )
        self._moments = self._calibrate(i, data)

    def _calibrate(self, i: int, data: Batches | None) -> Moments:
        """C of every distinct input, for task i."""
        kept, of = self.state.get("C"), self.state.get("of")
        if self.options.calibration is None and isinstance(kept, list) and isinstance(of, Tensor):
            return Moments(kept, of.tolist(), 0)
        batches = data if self.options.calibration is None else self.options.calibration(i)
        return input_moments(self, batches, skip=self.options.skip, limit=self.options.batches)

    def start(self, i: int) -> Factors:
        """B_0, A_0 of every layer."""
        assert self._moments is not None
        moments, self._moments = self._moments, None
        start, inverted, pair = Factors(), -1, (torch.empty(0), torch.empty(0))
        for n, (layer, place, r) in enumerate(zip(self.layers, moments.of, self.ranks(i), strict=True)):
            if place != inverted:
                inverted, pair = place, damped(moments.C[place], self.options.damping)
            W = layer.weight().double()
            if self._continues:
                W += layer.scale * (self.merged.B[n].double() @ self.merged.A[n].double())
            A, B = components(W, *pair, r, self.options.mode)
            start.A.append((A / layer.scale**0.5).to(layer.A))
            start.B.append((B / layer.scale**0.5).to(layer.B))
        return start

    def init_adapter(self, i: int) -> None:
        self._continues = i > 1
        start = self.start(i)
        self.write(start)
        # As the adapter holds them: what is taken out of W is then what training starts from, whatever the dtype.
        taken = self.current.clone()
        self.state = {**self.state, "taken": Factors(taken.A, [-B for B in taken.B])}
        self.route(self.with_old)

    def with_old(self, layer: Layer) -> LoraTerms:
        """The sum so far, the adapter, and what it has taken out of W."""
        n, taken = self.index(layer), self._taken()
        A, B = [layer.A, taken.A[n]], [layer.B, taken.B[n]]
        if self._continues:
            A, B = [self.merged.A[n], *A], [self.merged.B[n], *B]
        return LoraTerms(torch.cat(A), torch.cat(B, dim=1), layer.scale)

    # -- after it ------------------------------------------------------------------------------------------------------

    def after_task(self, i: int, data: Batches | None) -> None:
        if "taken" not in self.state:  # an adapter that was trained elsewhere stands for task 1: it is the sum so far
            self.state = {"ranks": torch.tensor(self.ranks(1))}
            return
        taken, trained, ranks = self._taken(), self.current, self.ranks(i)
        change = Factors(
            [torch.cat([A, A_0]) for A, A_0 in zip(trained.A, taken.A, strict=True)],
            [torch.cat([B, minus], dim=1) for B, minus in zip(trained.B, taken.B, strict=True)],
        )
        if i > 1:
            self.append(change)
        else:
            pairs = [bounded(A, B) for A, B in zip(change.A, change.B, strict=True)]
            self.write(Factors([A for A, _ in pairs], [B for _, B in pairs]))
        self.state = {k: v for k, v in self.state.items() if k != "taken"} | {"ranks": torch.tensor(ranks)}
        if self.options.mode == "kpm" and self.options.calibration is None:
            self._remember(data)

    def _remember(self, data: Batches | None) -> None:
        """Add the task's C, each task counting alike."""
        new = input_moments(self, data, skip=self.options.skip, limit=self.options.batches)
        old = self.state.get("C")
        C = [a + b for a, b in zip(old, new.C, strict=True)] if isinstance(old, list) else new.C
        self.state = {**self.state, "C": C, "of": torch.tensor(new.of)}

    def _taken(self) -> Factors:
        """A_0 and −B_0 of every layer."""
        taken = self.state["taken"]
        assert isinstance(taken, Factors)
        return taken
