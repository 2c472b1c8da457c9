from __future__ import annotations

import pytest
import torch
from mbf.kernels import mora as kernels
from mbf.kernels._tune import forced
from torch import Tensor

from mbf import ops
from mbf.ops import mora_accumulate, mora_accumulate_ref
from tests.kernels.conftest import SMALL
from tests.ops.lora_cases import LAYOUTS, SEED, laid_out, tracked
from tests.ops.test_mora import DTYPES, KINDS, case_of, check_error_rule, dense, results, test_opcheck

ALL = {"square", "square_input_gradient", "square_gradient", "reduce"}
# Chunks that fill the input or not (d_in), and the output once, more often, or in part (d_out); an odd q for kind 1.
SHAPES = [(32, 32, 16), (48, 40, 32), (34, 75, 18), (37, 20, 12), (52, 60, 50), (12, 6, 4)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEAST_STEPS", 1)
    monkeypatch.setattr(kernels, "_DEPTH", 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule(on_triton: list[str], dtypes: str, kind: int) -> None:
    case = case_of((2, 9), 41, 50, 24, *DTYPES[dtypes])
    check_error_rule(case, kind=kind, scale=1.7, dropout_p=0.3, seed=SEED)
    assert set(on_triton) >= ALL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("d_in", "d_out", "q"), SHAPES)
def test_error_rule_at_other_shapes(on_triton: list[str], d_in: int, d_out: int, q: int, p: float, kind: int) -> None:
    case = case_of((18,), d_in, d_out, q + (kind == 1), *DTYPES["fp32"])
    check_error_rule(case, kind=kind, scale=0.3, dropout_p=p, seed=SEED if p else None)
    assert set(on_triton) >= ALL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_in", "d_out", "q"), [(48, 40, 16), (40, 70, 24)])
def test_is_the_dense_matrix_of_the_definition(on_triton: list[str], d_in: int, d_out: int, q: int, kind: int) -> None:
    case = case_of((9,), d_in, d_out, q, *DTYPES["fp64"])
    W = dense(case["M"], d_in, d_out, kind)
    dy = torch.randn(9, d_out, dtype=torch.float64)
    got = results(mora_accumulate, tracked(case), dy, kind=kind, scale=0.5)
    torch.testing.assert_close(got["out"], case["y"] + 0.5 * case["x"] @ W.T)
    torch.testing.assert_close(got["x"], 0.5 * dy @ W)
    assert set(on_triton) >= ALL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(on_triton: list[str], dropout_p: float, kind: int) -> None:
    case = tracked(case_of((2, 3), 17, 23, 6, *DTYPES["fp64"]))

    def function(*values: Tensor) -> Tensor:
        return mora_accumulate(*values, kind=kind, scale=0.5, dropout_p=dropout_p, seed=SEED)

    assert torch.autograd.gradcheck(function, list(case.values()), fast_mode=True)
    assert set(on_triton) >= ALL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ["y", "x", "M"])
def test_one_gradient_alone(on_triton: list[str], asked: str, kind: int) -> None:
    case = case_of((26,), 40, 24, 12, *DTYPES["fp64"])
    case[asked].requires_grad_()
    terms = {"kind": kind, "dropout_p": 0.25, "seed": SEED}
    got = results(mora_accumulate, case, None, **terms)
    assert got.keys() == {"out", asked}
    torch.testing.assert_close(got, results(mora_accumulate_ref, case, None, **terms))
    assert ("square_input_gradient" in on_triton) == (asked == "x")
    assert ("square_gradient" in on_triton) == (asked == "M")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(on_triton: list[str], layout: str, kind: int) -> None:
    case = case_of((20,), 40, 56, 12, *DTYPES["fp64"])
    dy = torch.randn(20, 56, dtype=torch.float64)
    terms = {"kind": kind, "dropout_p": 0.25, "seed": SEED}
    expected = results(mora_accumulate_ref, tracked(case), dy, **terms)
    leaves = {name: laid_out(value, layout).detach().requires_grad_() for name, value in case.items()}
    got = results(mora_accumulate, leaves, laid_out(dy, layout), **terms)
    torch.testing.assert_close(got, expected)
    assert torch.equal(leaves["y"], case["y"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 4)])
