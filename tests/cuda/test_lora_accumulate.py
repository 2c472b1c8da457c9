"""lora_accumulate.cu under the stand-in: what it does beside lora_linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mbf.ops import lora_accumulate_ref
from tests.cuda.lora import accumulating, branch_of, poisoned
from tests.ops.lora_cases import FORMS, SEED, check_error_rule, operands

DTYPES = {  # of y, of x, of the branch
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp32 on bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32 x, bf16 y": (torch.bfloat16, torch.float32, torch.float32),
    "bf16 x, fp32 y": (torch.float32, torch.bfloat16, torch.float32),
}


def case_of(form: str, lead: tuple[int, ...], d_in: int, d_out: int, r: int, dtypes: str) -> dict[str, Any]:
    of_y, of_x, of_branch = DTYPES[dtypes]
    case = operands(form, lead, d_in, d_out, r, of_branch, of_x)
    del case["weight"], case["bias"]
    y = torch.randn(*lead, d_out, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return {"y": y.to(of_y), **case}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_error_rule(cuda: Any, dtypes: str, form: str) -> None:
    case = case_of(form, (2, 9), 63, 40, 12, dtypes)
    with poisoned():
        check_error_rule(accumulating(cuda), lora_accumulate_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)


@pytest.mark.parametrize(("rows", "d_in", "d_out", "r"), [(1, 130, 63, 3), (43, 63, 130, 33), (7, 64, 264, 100)])
def test_drawn_shapes(cuda: Any, rows: int, d_in: int, d_out: int, r: int) -> None:
    case = case_of("everything", (rows,), d_in, d_out, r, "bf16")
    with poisoned():
        check_error_rule(accumulating(cuda), lora_accumulate_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)


def test_y_stays_as_it_is(cuda: Any) -> None:
    case = case_of("plain", (43,), 64, 136, 4, "fp32")
    before = case["y"].clone()
    out, _ = cuda.lora_accumulate(case["y"], case["x"], *branch_of(case["x"], case["A"], case["B"], {}))
    assert torch.equal(case["y"], before) and not torch.equal(out, before)


@pytest.mark.parametrize("kept", [True, False])
def test_dx_is_of_the_dtype_of_x_or_of_dy(cuda: Any, kept: bool) -> None:
    case = case_of("plain", (9,), 64, 40, 4, "bf16 x, fp32 y")
    branch = branch_of(case["x"], case["A"], case["B"], {"dropout_p": 0.3, "seed": SEED})
    _, h = cuda.lora_accumulate(case["y"], case["x"], *branch)
    dy = torch.randn(9, 40)
    dx, *others = cuda.lora_accumulate_backward(dy, h, case["x"] if kept else None, *branch, [True, *[False] * 6])
    assert dx.dtype == (torch.bfloat16 if kept else torch.float32)
    assert all(gradient is None for gradient in others)


@pytest.mark.parametrize("d_out", [40, 136])
def test_y_of_any_strides(cuda: Any, d_out: int) -> None:
    case = case_of("plain", (2, 9), 64, d_out, 4, "bf16")
    branch = branch_of(case["x"], case["A"], case["B"], {})
    expected, _ = cuda.lora_accumulate(case["y"], case["x"], *branch)
    elsewhere = case["y"].transpose(0, 1).contiguous().transpose(0, 1)
    found, _ = cuda.lora_accumulate(elsewhere, case["x"].transpose(0, 1).contiguous().transpose(0, 1), *branch)
    assert torch.equal(found, expected)
