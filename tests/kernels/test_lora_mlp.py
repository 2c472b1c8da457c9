from __future__ import annotations

import pytest
import torch

from mbf.ops import lora_mlp, lora_mlp_ref
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
