"""SAPT-LoRA: a LoRA for every task, mixed sample by sample by attention of the prompt over one key a task.

*SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of Large Language Models*, Zhao et al.,
ACL 2024, arXiv 2401.08295, and the authors' public code (``llama_prompt.py``, ``cl_trainer.py``). With E the input
embeddings (d wide) of a sample's prompt::

    q = LayerNorm(SiLU(W_2 W_1 max_tokens E)),   W_1 [100, d], W_2 [d, 100]
    w = softmax(K q / √d),   K = [k_1 .. k_i],  each key begun uniform in [−1, 1]
    y = W x + Σ_t w_t s B_t A_t x      the same w in all layers

Task i trains A_i, B_i, k_i and the query net; the LoRAs and keys before it are frozen. As one concatenated LoRA this is
a gate ``[batch, 1, Σ r_t]``. The answer never enters the query: tokens with a label are left out, padding too, and
while tokens are generated with a cache the weights stay those of the prompt.

Attentive reflection holds the weights of old tasks while the query net goes on learning::

    loss + kl · Σ_{t<i} mean KL(w̄_t ‖ w(z)) over pseudo samples z of task t,   w̄_t their mean w after task t

(w̄_t is zero for later tasks.) The authors train a generator of pseudo samples. Here ``pseudo(t)`` gives them, called
once after task t; or ``replay`` of the task's own prompts are kept (ours); by default there are none and no such term
(ours). What is kept of a sample is max_tokens E, d numbers, since the embeddings are frozen.

Ours, too: a sample whose every token has a label, as in plain language modelling, is its own prompt; the term takes all
kept samples in every step, where the authors draw a batch; ``export`` writes the LoRAs with equal weights 1/T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mbf.methods._prompts import continues, prompt_tokens
from mbf.methods._summed import Summed
from mbf.methods.base import Batches, Factors, Layer, MethodInfo, Options, register
from mbf.ops import LoraTerms


class SaptOptions(Options):
    hidden: int = Field(100, ge=1, description="width of the query net")
    kl: float = Field(1.0, ge=0, description="weight of KL(stored attention ‖ now) over the samples of old tasks")
    pseudo: Callable[[int], Any] | None = Field(
        None, description="pseudo(t): batches of pseudo samples of task t (input_ids, attention_mask, labels if any)"
    )
    replay: int = Field(0, ge=0, description="prompts kept of each task's own data in place of pseudo samples (ours)")

    @model_validator(mode="after")
    def _one_source(self) -> SaptOptions:
        if self.replay and self.pseudo is not None:
            raise ValueError("replay keeps prompts where pseudo would give samples; set one of the two")
        return self


class Pending(torch.autograd.Function):
    """w as it is; its graph counts as pending until it is gone or differentiated."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, pending: WeakSet[Any]) -> Tensor:
        ctx.pending = pending
        pending.add(ctx)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.pending.discard(ctx)
        return gradient, None


