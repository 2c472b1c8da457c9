from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mbf.kernels import lora_linear as kernels
from mbf.kernels._configs import Config
from mbf.kernels._launch import recorded
from mbf.kernels._tune import forced
from torch import Tensor

from mbf import ops
from mbf.ops import lora_linear, lora_linear_ref
from mbf.ops._operands import prepare
from tests.kernels.conftest import SMALL, dtypes_and_forms
from tests.ops.lora_cases import FORMS, LAYOUTS, SEED, check_error_rule, gradients, laid_out, operands, tracked
from tests.ops.test_lora_linear import DTYPES

DTYPES_AND_FORMS = dtypes_and_forms(DTYPES)
FORWARD = {"project", "accumulate"}
BACKWARD = {"output_gradient", "input_gradient", "reduce"}


@pytest.mark.parametrize(("dtypes", "form"), DTYPES_AND_FORMS)
def test_error_rule(on_triton: list[str], dtypes: str, form: str) -> None:
    case = operands(form, (2, 10), 40, 24, 12, *DTYPES[dtypes])
    check_error_rule(lora_linear, lora_linear_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)
    assert set(on_triton) >= FORWARD | BACKWARD


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 35),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    rank=st.integers(1, 40),
    dtypes=st.sampled_from([*DTYPES]),
    form=st.sampled_from(["plain", "everything"]),
    p=st.sampled_from([0.0, 0.3]),
)
def test_error_rule_at_drawn_shapes(
    on_triton: list[str], rows: int, d_in: int, d_out: int, rank: int, dtypes: str, form: str, p: float
) -> None:
    case = operands(form, (rows,), d_in, d_out, rank, *DTYPES[dtypes])
    # All positive, so that sums do not cancel: what is drawn may be a single number.
    case = {n: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in case.items()}
    if p and d_in < 16:
        p = 0.0  # everything may be dropped
    check_error_rule(lora_linear, lora_linear_ref, case, scale=0.5, dropout_p=p, seed=SEED if p else None)
    assert "project" in on_triton


@pytest.mark.parametrize("rank", [64, 65, 128, 129, 256])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_wide_ranks(on_triton: list[str], form: str, rank: int) -> None:
    case = operands(form, (20,), 40, 24, rank, torch.bfloat16)
    check_error_rule(lora_linear, lora_linear_ref, case, dropout_p=0.3, seed=SEED)
    assert set(on_triton) >= FORWARD | BACKWARD


@pytest.mark.parametrize(("rank", "dtype"), [(129, torch.float32), (257, torch.bfloat16)])
def test_ranks_that_do_not_fit_are_computed_in_plain_torch(on_triton: list[str], rank: int, dtype: torch.dtype) -> None:
    case = operands("everything", (6,), 40, 24, rank, dtype)
    check_error_rule(lora_linear, lora_linear_ref, case, dropout_p=0.3, seed=SEED)
    assert on_triton == []


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(on_triton: list[str], form: str, dropout_p: float) -> None:
    case = tracked(operands(form, (2, 3), 17, 18, 3, torch.float64))

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(case, values, strict=True))
        return lora_linear(**named, scale=0.5, dropout_p=dropout_p, seed=SEED)

    # The kernels take scale and λ in fp32.
    assert torch.autograd.gradcheck(function, list(case.values()), fast_mode=True)
    assert set(on_triton) >= FORWARD | BACKWARD


@pytest.mark.parametrize("asked", ["x", "weight", "bias", "A", "B", "gate", "mix", "merged_B", "merge_weight"])
def test_one_gradient_alone(on_triton: list[str], asked: str) -> None:
    case = operands("everything", (26,), 40, 24, 3, torch.float64)
    case["merge_weight"] = torch.tensor(0.25, dtype=torch.float64)
    case[asked].requires_grad_()
    terms = {"dropout_p": 0.2, "seed": SEED}
    got = gradients(lora_linear, case, None, **terms)
    assert got.keys() == {"y", asked}
    torch.testing.assert_close(got, gradients(lora_linear_ref, case, None, **terms))
    assert ("input_gradient" in on_triton) == (asked in ("x", "A"))
    assert ("output_gradient" in on_triton) == (asked not in ("weight", "bias"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(on_triton: list[str], layout: str) -> None:
    case = operands("everything", (20,), 40, 24, 5, torch.float64)
    case["merge_weight"] = torch.tensor(0.25, dtype=torch.float64)
    dy = torch.randn(20, 24, dtype=torch.float64)
    terms = {"dropout_p": 0.3, "seed": SEED}
    expected = gradients(lora_linear_ref, tracked(case), dy, **terms)
    moved = {n: laid_out(v, layout) if v.dim() == 2 else v for n, v in case.items()}
    leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
    got = gradients(lora_linear, leaves, laid_out(dy, layout), **terms)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)])
def test_leading_shapes(on_triton: list[str], lead: tuple[int, ...]) -> None:
    case = tracked(operands("plain", lead, 24, 20, 2, torch.float64))
    terms = {"dropout_p": 0.25, "seed": SEED}
    got = gradients(lora_linear, case, None, **terms)
    assert got["y"].shape == (*lead, 20)
    torch.testing.assert_close(got, gradients(lora_linear_ref, case, None, **terms))


