"""The whole boundary between two tasks: the merge of every B, the replacement of every A and the next basis.

Against the same in plain torch: ``_foreach_lerp_``, ``_foreach_copy_`` and the signed Q of ``torch.linalg.qr``, in a
loop over the layers and in a batch a width. Script: ``python bench/task_boundary.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from basis import by_width, orthonormality
from contest import Contest, run_contests
from geometry import MODELS
from torch import Tensor

from mbf.ops import task_boundary_

WEIGHT = 0.37
CASES = {
    "Llama-2-7B q, v, r 8": ("Llama-2-7B q, v", 8),
    "Llama-2-7B, r 16": ("Llama-2-7B", 16),
    "Llama-3.2-1B, r 16": ("Llama-3.2-1B", 16),
    "SmolLM2-135M, r 8": ("SmolLM2-135M", 8),
}
QUICK = ["SmolLM2-135M, r 8"]
Pair = tuple[list[Tensor], list[Tensor]]


def signed(Q: Tensor, R: Tensor) -> Tensor:
    return (Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.contiguous()


def looped(A: Sequence[Tensor]) -> list[Tensor]:
    return [signed(*torch.linalg.qr(matrix.mT)) for matrix in A]


def batched(A: Sequence[Tensor]) -> list[Tensor]:
    return [Q for stack in by_width(A).values() for Q in signed(*torch.linalg.qr(stack.mT))]


def plain(merged: Pair, finetuned: Pair, basis: Callable[[Sequence[Tensor]], list[Tensor]]) -> list[Tensor]:
    torch._foreach_lerp_(merged[1], finetuned[1], WEIGHT)
    torch._foreach_copy_(merged[0], finetuned[0])
    return basis(finetuned[0])


def build(case: str) -> Contest:
    model, r = CASES[case]

    def factors() -> Pair:
        layers = MODELS[model]
        return [torch.randn(r, d_in) for d_in, _ in layers], [torch.randn(d_out, r) for _, d_out in layers]

    finetuned, start = factors(), factors()
    calls, merged = {}, {}
    for name, run in {
        "mbf": partial(task_boundary_, weight=WEIGHT),
        "torch, loop": partial(plain, basis=looped),
        "torch, batch": partial(plain, basis=batched),
    }.items():
        merged[name] = tuple([t.clone() for t in tensors] for tensors in start)
        calls[name] = partial(run, merged[name], finetuned)

    def check(name: str, Q: list[Tensor]) -> list[str]:
        problems = []
        if orthonormality(Q) > 1e-5:
            problems.append("Q is not orthonormal")
        if not all(torch.equal(a, b) for a, b in zip(merged[name][0], finetuned[0], strict=True)):
            problems.append("A was not replaced")
        B = zip(merged[name][1], start[1], finetuned[1], strict=True)
        if any(((m + WEIGHT * (f - m)) - new).norm() > 1e-6 * new.norm() for new, m, f in B):
            problems.append("B was not merged")
        return problems

    return Contest(calls, check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_contests("task_boundary.py", argv, __doc__, CASES, QUICK, build, 20.0)


def test_task_boundary(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
