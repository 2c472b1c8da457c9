"""LiLoRA's branch on a finished output, forward and backward: a LoRA in a LoRA, w B + (1 − w) Eb Ea on one A.

Against the same in plain torch under autograd, and against ``lora_accumulate`` with the two LoRAs side by side, as one
of rank r + r̃: ``[A; Ea A]`` and ``[B, Eb]`` with a gate of w and 1 − w, copied together in every step. r̃ is r/2, the
mask the same for all. mbf's result must meet the rule of the tests against fp64. Script: ``python bench/lilora.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from branch import DTYPES, SCALE, SEED, Results, both_ways, judge, tracked
from contest import Contest, run_contests
from torch import Tensor

from mbf.ops import LiloraTerms, lilora_accumulate, lilora_accumulate_ref, lora_accumulate


class Case(NamedTuple):
    d_in: int
    d_out: int
    rank: int
    tokens: int
    dtype: str
    p: float = 0.0

    def __str__(self) -> str:
        p = f" p={self.p:g}" if self.p else ""
        return f"{self.d_in}x{self.d_out} r={self.rank}+{self.rank // 2} T={self.tokens} {self.dtype}{p}"


_ROWS = [
    (576, 576, 8, 160),
    (576, 576, 16, 512),
    (576, 1536, 16, 512),
    (1536, 576, 16, 512),
    (576, 192, 8, 160),
    (576, 576, 64, 512),
    (2048, 2048, 16, 160),
    (2048, 2048, 16, 512),
    (2048, 2048, 64, 512),
    (4096, 4096, 16, 512),
    (4096, 4096, 64, 160),
]
_DROPPING = [Case(*row, dtype, p=0.1) for row in [(576, 576, 16, 512), (2048, 2048, 16, 512)] for dtype in DTYPES]
CASES = {str(case): case for case in [*(Case(*row, dtype) for row in _ROWS for dtype in DTYPES), *_DROPPING]}
QUICK = [str(Case(576, 576, 8, 160, dtype)) for dtype in DTYPES]


def side_by_side(y: Tensor, x: Tensor, *, scale: float, dropout_p: float, seed: int | None, **factors: Any) -> Tensor:
    """One LoRA of rank r + r̃."""
    A, B, s, gate, *_ = LiloraTerms(**factors, scale=scale).lora()
    return lora_accumulate(y, x, A, B, scale=s, gate=gate, dropout_p=dropout_p, seed=seed)


def build(name: str) -> Contest:
    case = CASES[name]
    d_in, d_out, rank, tokens, _, p = case
    dtype, generator = DTYPES[case.dtype], torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    inner, dy, terms = rank // 2, normal(tokens, d_out), {"scale": SCALE, "dropout_p": p, "seed": SEED if p else None}
    given = {
        "y": normal(tokens, d_out),
        "x": normal(tokens, d_in),
        "A": normal(rank, d_in, std=d_in**-0.5),
        "B": normal(d_out, rank, std=rank**-0.5),
        "Ea": normal(inner, rank, std=rank**-0.5),
        "Eb": normal(d_out, inner, std=inner**-0.5),
        "weight": torch.tensor(0.37),
    }
    mine, wide = tracked(given), tracked(given, torch.float64)
    exact = both_ways(lilora_accumulate_ref, wide, dy.double(), **terms)
    reference = both_ways(lilora_accumulate_ref, mine, dy, **terms)
    with torch.no_grad():  # dw = ⟨dy, ∂y/∂w⟩ may be near zero, so its error is measured by the size that it could have
        ends = [lilora_accumulate_ref(**{**wide, "weight": wide["weight"] * 0 + w}, **terms) for w in (0.0, 1.0)]
        sizes = {"weight": float(dy.double().norm() * (ends[1] - ends[0]).norm()) / dy.numel() ** 0.5}

    def check(name: str, found: Results) -> list[str]:
        return judge(name, found, reference, exact, sizes)

    calls = {"mbf": lilora_accumulate, "plain torch": lilora_accumulate_ref, "one LoRA, side by side": side_by_side}
    return Contest({name: partial(both_ways, call, mine, dy, **terms) for name, call in calls.items()}, check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_contests("lilora.py", argv, __doc__, CASES, QUICK, build, 10.0)


def test_lilora(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
