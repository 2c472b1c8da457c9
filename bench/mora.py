"""MoRA's branch on a finished output, forward and backward: a square matrix between turned or summed chunks of x.

Against the operator's reference, which is the same in plain torch under autograd with the same mask, and, for
orientation only, a LoRA of as many parameters by ``lora_accumulate``, which computes something else. mbf's result must
meet the rule of the tests against fp64. Script: ``python bench/mora.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from branch import DTYPES, SCALE, SEED, Results, both_ways, judge, tracked
from contest import Contest, run_contests
from torch import Tensor

from mbf.ops import lora_accumulate, mora_accumulate, mora_accumulate_ref, mora_size

LORA = "LoRA of as many parameters"


class Case(NamedTuple):
    d_in: int
    d_out: int
    rank: int
    tokens: int
    dtype: str
    kind: int = 6
    p: float = 0.0

    @property
    def q(self) -> int:
        return mora_size(self.d_out, self.d_in, self.rank, self.kind)

    def __str__(self) -> str:
        p = f" p={self.p:g}" if self.p else ""
        return f"{self.d_in}x{self.d_out} r={self.rank} q={self.q} T={self.tokens} {self.dtype} kind {self.kind}{p}"


_ROWS = [
    (576, 576, 8, 160),
    (576, 576, 8, 512),
    (576, 1536, 8, 512),
    (1536, 576, 8, 512),
    (576, 192, 8, 512),
    (576, 576, 64, 512),
    (2048, 2048, 8, 512),
    (2048, 2048, 16, 160),
    (2048, 2048, 64, 512),
    (4096, 4096, 16, 512),
]
_DROPPING = [Case(2048, 2048, 16, 512, dtype, p=0.1) for dtype in DTYPES]
_SHARING = [
    Case(*row, dtype, kind=1)
    for row in [(576, 576, 64, 512), (576, 1536, 16, 160), (2048, 2048, 64, 512), (4096, 4096, 16, 512)]
    for dtype in DTYPES
]
CASES = {str(case): case for case in [*(Case(*row, dtype) for row in _ROWS for dtype in DTYPES), *_DROPPING, *_SHARING]}
QUICK = [str(Case(576, 576, 8, 160, dtype, kind)) for dtype, kind in (("fp32", 6), ("bf16", 6))]


def build(name: str) -> Contest:
    case = CASES[name]
    d_in, d_out, rank, tokens, _, kind, p = case
    dtype, generator = DTYPES[case.dtype], torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    q, dy, terms = case.q, normal(tokens, d_out), {"scale": SCALE, "dropout_p": p, "seed": SEED if p else None}
    given = {"y": normal(tokens, d_out), "x": normal(tokens, d_in), "M": normal(q, q, std=q**-0.5)}
    factors = {"A": normal(rank, d_in, std=d_in**-0.5), "B": normal(d_out, rank, std=rank**-0.5)}
    mine, lora = tracked(given), tracked({"y": given["y"], "x": given["x"], **factors})
    of_mora = {**terms, "kind": kind}
    exact = both_ways(mora_accumulate_ref, tracked(given, torch.float64), dy.double(), **of_mora)
    reference = both_ways(mora_accumulate_ref, mine, dy, **of_mora)

    def check(name: str, found: Results) -> list[str]:
        if name == LORA:
            return []
        return judge(name, found, reference, exact)

    return Contest(
        {
            "mbf": partial(both_ways, mora_accumulate, mine, dy, **of_mora),
            "plain torch": partial(both_ways, mora_accumulate_ref, mine, dy, **of_mora),
            LORA: partial(both_ways, lora_accumulate, lora, dy, **terms),
        },
        check,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_contests("mora.py", argv, __doc__, CASES, QUICK, build, 10.0)


def test_mora(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
