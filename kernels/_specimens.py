"""One launch of every kernel in every form, as the operators launch them, for compiling without a GPU.

The host code runs on tensors without storage and what it launches is recorded, so that what is compiled is what would
be run: signatures, alignments, shapes of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from mbf.kernels import lilora, lora_accumulate, lora_group, lora_linear, lora_mlp, mora, philox
from mbf.kernels._launch import Launch, recorded
from mbf.kernels._tune import forced
from torch import Tensor

DTYPES = {  # of x, W, y; of A, B
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "fp32 on bf16": (torch.bfloat16, torch.float32),
    "fp32 on fp16": (torch.float16, torch.float32),
}
RANKS = (16, 32, 64, 128, 256)
_LORA = ("plain", "dropout", "routed", "group")
_NESTED = ("nested", "nested drop")  # of lilora_accumulate
_SQUARE = ("shared", "shared drop", "turned", "turned drop")  # of mora_accumulate: kinds 1 and 6
FORMS = (*_LORA, *_NESTED, *_SQUARE, "elementwise")
_TOKENS, _WIDTH = 8192, 4096
_INNER = {8: 4, 16: 8, 32: 16, 64: 32, 128: 64, 256: 128}  # r̃ by r
_SIZES = {16: (96,), 32: (184,), 64: (256,), 128: (32, 64), 256: (512,)}  # of M, beside the ranks


class Specimen(NamedTuple):
    """A launch.

    Attributes:
        rank: r or, of M, q.
        narrow: its matrices' rows, or halves of them, are no multiples of 16 elements, so accesses cannot be wide.
    """

    dtype: str
    rank: int
    form: str
    launch: Launch
    narrow: bool = False


class Terms(NamedTuple):
    """A branch as ``mbf/ops/_operands.py`` has it."""

    A: Tensor
    B: Tensor
    scale: float
    gate: Tensor | None
    mix: Tensor | None
    dropout_p: float
    seed: Tensor | None
    merged_B: Tensor | None
    merge_weight: Tensor | None

    least = 6554
    keep_scale = 1.1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.A, self.B, self.gate, self.mix, self.merged_B, self.merge_weight


class NestedTerms(NamedTuple):
    """The operands of ``mbf/ops/lilora.py``."""

    A: Tensor
    B: Tensor
    Ea: Tensor
    Eb: Tensor
    weight: Tensor
    scale: Tensor
    dropout_p: float
    seed: Tensor

    @property
    def branch(self) -> Terms:
        return Terms(self.A, self.B, 1.0, None, None, self.dropout_p, self.seed, None, None)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.weight, self.scale * (1.0 - self.weight)


class SquareTerms(NamedTuple):
    """What ``mbf/ops/mora.py`` gives the kernels."""

    M: Tensor
    rotates: bool
    scale: float
    dropout_p: float
    seed: Tensor

    least = Terms.least
    keep_scale = Terms.keep_scale


def specimens(dtypes: Sequence[str], ranks: Sequence[int], forms: Sequence[str] = FORMS) -> Iterator[Specimen]:
    """Of every kernel: with and without dropout, plain and with gate, mix and merged B, alone and grouped."""
    for dtype in dtypes:
        of_x, of_A = DTYPES[dtype]
        for rank in ranks:
            for form in forms:
                if form in _LORA:
                    yield from _named(dtype, rank, form, partial(_run, of_x, of_A, rank, form))
                elif form in _NESTED:
                    for r in (8, 16) if rank == 16 else (rank,):
                        yield from _named(dtype, r, form, partial(_nested, of_x, of_A, r, form), r % 16 > 0)
                elif form in _SQUARE:
                    for q in _SIZES[rank]:
                        yield from _named(dtype, q, form, partial(_square, of_x, of_A, q, form), q % 32 > 0)
        if "elementwise" in forms:
            yield from _named(dtype, 0, "elementwise", partial(_elementwise, of_x))


def _named(dtype: str, rank: int, form: str, run: Callable[[], None], narrow: bool = False) -> Iterator[Specimen]:
    with recorded() as launches:
        run()
    for launch in launches:
        yield Specimen(dtype, rank, form, launch, narrow)


def _run(of_x: torch.dtype, of_A: torch.dtype, rank: int, form: str) -> None:
    def empty(*shape: int, dtype: torch.dtype = of_x) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    routed = form == "routed"
    branch = Terms(
        empty(rank, _WIDTH, dtype=of_A),
        empty(_WIDTH, rank, dtype=of_A),
        2.0,
        empty(_TOKENS, rank, dtype=of_A) if routed else None,
        empty(rank, rank, dtype=of_A) if routed else None,
        0.0 if form == "plain" else 0.1,
        torch.empty((), dtype=torch.int64, device="meta"),
        empty(_WIDTH, rank, dtype=of_A) if routed else None,
        torch.empty((), dtype=torch.float64, device="meta") if routed else None,
    )
    needs = [True, False, False, True, True, routed, routed, routed, routed]
    x, weight, dy = empty(_TOKENS, _WIDTH), empty(_WIDTH, _WIDTH), empty(_TOKENS, _WIDTH)
    h = empty(_TOKENS, rank, dtype=of_A)
    if form == "group":
        lora_group.forward(x, [weight] * 3, [None] * 3, [branch] * 3)
        lora_group.backward([dy] * 3, [h] * 3, x, [weight] * 3, [branch] * 3, [True] + [True, True, *[False] * 4] * 3)
        return
    lora_linear.forward(x, weight, None, branch)
    lora_linear.backward(dy, h, x, weight, branch, needs)
    if form in ("dropout", "routed"):
        with forced({"forward": "epilogue", "backward": "epilogue"}):
            lora_linear.forward(x, weight, x[0], branch)
            lora_linear.backward(dy, h, x, weight, branch, needs)
    if form == "plain":
        # Few rows, for which sums are parted, and a gradient of x that is nothing but the branch's.
        lora_linear.forward(x[:64], weight, None, branch)
        lora_accumulate.backward(dy, h, x, branch, [True, True, True, False, False, False, False])


def _nested(of_x: torch.dtype, of_A: torch.dtype, rank: int, form: str) -> None:
    """With numbers by value that have no gradient, and with dropout, numbers on the GPU and all gradients."""
    drop = form == "nested drop"

    def empty(*shape: int, dtype: torch.dtype = of_A) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inner = _INNER[rank]
    number = empty(dtype=torch.float32) if drop else torch.tensor(0.5, dtype=torch.float64)
    factors = empty(rank, _WIDTH), empty(_WIDTH, rank), empty(inner, rank), empty(_WIDTH, inner)
    terms = NestedTerms(*factors, number, number, 0.1 if drop else 0.0, empty(dtype=torch.int64))
    x, h = empty(_TOKENS, _WIDTH, dtype=of_x), empty(_TOKENS, rank)
    lilora.forward(x, x, terms)
    lilora.backward(x, h, x, terms, [True, True, True, True, True, drop, drop])


def _square(of_x: torch.dtype, of_M: torch.dtype, q: int, form: str) -> None:
    """Once around x and y, and with dropout an x that is padded and a y that the result stands in more than once."""
    kind, _, drop = form.partition(" ")

    def empty(*shape: int, dtype: torch.dtype = of_x) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d_in = _WIDTH + 112 if drop else _WIDTH // q * q
    d_out = 3 * _WIDTH if drop else d_in
    terms = SquareTerms(empty(q, q, dtype=of_M), kind == "turned", 2.0, 0.1 if drop else 0.0, empty(dtype=torch.int64))
    cos = empty(_WIDTH // q + 1, q // 2, dtype=torch.float32) if terms.rotates else terms.M
    x, y = empty(_TOKENS, d_in), empty(_TOKENS, d_out)
    mora.forward(y, x, terms, cos, cos)
    mora.backward(y, x, terms, d_in, cos, cos, [True, True])


def _elementwise(dtype: torch.dtype) -> None:
    seed = torch.empty((), dtype=torch.int64, device="meta")
    philox.dropout_mask(seed, (_TOKENS, _WIDTH), Terms.least)
    g = torch.empty(_TOKENS, _WIDTH, dtype=dtype, device="meta")
    for activation in ("silu", "gelu_tanh"):
        lora_mlp.activate(g, g, activation)
        lora_mlp.deactivate(g, g, g, activation)
