"""AM-LoRA-style: a LoRA for every task, mixed token by token by a learnt attention over what they compute.

*Learning Attentional Mixture of LoRAs for Language Model Continual Learning*, arXiv 2409.19611. Only its abstract and
a review were at hand, no code, so this is a method after it, not a copy of it. Known are: a LoRA a task, the old ones
frozen; an "Attentional Selector" that scores each task's LoRA feature by a dense layer, softmax over the scores, an L1
term that makes the attention sparse, a zero LoRA, and no task label at inference. The rest is ours. With
h_k = s B_k A_k x for the tasks k ≤ i, and h_0 = 0, the choice of none::

    e_k = V_k h_k,   s_k = w_kᵀ silu(e_k),   s_0 = 0,   y = W x + Σ_k softmax(s)_k h_k
    loss + l1 · mean |s_k|  over tokens, tasks and layers

V_k ``[hidden, d_out]``, w_k ``[hidden]``, one pair a layer and task. The L1 norm of a softmax is always 1, so the term
is on the scores before it; its gradient is added where they are made, in every backward. As V_k h_k = s (V_k B_k) (A_k
x), no h_k is formed: scores need A x alone, and the weights then are a gate for each token on the concatenated LoRA.
``scores="A"`` scores A_k x itself, V_k ``[hidden, r]``, without the way through B.

Scores are of x as it comes; dropout acts on the mixed LoRA. With B_i = 0 a new task's score is 0, so the first task
starts from the function of the base, and a later one takes its share of the attention at once.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import lora_accumulate


class AmLoraOptions(Options):
    hidden: int = Field(64, ge=1, description="width of the dense layer that scores")
    scores: Literal["BA", "A"] = Field("BA", description="what is scored: the LoRA's output, or A x")
    none: bool = Field(True, description="the zero LoRA among the choices")
    l1: float = Field(1e-3, ge=0, description="weight of mean |score| in the loss")
    selector: Literal["all", "new"] = Field("all", description="whose V_k, w_k train: every task's, or the new one's")


class AddL1(torch.autograd.Function):
    """s as it is; backward adds the gradient of ``weight · Σ |s|``."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(s)
        ctx.weight = weight
        return s.view_as(s)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return gradient + ctx.weight * s.sign(), None


