"""Merging every B of a model in place, in one call: M ← M + λ (F − M), and its norms in the same pass.

Against ``torch._foreach_lerp_`` (one call, the best torch has) and a loop of ``Tensor.lerp_``; with norms, against
the same of separate calls. The floor is a copy of F into M: its bandwidth is what the machine has, and beside each time
stands the variant's share of it (a merge reads two tensors and writes one, a copy reads one and writes one). Script:
``python bench/merge.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from common import quartiles
from contest import Contest, Times, run_contests
from geometry import MODELS
from torch import Tensor

from mbf.ops import MergeNorms, merge_, native_status

WEIGHT = 0.37
CASES = {
    f"{model}, r {r}, {str(dtype).removeprefix('torch.')}": (model, r, dtype)
    for model, r in [("Llama-2-7B", 16), ("Llama-2-7B q, v", 8), ("Llama-3.2-1B", 16), ("SmolLM2-135M", 8)]
    for dtype in (torch.float32, torch.bfloat16)
}
QUICK = ["SmolLM2-135M, r 8, float32", "SmolLM2-135M, r 8, bfloat16"]
COPY = "copy (floor)"
Lists = Sequence[Tensor]


def separate(M: Lists, F: Lists) -> MergeNorms:
    """The merge, the three norms and the check for what isn't finite, each by a call for the whole list."""
    step = torch._foreach_norm(torch._foreach_sub(F, M))
    torch._foreach_lerp_(M, F, WEIGHT)
    norms = torch._foreach_norm(F), step, torch._foreach_norm(M)
    found = MergeNorms(*(torch.stack(norm) for norm in norms))
    assert all(bool(f.isfinite().all()) for f in F)
    return found


def with_norms(M: Lists, F: Lists) -> MergeNorms:
    norms = merge_(M, F, WEIGHT, norms=True)
    assert bool(norms.finetuned.isfinite().all())
    return norms


VARIANTS: dict[str, Callable[[Lists, Lists], Any]] = {
    "mbf": lambda M, F: merge_(M, F, WEIGHT),
    "_foreach_lerp_": lambda M, F: torch._foreach_lerp_(M, F, WEIGHT),
    "lerp_, loop": lambda M, F: [m.lerp_(f, WEIGHT) for m, f in zip(M, F, strict=True)],
    COPY: lambda M, F: [m.copy_(f) for m, f in zip(M, F, strict=True)],
    "mbf with norms": with_norms,
    "separate with norms": separate,
}


def build(case: str) -> Contest:
    model, r, dtype = CASES[case]
    merged = [torch.randn(d_out, r).to(dtype) for _, d_out in MODELS[model]]
    finetuned = [torch.randn(d_out, r).to(dtype) for _, d_out in MODELS[model]]
    expected = [m.double() + WEIGHT * (f.double() - m.double()) for m, f in zip(merged, finetuned, strict=True)]
    copies = {name: [m.clone() for m in merged] for name in VARIANTS}

    def check(name: str, found: Any) -> list[str]:
        if name == COPY:
            return []
        errors = [float((m.double() - e).norm() / e.norm()) for m, e in zip(copies[name], expected, strict=True)]
        problems = [f"off by {max(errors):.1e}"] if max(errors) > 2 * torch.finfo(dtype).eps else []
        if isinstance(found, MergeNorms):
            norms = torch.stack([f.double().norm() for f in finetuned])
            if ((found.finetuned.double() - norms).abs() > 0.01 * norms).any():
                problems.append("norms are off")
        return problems

    return Contest({name: partial(run, copies[name], finetuned) for name, run in VARIANTS.items()}, check)


def shares(times: Times) -> Times:
    """With every merge's share of the bandwidth of the copy."""
    median = {name: quartiles(seconds)[1] for name, seconds in times.seconds.items()}
    notes = {name: f"{1.5 * median[COPY] / median[name]:.2f} of the copy's bandwidth" for name in median}
    return Times(times.seconds, {**notes, COPY: ""})


def main(argv: Sequence[str] | None = None) -> int:
    return run_contests("merge.py", argv, __doc__, CASES, QUICK, build, 20.0, shares)


@pytest.mark.parametrize("case", QUICK)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merge(benchmark, variant, case):
    contest = build(case)
    assert contest.check(variant, contest.calls[variant]()) == []
    benchmark.group = case
    benchmark.extra_info |= {"native": native_status().loaded, "threads": torch.get_num_threads()}
    benchmark.pedantic(contest.calls[variant], rounds=60, iterations=5, warmup_rounds=5)


if __name__ == "__main__":
    sys.exit(main())
