from __future__ import annotations

import pytest
import torch

from mbf.ops import lora_accumulate, lora_accumulate_ref
from tests.kernels.conftest import dtypes_and_forms
from tests.ops.lora_cases import SEED, check_error_rule, gradients
from tests.ops.test_lora_accumulate import DTYPES, accumulating

DTYPES_AND_FORMS = dtypes_and_forms(DTYPES)


@pytest.mark.parametrize(("dtypes", "form"), DTYPES_AND_FORMS)
def test_error_rule(on_triton: list[str], dtypes: str, form: str) -> None:
    case = accumulating(form, (2, 10), 41, 24, 12, *DTYPES[dtypes])
    check_error_rule(lora_accumulate, lora_accumulate_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)
    assert {"project", "accumulate", "output_gradient", "input_gradient"} <= set(on_triton)


@pytest.mark.parametrize("asked", ["y", "x", "A", "B"])
def test_one_gradient_alone(on_triton: list[str], asked: str) -> None:
    case = accumulating("plain", (40,), 24, 40, 3, *[torch.float64] * 3)
    case[asked].requires_grad_()
    got = gradients(lora_accumulate, case, None)
    torch.testing.assert_close(got, gradients(lora_accumulate_ref, case, None))
    assert ("input_gradient" in on_triton) == (asked in ("x", "A"))


def test_leaves_y_alone(on_triton: list[str]) -> None:
    case = accumulating("plain", (4, 3), 24, 40, 2, *[torch.float32] * 3)
    y = case["y"].clone()
    out = lora_accumulate(**case)
    assert torch.equal(case["y"], y) and out.data_ptr() != case["y"].data_ptr() and "accumulate" in on_triton