@pytest.mark.parametrize("width", [16, 40, 13])
def test_masks_are_those_of_the_reference(on_triton: list[str], width: int) -> None:
    eye = torch.eye(width, dtype=torch.float64)
    case = {"weight": torch.zeros_like(eye), "A": eye, "B": eye}
    x = torch.ones(37, width, dtype=torch.float64, requires_grad=True)
    y = lora_linear(x, **case, dropout_p=0.25, seed=SEED)
    keep = ops.dropout_mask(SEED, x.shape, 0.25)
    assert torch.equal(y != 0, keep)
    y.sum().backward()
    assert torch.equal(x.grad != 0, keep)
    assert set(on_triton) >= FORWARD | BACKWARD


def test_the_same_bits_again(on_triton: list[str]) -> None:
    case = tracked(operands("everything", (50,), 70, 60, 12, torch.float32))
    first, second = (gradients(lora_linear, case, None, dropout_p=0.3, seed=SEED) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sums_are_parted_and_h_kept_in_the_branch_dtype(on_triton: list[str]) -> None:
    case = tracked(operands("plain", (50,), 200, 60, 12, torch.float32, torch.bfloat16))
    gradients(lora_linear, case, None)
    # h by parts of the columns; dB, dA by parts of the rows; dz by stripes
    assert on_triton.count("reduce") == 4


@pytest.fixture
def whole_parts() -> Iterator[None]:
    """torch may not round the parts of its products."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    yield
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def dtypes_of_parts(dtypes: str) -> set[torch.dtype]:
    """Of what ``reduce_kernel`` adds up in forward and backward."""
    case = operands("everything", (50,), 200, 60, 12, *DTYPES[dtypes])
    branch = prepare(
        **{n: v for n, v in case.items() if n not in ("weight", "bias")}, scale=2.0, dropout_p=0.0, seed=None
    )
    x, h, dy = case["x"], case["x"].new_empty(50, 12, dtype=case["A"].dtype), case["x"].new_empty(50, 60)
    with recorded() as launches:
        kernels.forward(x, case["weight"], None, branch)
        kernels.backward(dy, h, x, case["weight"], branch, [True, False, False, *[True] * 6])
    return {one.arguments[0].dtype for one in launches if one.kernel.__name__ == "reduce_kernel"}


def test_parts_are_rounded_only_where_torch_rounds_its_own(on_triton: list[str]) -> None:
    found = {dtypes: dtypes_of_parts(dtypes) for dtypes in ("bf16", "fp16", "fp32 on bf16", "fp32")}
    assert found.pop("bf16") == {torch.bfloat16}
    assert set(map(frozenset, found.values())) == {frozenset([torch.float32])}


def test_parts_are_whole_where_torch_may_not_round_its_own(on_triton: list[str], whole_parts: None) -> None:
    assert dtypes_of_parts("bf16") == {torch.float32}
    case = operands("everything", (50,), 200, 60, 12, torch.bfloat16)
    check_error_rule(lora_linear, lora_linear_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)


def test_error_rule_with_many_parts(on_triton: list[str]) -> None:
    """16 shares of dz, 8 parts of the other sums, rounded to bf16."""
    case = operands("plain", (256,), 512, 256, 12, torch.bfloat16)
    check_error_rule(lora_linear, lora_linear_ref, case, dropout_p=0.1, seed=SEED)


@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "fp32 on bf16"])
@pytest.mark.parametrize("width", [40, 41])
def test_epilogue(on_triton: list[str], width: int, dtypes: str, form: str) -> None:
    case = operands(form, (2, 10), width, 41, 12, *DTYPES[dtypes])
    with forced({"forward": "epilogue", "backward": "epilogue"}):
        check_error_rule(lora_linear, lora_linear_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)
    assert {"project", "epilogue"} <= set(on_triton) and "accumulate" not in on_triton


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "cautious"])
def test_shipped_shapes(on_triton: list[str], family: str) -> None:
    case = operands("everything", (70,), 144, 136, 20, torch.bfloat16)
    with forced({"family": family, **dict.fromkeys(SMALL)}):
        check_error_rule(lora_linear, lora_linear_ref, case, dropout_p=0.3, seed=SEED)
    assert set(on_triton) >= FORWARD | BACKWARD


def test_half_of_the_ranks_of_a_tile_are_not_read(on_triton: list[str]) -> None:
    """Lanes of padding: A's last row ends where its storage does, and so does B; the fixture watches addresses."""
    case: dict[str, Any] = tracked(operands("mix", (3,), 9, 7, 1, torch.float32))
    got = gradients(lora_linear, case, None)
    torch.testing.assert_close(got, gradients(lora_linear_ref, case, None))


def test_rows_further_apart_than_32_bits_can_say(on_triton: list[str]) -> None:
    torch.use_deterministic_algorithms(False)  # which would fill the 4 GiB that are otherwise never touched
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    case = operands("plain", (2,), 24, 20, 3, torch.float32, torch.bfloat16)
    dy = torch.randn(2, 20).bfloat16()
    expected = gradients(lora_linear, tracked(case), dy)
    leaves = tracked(case)
    leaves["x"] = storage.as_strided((2, 24), (2**31 + 16, 1)).copy_(case["x"]).requires_grad_()
    assert leaves["x"].stride(0) > 2**31
    got = gradients(lora_linear, leaves, dy)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert set(on_triton) >= FORWARD | BACKWARD


def test_reference_backend_launches_nothing(on_triton: list[str]) -> None:
    case = tracked(operands("plain", (5,), 40, 24, 2, torch.float32))
    with ops.use_backend("reference"):
        gradients(lora_linear, case, None)
    assert on_triton == []
    with forced({"project": Config(16, 16)}):
        gradients(lora_linear, case, None)
    assert "project" in on_triton
