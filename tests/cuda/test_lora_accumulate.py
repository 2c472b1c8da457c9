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


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_operands_at_any_offset(cuda: Any, dtypes: str) -> None:
    """An address that is no multiple of 16 bytes is an error of the stand-in, as it is of a GPU."""
    case = case_of("merged", (20,), 64, 32, 8, dtypes)
    for name in ("x", "A", "B", "merged_B", "y"):
        value = case[name]
        moved = value.new_empty(value.numel() + 1)[1:].view_as(value).copy_(value)
        check_error_rule(accumulating(cuda), lora_accumulate_ref, case | {name: moved}, scale=1.3)


def test_rank_0_adds_nothing_and_has_gradients_of_zero(cuda: Any) -> None:
    x, y, A, B = torch.randn(5, 16), torch.randn(5, 8), torch.zeros(0, 16), torch.zeros(8, 0)
    branch = branch_of(x, A, B, {})
    out, h = cuda.lora_accumulate(y, x, *branch)
    dx, dA, dB, *_ = cuda.lora_accumulate_backward(out, h, x, *branch, [True] * 3 + [False] * 4)
    assert torch.equal(out, y) and torch.equal(dx, torch.zeros_like(x))
    assert dA.shape == A.shape and dB.shape == B.shape


def test_everything_dropped_leaves_y(cuda: Any) -> None:
    case = case_of("plain", (5,), 16, 8, 4, "fp32")
    branch = list(branch_of(case["x"], case["A"], case["B"], {"dropout_p": 0.5, "seed": SEED}))
    branch[5] = 1.0
    out, h = cuda.lora_accumulate(case["y"], case["x"], *branch)
    assert torch.equal(out, case["y"]) and not h.any()
    dx, dA, *_ = cuda.lora_accumulate_backward(out, h, case["x"], *branch, [True, True] + [False] * 5)
    assert not dx.any() and not dA.any()


X, Y, H = torch.randn(5, 16), torch.randn(5, 8), torch.randn(5, 4)
GOOD = {
    "A": torch.randn(4, 16),
    "B": torch.randn(8, 4),
    "scale": 1.0,
    "gate": torch.randn(5, 4),
    "mix": torch.randn(4, 4),
    "dropout_p": 0.3,
    "seed": torch.tensor(3),
    "merged_B": torch.randn(8, 4),
    "merge_weight": torch.tensor(0.3),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": GOOD["A"][0]}, r"A must be \[r, d_in\]"),
        ({"B": GOOD["B"][:7]}, r"B must be \[8, 4\]"),
        ({"B": GOOD["B"][:, :3]}, r"B must be \[8, 4\]"),
        ({"gate": torch.randn(5, 3)}, "gate must broadcast"),
        ({"gate": torch.randn(2, 5, 4)}, "gate must broadcast"),
        ({"mix": torch.randn(2, 2)}, r"mix must be \[4, 4\]"),
        ({"merged_B": torch.randn(1, 4)}, r"merged_B must be \[8, 4\]"),
        ({"merged_B": GOOD["merged_B"].half()}, "merged_B must have the dtype of B"),
        ({"merged_B": None}, "merged_B and merge_weight go together"),
        ({"merge_weight": torch.randn(2)}, "merge_weight must be 0-d"),
        ({"dropout_p": 2.0}, r"dropout_p must lie in \[0, 1\]"),
        ({"seed": torch.tensor(3, dtype=torch.int32)}, "dropout needs a seed"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_read_beyond(cuda: Any, changed: dict[str, Any], message: str) -> None:
    branch = [*(GOOD | changed).values()]
    with pytest.raises(RuntimeError, match=f"lora_accumulate: {message}"):
        cuda.lora_accumulate(Y, X, *branch)
    with pytest.raises(RuntimeError, match=f"lora_accumulate_backward: {message}"):
        cuda.lora_accumulate_backward(Y, H, X, *branch, [True] * 7)
    weight = torch.randn(8, 16)
    with pytest.raises(RuntimeError, match=f"lora_linear: {message}"):
        cuda.lora_linear(X, weight, None, *branch)
    with pytest.raises(RuntimeError, match=f"lora_linear_backward: {message}"):
        cuda.lora_linear_backward(Y, H, X, weight, *branch, [True] * 9)


def test_activations_that_do_not_fit_are_refused(cuda: Any) -> None:
    branch, needs = [*GOOD.values()], [True] * 7
    with pytest.raises(RuntimeError, match=r"lora_accumulate: A must be \[4, 15\] on the GPU"):
        cuda.lora_accumulate(Y, X[:, 1:], *branch)
    with pytest.raises(RuntimeError, match="lora_accumulate: y must have the other activations' shape"):
        cuda.lora_accumulate(Y[:4], X, *branch)
    with pytest.raises(RuntimeError, match="h must have the other activations' shape but for the last axis, of 4"):
        cuda.lora_accumulate_backward(Y, H[:, :3], X, *branch, needs)
    with pytest.raises(RuntimeError, match="x must have the other activations' shape but for the last axis, of 16"):
        cuda.lora_accumulate_backward(Y, H, X[:2], *branch, needs)
    with pytest.raises(RuntimeError, match="needs must have 7 entries"):
        cuda.lora_accumulate_backward(Y, H, X, *branch, needs[:1])
