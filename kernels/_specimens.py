"""One launch of every kernel in every form, as the operators launch them, for compiling without a GPU.

The host code runs on tensors without storage and what it launches is recorded, so that what is compiled is what would
be run: signatures, alignments, shapes of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from mbf.kernels import lora_accumulate, lora_group, lora_linear, lora_mlp, philox
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
_TOKENS, _WIDTH = 8192, 4096


class Specimen(NamedTuple):
    dtype: str
    rank: int
    form: str
    launch: Launch


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


def specimens(dtypes: Sequence[str], ranks: Sequence[int]) -> Iterator[Specimen]:
    """Of every kernel: with and without dropout, plain and with gate, mix and merged B, alone and grouped."""
    for dtype in dtypes:
        of_x, of_A = DTYPES[dtype]
        for rank in ranks:
            for form in ("plain", "dropout", "routed", "group"):
                with recorded() as launches:
                    _run(of_x, of_A, rank, form)
                for launch in launches:
                    yield Specimen(dtype, rank, form, launch)
        with recorded() as launches:
            _elementwise(of_x)
        for launch in launches:
            yield Specimen(dtype, 0, "elementwise", launch)


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


def _elementwise(dtype: torch.dtype) -> None:
    seed = torch.empty((), dtype=torch.int64, device="meta")
    philox.dropout_mask(seed, (_TOKENS, _WIDTH), Terms.least)
    g = torch.empty(_TOKENS, _WIDTH, dtype=dtype, device="meta")
    for activation in ("silu", "gelu_tanh"):
        lora_mlp.activate(g, g, activation)
        lora_mlp.deactivate(g, g, g, activation)
