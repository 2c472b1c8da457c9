from __future__ import annotations

import pytest
import torch
from mbf.kernels import lora_mlp as kernels
from mbf.kernels._tune import forced

from mbf.ops import lora_mlp, lora_mlp_ref
from mbf.ops._operands import prepare
from tests.ops.test_lora_linear import DTYPES
from tests.ops.test_lora_mlp import compare_with_fp64, gradient_of, mlp, results, tracked

KERNELS = {"project", "accumulate", "activation", "activation_gradient", "output_gradient", "input_gradient", "reduce"}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule(on_triton: list[str], dtypes: str, activation: str, recompute: bool) -> None:
    flat = mlp("plain", (2, 10), 24, 40, *DTYPES[dtypes])
    compare_with_fp64(flat, recompute=recompute, activation=activation, dropout_p=0.3)
    assert set(on_triton) >= KERNELS


@pytest.mark.parametrize("form", ["everything", "merged"])
def test_forms(on_triton: list[str], form: str) -> None:
    compare_with_fp64(mlp(form, (21,), 24, 40, torch.float32, torch.float32), dropout_p=0.3)


def test_only_below_asked(on_triton: list[str]) -> None:
    flat = mlp("plain", (20,), 24, 40, torch.float32, torch.float32)
    cases = [tracked(flat) for _ in range(2)]
    for case in cases:
        for name, value in case.items():
            value.requires_grad_(name in ("A2", "B2"))
    got, expected = (
        results(f, case, gradient_of(flat)) for f, case in zip((lora_mlp, lora_mlp_ref), cases, strict=True)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert "activation_gradient" not in on_triton


@pytest.mark.parametrize("tier", ["base", "epilogue"])
def test_recomputed_bits_are_the_forward_ones(on_triton: list[str], monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    torch.manual_seed(0)
    x, *weights = ((torch.randn(shape) / 16).bfloat16() for shape in [(32, 256), (64, 256), (64, 256), (48, 64)])
    branches = []
    for weight in weights:
        A, B = (torch.randn(shape).bfloat16() for shape in [(8, weight.shape[1]), (weight.shape[0], 8)])
        like = torch.empty(1, weight.shape[1])
        branches.append(prepare(like, A / 16, B, 2.0, None, None, 0.0, None, None, None))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(kernels, "deactivate", lambda dp, g, u, _: seen.append((g, u)) or [dp, dp])
    with forced({"forward": tier}):
        y, g, u, *hs = kernels.forward(x, weights, [None] * 3, branches, "silu", False)
        kernels.backward(y, x, None, None, hs, weights, [None] * 3, branches, "silu", [True] + [False] * 18)
    assert torch.equal(seen[0][0], g) and torch.equal(seen[0][1], u)
