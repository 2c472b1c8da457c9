"""The whole boundary between two tasks: the merge of every B, the replacement of every A and the next basis.

Against the same in plain torch: ``_foreach_lerp_``, ``_foreach_copy_`` and the signed Q of ``torch.linalg.qr``, in a
loop over the layers and in a batch a width. In place, Q takes the place of the fine-tuned A, as the next task starts
there; else it is in memory of its own. Script: ``python bench/task_boundary.py``.
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
MODELS_AND_RANKS = (("Llama-2-7B q, v", 8), ("Llama-2-7B", 16), ("Llama-3.2-1B", 16), ("SmolLM2-135M", 8))
CASES = {
    f"{model}, r {r}" + (", in place" if in_place else ""): (model, r, in_place)
    for in_place in (False, True)
    for model, r in MODELS_AND_RANKS
}
QUICK = ["SmolLM2-135M, r 8"]
Pair = tuple[list[Tensor], list[Tensor]]


def signed(Q: Tensor, R: Tensor) -> Tensor:
    return (Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT


def looped(A: Sequence[Tensor]) -> list[Tensor]:
    return [signed(*torch.linalg.qr(matrix.mT)) for matrix in A]


def batched(A: Sequence[Tensor]) -> list[Tensor]:
    found = {d: iter(signed(*torch.linalg.qr(stack.mT))) for d, stack in by_width(A).items()}
    return [next(found[matrix.shape[1]]) for matrix in A]


def plain(
    merged: Pair, finetuned: Pair, in_place: bool, basis: Callable[[Sequence[Tensor]], list[Tensor]]
) -> list[Tensor]:
    torch._foreach_lerp_(merged[1], finetuned[1], WEIGHT)
    torch._foreach_copy_(merged[0], finetuned[0])
    Q = basis(finetuned[0])
    if not in_place:
        return [rows.contiguous() for rows in Q]
    torch._foreach_copy_(finetuned[0], Q)
    return finetuned[0]


def build(case: str) -> Contest:
    model, r, in_place = CASES[case]

    def factors() -> Pair:
        layers = MODELS[model]
        return [torch.randn(r, d_in) for d_in, _ in layers], [torch.randn(d_out, r) for _, d_out in layers]

    start, task = factors(), factors()
    calls, merged, finetuned = {}, {}, {}
    for name, run in {
        "mbf": partial(task_boundary_, weight=WEIGHT, in_place=in_place),
        "torch, loop": partial(plain, in_place=in_place, basis=looped),
        "torch, batch": partial(plain, in_place=in_place, basis=batched),
    }.items():
        merged[name], finetuned[name] = ([[t.clone() for t in tensors] for tensors in pair] for pair in (start, task))
        calls[name] = partial(run, merged[name], finetuned[name])

    def check(name: str, Q: list[Tensor]) -> list[str]:
        problems = []
        if orthonormality(Q) > 1e-5:
            problems.append("Q is not orthonormal")
        if not all(torch.equal(a, b) for a, b in zip(merged[name][0], task[0], strict=True)):
            problems.append("A was not replaced")
        if in_place and not all(q is a for q, a in zip(Q, finetuned[name][0], strict=True)):
            problems.append("Q is not where A was")
        B = zip(merged[name][1], start[1], task[1], strict=True)
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
