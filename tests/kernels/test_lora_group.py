from __future__ import annotations

import pytest
import torch

from mbf.ops import lora_group, lora_group_ref
from tests.kernels.conftest import dtypes_and_forms
from tests.ops.test_lora_group import (
    SIZES,
    assert_follows_rule,
    gradients_of,
    group,
    results,
    tracked,
)
from tests.ops.test_lora_linear import DTYPES

DTYPES_AND_FORMS = dtypes_and_forms(DTYPES)
ALIKE = [(40, 12), (17, 12), (24, 12), (30, 12)]


@pytest.mark.parametrize("sizes", [SIZES, ALIKE], ids=["ranks differ", "ranks alike"])
@pytest.mark.parametrize(("dtypes", "form"), DTYPES_AND_FORMS)
def test_error_rule(on_triton: list[str], dtypes: str, form: str, sizes: list[tuple[int, int]]) -> None:
    flat = group(form, (2, 10), 40, *DTYPES[dtypes], sizes=sizes)
    dys = gradients_of(flat)
    exact = results(lora_group_ref, tracked(flat, torch.float64), dys, dropout_p=0.3)
    plain = results(lora_group_ref, tracked(flat), dys, dropout_p=0.3)
    on_triton.clear()
    got = results(lora_group, tracked(flat), dys, dropout_p=0.3)
    assert_follows_rule(flat, got, plain, exact)
    # Three with the same p at once and, of the four alike, the last, which has no dropout, by itself.
    assert on_triton.count("project") == on_triton.count("input_gradient") == (3 if sizes is SIZES else 2)


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_output_that_is_not_used(on_triton: list[str], unused: int) -> None:
    flat = group("plain", (20,), 40, torch.float64, torch.float64, sizes=ALIKE)
    dys = gradients_of(flat)
    dys[unused] = None
    got, expected = (results(f, tracked(flat), dys) for f in (lora_group, lora_group_ref))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frozen", ["x", "A0", "A1", "B2"])
def test_a_gradient_that_is_not_asked(on_triton: list[str], frozen: str) -> None:
    flat = group("plain", (20,), 40, torch.float64, torch.float64, sizes=ALIKE)
    cases = [tracked(flat) for _ in range(2)]
    for case in cases:
        case[frozen].requires_grad_(False)
    got, expected = (
        results(f, case, gradients_of(flat)) for f, case in zip((lora_group, lora_group_ref), cases, strict=True)
    )
    torch.testing.assert_close(got, expected)