@register
class Sapt(Summed):
    """State: ``keys`` [T, d]; ``query``, the net's W_1, W_2 and the norm's weight and bias; ``ranks``; for each task
    with samples ``pooled<t>`` [n, d] and ``target<t>`` [t]."""

    name = "sapt"
    Options = SaptOptions
    options: SaptOptions
    learns = True
    merges_alone = False
    info = MethodInfo(
        title="Shared attention over LoRAs (SAPT-LoRA)",
        trained="A_i, B_i, k_i, query net",
        frozen="W, old A, B, k",
        merge="none: Σ_t w_t(prompt) B_t A_t",
        memory="O(T P + T d), samples O(T n)",
        data_free=False,
        foldable=False,
        grade="CODE",
        source="arXiv 2401.08295",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs_data = self.options.replay > 0
        # Of the samples in the last forward, [batch, tasks], by whether autograd records: what runs between a loss and
        # its backward without it, such as a metric, does not change what layers that are recomputed then read.
        self._weights: dict[bool, Tensor] = {}
        self._pending: WeakSet[Any] = WeakSet()  # forwards that may yet have a backward
        self._unrecorded: set[str] = set()  # layers that the last of them ran without autograd

    # -- attention -----------------------------------------------------------------------------------------------------

    @property
    def _embeddings(self) -> nn.Module:
        found = getattr(self.model, "get_input_embeddings", lambda: None)()
        if found is None:
            raise ValueError(
                "sapt weighs LoRAs by a prompt's input embeddings, and the model's get_input_embeddings() gave none; "
                "use a language model of transformers, or a method that does not read prompts"
            )
        module: nn.Module = found
        return module

    @torch.no_grad()
    def pooled(self, inputs: Mapping[str, Any]) -> Tensor:
        """max E over the prompt's tokens, fp32 [batch, d], for the keyword arguments of a forward."""
        embedded = inputs.get("inputs_embeds")
        if embedded is None:
            embeddings = self._embeddings
            embedded = embeddings(inputs["input_ids"].to(next(embeddings.parameters()).device))
        rows, length = embedded.shape[:2]
        prompt = prompt_tokens(inputs, length, rows).to(embedded.device)
        values: Tensor = embedded.float().masked_fill(~prompt[..., None], -math.inf).amax(1)
        return values

    def scores(self, pooled: Tensor) -> Tensor:
        """K q / √d, [batch, tasks]; inside a task with what is being learnt."""
        W_1, W_2, weight, bias = self.learned.get("query") or self._list("query")
        q = F.layer_norm(F.silu(F.linear(F.linear(pooled.to(W_1), W_1), W_2)), weight.shape, weight, bias)
        return q @ self._keys().mT / math.sqrt(q.shape[1])

    def attention(self, pooled: Tensor) -> Tensor:
        """w, [batch, tasks]."""
        return self.scores(pooled).softmax(1)

    def _keys(self) -> Tensor:
        old = self.state.get("keys")
        parts = [old] if isinstance(old, Tensor) else []
        return torch.cat([*parts, *(key[None] for key in self.learned.get("key", []))])

    def _list(self, name: str) -> list[Tensor]:
        found = self.state[name]
        assert isinstance(found, list)
        return found

    def _see(self, inputs: Mapping[str, Any]) -> None:
        if self.terms is None or continues(inputs.get("past_key_values")):
            return
        weights = self.attention(self.pooled(inputs))
        self._weights[False] = weights
        if torch.is_grad_enabled():
            if weights.requires_grad:
                weights = Pending.apply(weights, self._pending)
            self._weights = {True: weights, False: weights}
            self._unrecorded = set()

    def forward_mod(self, step: int, inputs: Mapping[str, Any]) -> None:
        self._see(inputs)

    def inference_adapter(self, inputs: Mapping[str, Any]) -> None:
        self._see(inputs)

    def gated(self, layer: Layer) -> LoraTerms:
        """All LoRAs as one, each with its weight for the sample."""
        tasks = len(self._keys())
        weights = self._weights.get(torch.is_grad_enabled(), self._weights.get(False))
        if weights is None or weights.shape[1] != tasks:
            raise ValueError(
                "sapt weighs LoRAs by the prompt, and saw none since the last task: let the model's own forward run, "
                "from the prompt on and not from a cache that was filled before"
            )
        inside = bool(self.learned) and tasks > 1
        A, B, scale, *_ = self.with_old(layer) if inside else LoraTerms(layer.A, layer.B, layer.scale)
        self._check_recomputed(layer, weights)
        gate = weights.repeat_interleave(A.shape[0] // tasks, dim=1)[:, None]
        return LoraTerms(A, B, scale, gate=gate.to(A.device))

    def _check_recomputed(self, layer: Layer, weights: Tensor) -> None:
        """Gradient checkpointing runs a layer again inside of a backward, where its weights must be those of then."""
        if torch.compiler.is_compiling():
            return
        if not torch.is_grad_enabled():
            if weights is self._weights.get(True):  # not those of a forward without autograd
                self._unrecorded.add(layer.name)
        elif weights.requires_grad and torch._C._current_graph_task_id() >= 0:
            if layer.name in self._unrecorded:
                raise ValueError(
                    "sapt's attention is one for all layers, which gradient checkpointing with use_reentrant=True "
                    "cannot differentiate; pass use_reentrant=False"
                )
            if len(self._pending) > 1:
                raise ValueError(
                    f"sapt with gradient checkpointing: {len(self._pending)} forwards wait for their backward, and the "
                    "layers that are recomputed cannot tell whose weights they had; call backward after each of them"
                )

    # -- a task --------------------------------------------------------------------------------------------------------

    def before_task(self, i: int, data: Batches | None) -> None:
        if not self.options.replay:
            return
        if data is None:
            raise ValueError(
                f"sapt with replay={self.options.replay} keeps prompts of each task; pass its batches, "
                "task(name, data=...), or set replay=0"
            )
        self.state = {**self.state, "reservoir": self._reservoir(data, i)}

    def init_adapter(self, i: int) -> None:
        super().init_adapter(i)
        self._learn()
        self._weights = {}
        self.route(self.gated)

    def _learn(self) -> None:
        """A new key, and the query net from where it is."""
        width = next(self._embeddings.parameters())
        d, device = width.shape[1], width.device
        self.learn("key", [torch.empty(d).uniform_(-1, 1).to(device)])
        query = self.state.get("query")
        if not isinstance(query, list):
            W_1, W_2 = torch.empty(self.options.hidden, d), torch.empty(d, self.options.hidden)
            for W in (W_1, W_2):
                nn.init.kaiming_uniform_(W, a=math.sqrt(5))
            query = [t.to(device) for t in (W_1, W_2, torch.ones(d), torch.zeros(d))]
        self.learn("query", query)

    def loss_extra(self) -> Tensor | None:
        tasks = len(self._keys())
        if not self.options.kl:
            return None
        penalties = []
        for t in range(1, tasks):
            pooled, target = self.state.get(f"pooled{t}"), self.state.get(f"target{t}")
            if isinstance(pooled, Tensor) and isinstance(target, Tensor):
                wanted = F.pad(target, (0, tasks - t))
                log_w = self.scores(pooled).log_softmax(1)
                penalties.append((torch.xlogy(wanted, wanted) - wanted * log_w).sum(1).mean())
        return self.options.kl * torch.stack(penalties).sum() if penalties else None

    def after_task(self, i: int, data: Batches | None) -> None:
        if not self.learned:
            self._learn()  # an adapter that was trained elsewhere has no key yet
        kept = {name: value for name, value in self.state.items() if name != "reservoir"}
        samples = self.state.get("reservoir") if self.options.pseudo is None else self._pseudo(i)
        kept["keys"] = self._keys().detach().clone()
        kept["query"] = [p.detach().clone() for p in self.learned["query"]]
        kept["ranks"] = torch.tensor(self.ranks(i) if i > 1 else [A.shape[0] for A in self.current.A])
        if isinstance(samples, Tensor):
            kept[f"pooled{i}"] = samples
            kept[f"target{i}"] = self.attention(samples).mean(0).detach()
        super().after_task(i, data)
        self.state = kept
        self._weights = {}

    def select(self, task: int | None) -> None:
        self.route(self.gated)

    def shipped(self) -> Factors:
        """Every LoRA with weight 1/T: what the attention gives where no key fits better than another."""
        now = self.current
        return Factors(now.A, [B / len(self._keys()) for B in now.B])

    # -- samples -------------------------------------------------------------------------------------------------------

    def _pseudo(self, i: int) -> Tensor:
        assert self.options.pseudo is not None
        rows = [self.pooled(batch) for batch in self.options.pseudo(i)]
        if not rows:
            raise ValueError(f"sapt: pseudo({i}) gave no batch; give samples of the task, or leave the option out")
        return torch.cat(rows)

    def _reservoir(self, data: Iterable[Mapping[str, Any]], i: int) -> Tensor:
        """``replay`` rows of the task, each with the same chance, drawn by a generator that its number seeds."""
        generator, kept, seen = torch.Generator().manual_seed(i), list[Tensor](), 0
        for batch in data:
            for row in self.pooled(batch):
                seen += 1
                place = len(kept)
                if place == self.options.replay:
                    place = int(torch.randint(seen, (), generator=generator))
                    if place < len(kept):
                        kept[place] = row
                else:
                    kept.append(row)
        if not kept:
            raise ValueError(
                f"sapt with replay={self.options.replay} keeps prompts of each task, and its data gave no batch; pass "
                "batches that can be gone through more than once (a list, a DataLoader), not an iterator"
            )
        return torch.stack(kept)