def test_leading_shapes(on_triton: list[str], lead: tuple[int, ...], kind: int) -> None:
    case = tracked(case_of(lead, 24, 20, 8, *DTYPES["fp64"]))
    terms = {"kind": kind, "dropout_p": 0.25, "seed": SEED}
    torch.testing.assert_close(
        results(mora_accumulate, case, None, **terms), results(mora_accumulate_ref, case, None, **terms)
    )
    assert set(on_triton) >= ALL


@pytest.mark.parametrize(("rows", "d_in", "d_out", "q"), [(0, 8, 8, 4), (3, 0, 8, 4), (3, 8, 0, 4), (3, 7, 20, 8)])
def test_what_is_empty_or_shorter_than_a_chunk_is_computed_in_plain_torch(
    on_triton: list[str], rows: int, d_in: int, d_out: int, q: int
) -> None:
    case = case_of((rows,), d_in, d_out, q, *DTYPES["fp64"])
    torch.testing.assert_close(
        results(mora_accumulate, tracked(case)), results(mora_accumulate_ref, tracked(case)), atol=1e-9, rtol=1e-9
    )
    assert on_triton == []


@pytest.mark.parametrize("width", [48, 40])
def test_masks_are_those_of_the_reference(on_triton: list[str], width: int) -> None:
    """Of kind 1 with M = I of x's size, y is drop(x)."""
    x = torch.ones(37, width, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(width, dtype=torch.float64)
    y = mora_accumulate(torch.zeros_like(x), x, eye, kind=1, dropout_p=0.25, seed=SEED)
    keep = ops.dropout_mask(SEED, x.shape, 0.25)
    assert torch.equal(y != 0, keep)
    y.sum().backward()
    assert torch.equal(x.grad != 0, keep)
    assert {"square", "square_input_gradient"} <= set(on_triton)


def test_the_same_bits_again(on_triton: list[str]) -> None:
    case = tracked(case_of((20,), 40, 36, 24, *DTYPES["fp32"]))
    first, second = (results(mora_accumulate, case, None, dropout_p=0.3, seed=SEED) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sums_are_parted(on_triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    reduced = kernels.reduced
    monkeypatch.setattr(kernels, "reduced", lambda sums, *rest: parts.append(len(sums)) or reduced(sums, *rest))
    check_error_rule(case_of((90,), 30, 30, 24, *DTYPES["fp32"]))
    assert min(parts) > 5


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "cautious"])
@pytest.mark.parametrize("dtypes", ["bf16", "fp32 on bf16"])
@pytest.mark.parametrize(("d_in", "d_out", "q"), [(144, 136, 16), (150, 340, 70), (272, 272, 136)])
def test_shipped_shapes(on_triton: list[str], d_in: int, d_out: int, q: int, dtypes: str, family: str) -> None:
    case = case_of((70,), d_in, d_out, q, *DTYPES[dtypes])
    with forced({"family": family, **dict.fromkeys(SMALL)}):
        check_error_rule(case, dropout_p=0.3, seed=SEED)
    assert set(on_triton) >= ALL


@pytest.mark.parametrize("kind", KINDS)
def test_rows_further_apart_than_32_bits_can_say(on_triton: list[str], kind: int) -> None:
    torch.use_deterministic_algorithms(False)  # which would fill the 4 GiB that are otherwise never touched
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    case = case_of((2,), 24, 20, 8, *DTYPES["fp32 on bf16"])
    dy = torch.randn(2, 20).bfloat16()
    expected = results(mora_accumulate, tracked(case), dy, kind=kind)
    leaves = tracked(case)
    leaves["x"] = storage.as_strided((2, 24), (2**31 + 16, 1)).copy_(case["x"]).requires_grad_()
    got = results(mora_accumulate, leaves, dy, kind=kind)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_checks(on_triton: list[str], kind: int) -> None:
    test_opcheck(kind)
    assert set(on_triton) >= ALL


def test_reference_backend_launches_nothing(on_triton: list[str]) -> None:
    case = tracked(case_of((5,), 40, 24, 8, *DTYPES["fp32"]))
    with ops.use_backend("reference"):
        results(mora_accumulate, case)
    assert on_triton == []
    results(mora_accumulate, case)
    assert set(on_triton) >= ALL
