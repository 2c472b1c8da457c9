"""The emulated lora_linear and lora_accumulate as functions that torch differentiates, for the tests of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mbf.ops import _branch
from mbf.ops._operands import prepare

DTYPES = {  # of A and B, of the base
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32 on bf16": (torch.float32, torch.bfloat16),
    "fp32 on fp16": (torch.float32, torch.float16),
}
TERMS = {
    "scale": 1.0,
    "gate": None,
    "mix": None,
    "dropout_p": 0.0,
    "seed": None,
    "merged_B": None,
    "merge_weight": None,
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block memory that torch allocates holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def branch_of(x: Tensor, A: Tensor, B: Tensor, terms: dict[str, Any]) -> tuple[Any, ...]:
    """The operands of the schema from the names of ``lora_linear``."""
    return tuple(prepare(x, A, B, *(terms.get(name, default) for name, default in TERMS.items())))


def linear(cuda: Any) -> Callable[..., Tensor]:
    """``lora_linear`` by the library's operators."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *branch: Any) -> Tensor:
            y, h = cuda.lora_linear(x, weight, bias, *branch)
            _branch.save(ctx, h, branch, x, weight)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            h, branch, (x, weight) = _branch.saved(ctx)
            found = cuda.lora_linear_backward(dy, h, x, weight, *branch, _branch.needs(ctx, 3))
            return _branch.spread(found)

    def function(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, **terms: Any) -> Tensor:
        return Linear.apply(x, weight, bias, *branch_of(x, A, B, terms))

    return function


def accumulating(cuda: Any) -> Callable[..., Tensor]:
    """``lora_accumulate`` by the library's operators."""

    class Accumulate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, x: Tensor, *branch: Any) -> Tensor:
            out, h = cuda.lora_accumulate(y, x, *branch)
            _branch.save(ctx, h, branch, x)
            return out

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            h, branch, (x,) = _branch.saved(ctx)
            found = cuda.lora_accumulate_backward(dy, h, x, *branch, _branch.needs(ctx, 2)[1:])
            return (dy, *_branch.spread(found))

    def function(y: Tensor, x: Tensor, A: Tensor, B: Tensor, **terms: Any) -> Tensor:
        return Accumulate.apply(y, x, *branch_of(x, A, B, terms))

    return function


def passes(cuda: Any, case: dict[str, Any], needs: Sequence[bool] = (True,) * 9, **terms: Any) -> list[Tensor | None]:
    """y, h and the nine gradients of ``lora_linear`` for a fixed dy."""
    case = {**case, **terms}
    x, weight, bias = case["x"], case["weight"], case.get("bias")
    branch = branch_of(x, case["A"], case["B"], case)
    y, h = cuda.lora_linear(x, weight, bias, *branch)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    there = [True, True, bias is not None, True, True, *(t is not None for t in (*branch[3:5], *branch[7:9]))]
    asked = [need and has for need, has in zip(needs, there, strict=True)]
    return [y, h, *cuda.lora_linear_backward(dy, h, x, weight, *branch, asked)]


def assert_same_bits(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a is None) == (b is None), n
        if a is not None and b is not None:
            assert a.dtype == b.dtype and torch.equal(a, b), f"result {n} differs"
