"""The LoRA layers that benchmarks time side by side, and the rule by which their results count as right.

All variants of a case compute on the same W, x and dy, the adapters with the same random A and B. W is frozen, x needs
a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from mbf.ops import draw_seed, dropout_mask
from mbf.ops._gpu import launches, obstacle
from mbf.ops.philox import keep_scale
from mbf.peft import calls, fuse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: the layer is d_in x d_out, x is tokens x d_in."""

    d_in: int
    d_out: int
    rank: int
    p: float
    tokens: int
    dtype: str

    @property
    def shape(self) -> str:
        return f"{self.d_in}x{self.d_out}"

    def __str__(self) -> str:
        return f"{self.shape} r={self.rank} p={self.p:g} T={self.tokens} {self.dtype}"


class Operands(NamedTuple):
    """What the variants of a case share.

    Attributes:
        W: [d_out, d_in], frozen.
        A: [r, d_in], fp32 of values that W's dtype holds; so is B.
        B: [d_out, r].
        x: [tokens, d_in] in W's dtype, a leaf that needs a gradient.
        dy: [tokens, d_out] in W's dtype, the gradient of y.
    """

    W: nn.Parameter
    A: Tensor
    B: Tensor
    x: Tensor
    dy: Tensor

    def refresh(self) -> None:
        """Draw x and dy anew, in place."""
        with torch.no_grad():
            self.x.normal_()
            self.dy.normal_()


def draw(case: Case, device: str = "cpu") -> Operands:
    """Random operands from torch's default generator of ``device``."""
    dtype = DTYPES[case.dtype]

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device)

    W = nn.Parameter((normal(case.d_out, case.d_in) / case.d_in**0.5).to(dtype), requires_grad=False)
    A = (normal(case.rank, case.d_in) / case.d_in**0.5).to(dtype).float()
    B = (normal(case.d_out, case.rank) / case.rank**0.5).to(dtype).float()
    x = normal(case.tokens, case.d_in).to(dtype).requires_grad_()
    return Operands(W, A, B, x, normal(case.tokens, case.d_out).to(dtype))


# -- the variants ------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    run: Callable[[Tensor], Tensor]
    factors: tuple[Tensor, ...]  # A and B, or nothing
    given: Operands | None = None  # its own x and dy, where they are not those of the case


def frozen_layer(given: Operands) -> Variant:
    """The layer without adapter."""
    return Variant(_base(given.W), ())


def peft_layer(given: Operands, p: float, **options: Any) -> Variant:
    """PEFT's lora.Linear; ``options`` are those of ``get_peft_model``."""
    rank = given.A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=p, target_modules=["0"])  # type: ignore[arg-type]
    model: Any = get_peft_model(nn.Sequential(_base(given.W)), config, **options)
    layer = model.base_model.model[0]
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for weight, value in zip(factors, (given.A, given.B), strict=True):
            weight.copy_(value)
    return Variant(layer, factors)


def fused_layer(given: Operands, p: float) -> Variant:
    """PEFT's layer after ``mbf.fuse``; whether it was fused is for ``problems`` to say."""
    variant = peft_layer(given, p)
    fuse(cast(nn.Module, variant.run))
    return variant


def _base(W: nn.Parameter) -> nn.Linear:
    """A linear layer that has W itself: all variants read the same memory."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = W
    return layer


# -- right before fast -------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """The elements of x that dropout keeps, True where it does, and what it multiplies them by."""

    keep: Tensor
    scale: float


def problems(fused: Variant, given: Operands, p: float) -> list[str]:
    """What the fused layer computes wrong, dropout included, and whether it was left to PEFT or to plain torch."""

    def drop() -> Kept:
        return Kept(dropout_mask(draw_seed(given.x.device), given.x.shape, p), keep_scale(p))

    before = calls.copy()
    found = wrong(fused, given, drop if p else None)
    if calls["slow"] != before["slow"] or calls["fast"] == before["fast"]:
        found.append("the layer was left to PEFT")
    elif given.x.is_cuda and not _launches(fused, given.x):
        found.append(f"the layer was left to plain torch: {obstacle() or 'the Triton kernels declined it'}")
    return found


def _launches(fused: Variant, x: Tensor) -> int:
    """How many Triton kernels a forward launches; 0 where they cannot be used."""
    with _seeded(x.device):
        return len(launches(lambda: fused.run(x)))


def wrong(variant: Variant, given: Operands, drop: Callable[[], Kept] | None) -> list[str]:
    """What of y and the gradients is off by the rule of ``failures``; torch's default generators are left as they were.

    Args:
        drop: draws from the generator what one forward of the variant draws, and returns what that forward keeps; None
            if nothing is dropped. A second forward must then be that of a second draw.
    """
    x, dy = given.x, given.dy
    inputs = (x, *variant.factors)
    with _seeded(x.device):
        masks = [drop(), drop()] if drop else [None]
    with _seeded(x.device):
        got = _results(variant.run(x), inputs, dy)
        again = [{"y": variant.run(x).detach()} for _ in masks[1:]]
    leaves = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    plain, exact = (_results(_formula(t, given.W, masks[0]), t, dy.to(t[0].dtype)) for t in (inputs, leaves))
    eps = torch.finfo(x.dtype).eps
    found = failures(got, plain, exact, eps)
    for second, mask in zip(again, masks[1:], strict=True):
        with torch.no_grad():
            plain, exact = ({"y": _formula(t, given.W, mask)} for t in (inputs, leaves))
        found += [f"in a second forward, {what}" for what in failures(second, plain, exact, eps)]
    return found


def failures(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], eps: float
) -> list[str]:
    """What of ``got`` is further from fp64 than twice the error of plain torch in the same dtype + 1e-6.

    Tensors under 64 elements may be off by ``eps`` more: on so few numbers torch's own error can be nil by chance.
    """
    found = []
    for name in exact.keys() | got.keys():
        if name not in got or name not in exact or got[name].dtype != plain[name].dtype:
            found.append(f"{name} is missing or of another dtype")
            continue
        error, allowed = _relative_error(got[name], exact[name]), _relative_error(plain[name], exact[name])
        limit = 2 * allowed + 1e-6 + (eps if exact[name].numel() < 64 else 0.0)
        if not error <= limit:
            found.append(f"{name} is off by {error:.2g}, allowed {limit:.2g}")
    return sorted(found)


def _relative_error(value: Tensor, exact: Tensor) -> float:
    """``‖value − exact‖ / ‖exact‖`` in fp64; ``‖value‖`` where ``exact`` is nil, as dA is if all of x is dropped."""
    exact = exact.double()
    size = exact.norm().item()
    return (value.double() - exact).norm().item() / (size or 1.0)


def _formula(inputs: Sequence[Tensor], W: Tensor, kept: Kept | None) -> Tensor:
    """The layer's y on ``inputs``, which are x, A and B, in their dtypes."""
    x, A, B = inputs
    wide = x.to(A.dtype)
    dropped = wide if kept is None else wide * kept.keep * kept.scale
    return (F.linear(x, W.to(x.dtype)) + SCALE * F.linear(F.linear(dropped, A), B)).to(x.dtype)


def _results(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach()} | dict(zip(("dx", "dA", "dB"), gradients, strict=True))


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same draws of torch's generators, ``device``'s included, in every block, and no trace of them after it."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(1)
        if gpus:
            torch.cuda.manual_seed(1)
        yield
