"""Layers of plain tensors that satisfy ``mbf.methods.Layer``, and a task loop without a learner: rules tested alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mbf.methods import Factors, Method, get

WIDTHS = ((24, 40), (24, 40), (33, 17))  # d_out, d_in


class PlainLayer:
    """W is not needed: the rules read and write A and B alone."""

    def __init__(self, name: str, d_out: int, d_in: int, r: int, scale: float = 2.0) -> None:
        self.name = name
        self.scale = scale
        self.A = nn.Parameter(torch.randn(r, d_in) / d_in**0.5)
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.terms: Callable | None = None

    def values(self) -> tuple[Tensor, Tensor]:
        return self.A.data, self.B.data

    def write(self, A: Tensor, B: Tensor) -> None:
        self.A = nn.Parameter(A.detach().clone())
        self.B = nn.Parameter(B.detach().clone())

    def route(self, terms: Callable | None) -> None:
        self.terms = terms


def method(name: str, r: int = 4, **options: object) -> Method:
    rule = get(name)(**options)
    rule.layers = [PlainLayer(f"layer{n}", *width, r) for n, width in enumerate(WIDTHS)]
    return rule


def random_factors(rule: Method) -> Factors:
    """A fine-tuned LoRA of the adapter's present shapes, far from any start, B never zero."""
    return Factors(
        [torch.randn_like(layer.A) for layer in rule.layers], [torch.randn_like(layer.B) for layer in rule.layers]
    )


def learn(rule: Method, i: int, finetuned: Factors | None = None) -> tuple[Factors, Factors, Factors]:
    """One task whose training ends at ``finetuned`` (random by default); returns (start, finetuned, merged)."""
    rule.merged = rule.current.clone()
    rule.init_adapter(i)
    start = rule.current.clone()
    finetuned = finetuned or random_factors(rule)
    for layer, A, B in zip(rule.layers, finetuned.A, finetuned.B, strict=True):
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
    rule.route(None)
    rule.after_task(i, None)
    return start, finetuned.clone(), rule.current.clone()


def deltas(factors: Factors) -> list[Tensor]:
    return [B @ A for A, B in zip(factors.A, factors.B, strict=True)]


def assert_same(a: list[Tensor], b: list[Tensor], **tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))
