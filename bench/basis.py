"""Orthonormal rows of many matrices in one call, against torch's QR.

``torch.linalg.qr`` in a loop over the layers, once a width for a stack of them, and Cholesky QR composed of torch's
operators in fp64. Script: ``python bench/basis.py``; ``--quick`` is what ``make bench`` runs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from contest import Contest, run_contests
from geometry import MODELS
from torch import Tensor

from mbf.ops import orthonormal_rows

CASES: dict[str, list[tuple[int, int]]] = {  # [r, d] of every matrix
    **{f"64 x [{r}, 4096]": [(r, 4096)] * 64 for r in (8, 16, 64)},
    **{f"{model}, r {r}": [(r, d_in) for d_in, _ in MODELS[model]] for model in MODELS for r in (8, 16, 64)},
}
QUICK = ["64 x [8, 4096]", "SmolLM2-135M, r 8"]


def looped(A: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linalg.qr(matrix.mT).Q.mT for matrix in A]


def by_width(A: Sequence[Tensor]) -> dict[int, Tensor]:
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for matrix in A:
        groups[matrix.shape[1]].append(matrix)
    return {d: torch.stack(group) for d, group in groups.items()}


def batched(A: Sequence[Tensor]) -> list[Tensor]:
    return [Q for stack in by_width(A).values() for Q in torch.linalg.qr(stack.mT).Q.mT]


def composed(A: Sequence[Tensor]) -> list[Tensor]:
    out = []
    for stack in by_width(A).values():
        wide = stack.double()
        L = torch.linalg.cholesky(wide @ wide.mT)
        out += torch.linalg.solve_triangular(L, wide, upper=False).to(stack.dtype)
    return out


def orthonormality(Q: Sequence[Tensor]) -> float:
    """max abs (Q Qᵀ − I) over all matrices."""
    return max(float((q.double() @ q.double().mT - torch.eye(len(q), dtype=torch.float64)).abs().max()) for q in Q)


def build(case: str) -> Contest:
    A = [torch.randn(shape) for shape in CASES[case]]
    calls = {"mbf": orthonormal_rows, "linalg.qr, loop": looped, "linalg.qr, batch": batched, "Cholesky QR": composed}

    def check(name: str, Q: Sequence[Tensor]) -> list[str]:
        error = orthonormality(Q)
        return [] if error <= (5e-7 if name == "mbf" else 1e-5) else [f"Q Qᵀ is off I by {error:.1e}"]

    return Contest(
        {name: partial(call, A) for name, call in calls.items()},
        check,
        lambda name, Q: f"off I by {orthonormality(Q):.0e}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_contests("basis.py", argv, __doc__, CASES, QUICK, build, 20.0)


def test_basis(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