class Attention(NamedTuple):
    """The terms of a forward: the LoRAs of K tasks and what scores them.

    Attributes:
        A: [K r, d_in].
        B: [d_out, K r].
        scale: s.
        V: [K, hidden, d_out], or [K, hidden, r] where A x is scored.
        w: [K, hidden].
        outputs: whether the LoRAs' outputs are scored, or A x.
        none: whether h_0 = 0 is among the choices.
        l1: weight of mean |s|; 0 outside of training.
    """

    A: Tensor
    B: Tensor
    scale: float
    V: Tensor
    w: Tensor
    outputs: bool = True
    none: bool = True
    l1: float = 0.0

    def scores(self, x: Tensor) -> Tensor:
        """s_k, ``[..., K]``, for x ``[..., d_in]``."""
        K = len(self.w)
        z = (x.to(self.A.dtype) @ self.A.mT).unflatten(-1, (K, -1))
        U = self.V
        if self.outputs:
            U = self.scale * U @ self.B.unflatten(1, (K, -1)).transpose(0, 1)
        return (F.silu(torch.einsum("...kr,khr->...kh", z, U.to(z.dtype))) * self.w).sum(-1)

    def weights(self, s: Tensor) -> Tensor:
        """softmax(s) ``[..., K]`` without the share of none."""
        choices = F.pad(s, (0, 1)) if self.none else s
        return choices.softmax(-1)[..., : s.shape[-1]]

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``y + Σ_k softmax(s)_k h_k``."""
        s = self.scores(x)
        if self.l1:
            s = AddL1.apply(s, self.l1 / max(1, s.numel()))
        gate = self.weights(s).repeat_interleave(len(self.A) // len(self.w), -1).to(self.A.dtype)
        return lora_accumulate(y, x, self.A, self.B, scale=self.scale, gate=gate, dropout_p=dropout_p)


@register
class AmLora(Summed):
    """State: V and w of every layer, for all tasks. The adapter holds the concatenated LoRAs.

    No one LoRA does what they do together; ``shipped`` is their mean, as equal scores give it.
    """

    name = "amlora"
    Options = AmLoraOptions
    options: AmLoraOptions
    info = MethodInfo(
        title="Attentional mixture of LoRAs (AM-LoRA-style)",
        trained="A_i, B_i, selector",
        frozen="W, old A, B",
        merge="none (attention for each token)",
        memory="O(TP) + O(T d_out)",
        foldable=False,
        grade="ABS",
        source="arXiv 2409.19611",
    )
    learns = True
    own_operator = True
    adopts = False
    merges_alone = False
    _new = True

    def init_adapter(self, i: int) -> None:
        self._new = i > 1
        if i > 1:
            self.write(self.start(i))
        V, w = self._kept()
        fresh_V, fresh_w = [], []
        for layer in self.layers:
            width = len(layer.B) if self.options.scores == "BA" else layer.A.shape[0]
            fresh_V.append(_uniform(1, self.options.hidden, width).to(layer.A))
            fresh_w.append(_uniform(1, self.options.hidden).to(layer.A))
        if self.options.selector == "all":
            fresh_V = [torch.cat(pair) for pair in zip(V, fresh_V, strict=True)] if i > 1 else fresh_V
            fresh_w = [torch.cat(pair) for pair in zip(w, fresh_w, strict=True)] if i > 1 else fresh_w
        self.learn("V", fresh_V)
        self.learn("w", fresh_w)
        self.route(self._training)

    def _kept(self) -> tuple[list[Tensor], list[Tensor]]:
        V, w = self.state.get("V", []), self.state.get("w", [])
        assert isinstance(V, list) and isinstance(w, list)
        return V, w

    def _selector(self, n: int) -> tuple[Tensor, Tensor]:
        """V and w of layer n for all tasks, the one in training among them."""
        V, w = (self.learned[name][n] for name in ("V", "w"))
        if self.options.selector == "new" and self._new:
            old_V, old_w = self._kept()
            return torch.cat([old_V[n], V]), torch.cat([old_w[n], w])
        return V, w

    def _training(self, layer: Layer) -> Attention:
        A: Tensor = layer.A
        B: Tensor = layer.B
        n = self.index(layer)
        if self._new:
            A, B = torch.cat([self.merged.A[n], A]), torch.cat([self.merged.B[n], B], dim=1)
        l1 = self.options.l1 / len(self.layers) if layer.module.training else 0.0
        return Attention(A, B, layer.scale, *self._selector(n), self.options.scores == "BA", self.options.none, l1)

    def after_task(self, i: int, data: Batches | None) -> None:
        pairs = [self._selector(n) for n in range(len(self.layers))]
        super().after_task(i, data)
        self.state = {
            **self.state,
            "V": [V.detach().clone() for V, _ in pairs],
            "w": [w.detach().clone() for _, w in pairs],
        }

    def select(self, task: int | None) -> None:
        """The attention over all tasks, with or without a label."""
        V, w = self._kept()

        def terms(layer: Layer) -> Attention:
            n = self.index(layer)
            outputs = self.options.scores == "BA"
            return Attention(layer.A, layer.B, layer.scale, V[n], w[n], outputs, self.options.none)

        self.route(terms)

    def shipped(self) -> Factors:
        now, (_, w) = self.current, self._kept()
        return Factors(now.A, [B / (len(w_n) + self.options.none) for B, w_n in zip(now.B, w, strict=True)])


def _uniform(*shape: int) -> Tensor:
    """Uniform in ±1/√(inputs), as ``torch.nn.Linear`` starts."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1])
