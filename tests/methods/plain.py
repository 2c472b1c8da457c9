"""Layers of plain tensors that satisfy ``mbf.methods.Layer``, and a task loop without a learner: rules tested alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mbf.methods import Factors, Method, get
from mbf.ops import BranchTerms, LoraTerms

WIDTHS = ((24, 40), (24, 40), (33, 17))  # d_out, d_in


class PlainLayer(nn.Module):
    """A linear layer with a branch, in plain torch: ``forward`` computes with the route, if there is one."""

    def __init__(self, name: str, d_out: int, d_in: int, r: int, scale: float = 2.0) -> None:
        super().__init__()
        self.name = name
        self.scale = scale
        self.A = nn.Parameter(torch.randn(r, d_in) / d_in**0.5)
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.W = torch.randn(d_out, d_in) / d_in**0.5
        self.terms: Callable[[PlainLayer], BranchTerms] | None = None

    @property
    def module(self) -> nn.Module:
        return self

    def weight(self) -> Tensor:
        return self.W.float().clone()

    def forward(self, x: Tensor) -> Tensor:
        terms = self.terms(self) if self.terms else LoraTerms(self.A, self.B, self.scale)
        return terms.accumulate(x @ self.W.T, x)

    def delta(self) -> Tensor:
        """dW of the layer as it computes now, column by column: ``[d_out, d_in]``."""
        with torch.no_grad():
            x = torch.eye(self.W.shape[1])
            return (self(x) - x @ self.W.T).T

    def values(self) -> tuple[Tensor, Tensor]:
        return self.A.data, self.B.data

    def write(self, A: Tensor, B: Tensor) -> None:
        self.A = nn.Parameter(A.detach().clone())
        self.B = nn.Parameter(B.detach().clone())

    def route(self, terms: Callable[[PlainLayer], BranchTerms] | None, *, own_operator: bool = False) -> None:
        self.terms = terms


def method(name: str, r: int = 4, **options: object) -> Method:
    rule = get(name)(**options)
    rule.layers = [PlainLayer(f"layer{n}", *width, r) for n, width in enumerate(WIDTHS)]
    rule.model = PlainModel(rule.layers)
    return rule


class PlainModel(nn.Module):
    """The layers side by side: layers of one width read one x, cut from ``input_ids`` as numbers.

    ``forward(inputs, targets)``: inputs ``[batch, tokens, widest d_in]``; the loss is half the squared distance of all
    outputs from ``targets`` (zero by default), averaged over the batch. Methods that read prompts find input
    embeddings, always the same.
    """

    def __init__(self, layers: list[PlainLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.embeddings = nn.Embedding.from_pretrained(torch.randn(13, 6, generator=torch.Generator().manual_seed(0)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, inputs: Tensor, targets: list[Tensor] | None = None, **_: object) -> SimpleNamespace:
        cuts: dict[int, Tensor] = {}
        for layer in self.layers:
            cuts.setdefault(layer.A.shape[1], inputs[..., : layer.A.shape[1]].contiguous())
        outputs = [layer(cuts[layer.A.shape[1]]) for layer in self.layers]
        errors = outputs if targets is None else [y - t for y, t in zip(outputs, targets, strict=True)]
        loss = torch.stack([e.square().sum() for e in errors]).sum() / (2 * len(inputs))
        return SimpleNamespace(outputs=outputs, loss=loss)


def data(seed: int, batches: int = 3, rows: int = 4, tokens: int = 5) -> list[dict[str, Tensor]]:
    """A task's batches for ``PlainModel``, inputs of full rank and unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(d_in for _, d_in in WIDTHS)
    energy = torch.linspace(2.0, 0.1, widest)[torch.randperm(widest, generator=generator)]
    return [{"inputs": torch.randn(rows, tokens, widest, generator=generator) * energy} for _ in range(batches)]


def random_factors(rule: Method) -> Factors:
    """A fine-tuned LoRA of the adapter's present shapes, far from any start, B never zero."""
    return Factors(
        [torch.randn_like(layer.A) for layer in rule.layers], [torch.randn_like(layer.B) for layer in rule.layers]
    )


def begin(rule: Method, i: int) -> list[nn.Parameter]:
    """What the learner does before training; returns what trains."""
    rule.route(None)
    rule.merged = rule.current.clone()
    rule.before_task(i, data(i))
    with torch.no_grad():
        rule.init_adapter(i)
    trains_A, trains_B = rule.trains(i)
    for layer in rule.layers:
        layer.A.requires_grad_(trains_A)
        layer.B.requires_grad_(trains_B)
    own = [p for parameters in rule.learned.values() for p in parameters]
    return [p for layer in rule.layers for p in (layer.A, layer.B) if p.requires_grad] + own


def end(rule: Method, i: int) -> None:
    """What the learner does after it."""
    rule.route(None)
    with torch.no_grad():
        rule.after_task(i, data(i))
    rule.learned = {}
    rule.select(None)


def learn(rule: Method, i: int, finetuned: Factors | None = None) -> tuple[Factors, Factors, Factors]:
    """One task whose training ends at ``finetuned`` (random by default); returns (start, finetuned, merged)."""
    begin(rule, i)
    start = rule.current.clone()
    finetuned = finetuned or random_factors(rule)
    for layer, A, B in zip(rule.layers, finetuned.A, finetuned.B, strict=True):
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
    end(rule, i)
    return start, finetuned.clone(), rule.current.clone()


def deltas(factors: Factors) -> list[Tensor]:
    return [B @ A for A, B in zip(factors.A, factors.B, strict=True)]


def assert_same(a: list[Tensor], b: list[Tensor], **tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))
