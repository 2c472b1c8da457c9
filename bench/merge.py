"""Claim: ``mbf.ops.merge_`` moves every B of a model in one pass, nearer to copy bandwidth than torch's own ways.

Geometry: B of all seven projections of SmolLM2-135M (210 tensors) and of Llama-2-7B's q and v (64), r = 8 and 16.
Peers: ``torch._foreach_lerp_`` (one call, the best torch has) and a loop of ``Tensor.lerp_``. The floor is a copy of
the same bytes. Run: ``python -m pytest bench/merge.py``.
"""

from __future__ import annotations

import pytest
import torch

from mbf.ops import merge_, merge_ref_, native_status

SMOLLM2 = [576, 192, 192, 576, 1536, 1536, 576] * 30
LLAMA_7B_QV = [4096, 4096] * 32
GEOMETRIES = {"smollm2-135m all r8": (SMOLLM2, 8), "llama-2-7b q,v r16": (LLAMA_7B_QV, 16)}
WEIGHT = 0.37

VARIANTS = {
    "mbf.merge_": lambda M, F: merge_(M, F, WEIGHT),
    "torch._foreach_lerp_": lambda M, F: torch._foreach_lerp_(M, F, WEIGHT),
    "loop of lerp_": lambda M, F: [m.lerp_(f, WEIGHT) for m, f in zip(M, F, strict=True)],
    "copy (floor)": lambda M, F: [m.copy_(f) for m, f in zip(M, F, strict=True)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merge(benchmark, variant, geometry, dtype):
    d_out, r = GEOMETRIES[geometry]
    torch.manual_seed(0)
    merged = [torch.randn(d, r).to(dtype) for d in d_out]
    finetuned = [torch.randn(d, r).to(dtype) for d in d_out]
    expected = [m.double() + WEIGHT * (f.double() - m.double()) for m, f in zip(merged, finetuned, strict=True)]
    run = VARIANTS[variant]
    check = [m.clone() for m in merged]
    run(check, finetuned)
    if "floor" not in variant:
        for found, wanted in zip(check, expected, strict=True):
            assert (found.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
    benchmark.group = f"{geometry} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info |= {"native": native_status().loaded, "threads": torch.get_num_threads()}
    benchmark.pedantic(run, args=(merged, finetuned), rounds=60, iterations=5, warmup_rounds=5)


def test_reference_agrees():
    M = [torch.randn(33, 5)]
    F = [torch.randn(33, 5)]
    expected = M[0].clone()
    merge_(M, F, WEIGHT)
    merge_ref_([expected], F, torch.tensor(WEIGHT, dtype=torch.float64))
    torch.testing.assert_close(M[0], expected, rtol=1e-6, atol=1e-6)
