from __future__ import annotations

import pytest
import torch

from mbf.ops import lilora_accumulate, lilora_accumulate_ref
from tests.ops import test_lilora
from tests.ops.lora_cases import SEED, check_error_rule, gradients, tracked
from tests.ops.test_lilora import ASKED, DTYPES, case_of
from tests.ops.test_lora_accumulate import DTYPES as SIBLINGS

TERMS = {"dropout_p": 0.3, "seed": SEED}
OWN = {"lilora_route", "lilora_unroute"}


@pytest.fixture(autouse=True)
def parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sum over rows several programs have parts."""
    monkeypatch.setattr("mbf.kernels.lilora.LEAST_ROWS", 16)
    monkeypatch.setattr("mbf.kernels.lilora.ROUTED", dict.fromkeys((16, 32, 64, 128, 256), (16, 4)))


@pytest.fixture
def by_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no program could have Ea whole."""
    monkeypatch.setattr("mbf.kernels.lilora.MOST_MIX", 8)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", SIBLINGS)
def test_error_rule(on_triton: list[str], dtypes: str, dropout_p: float) -> None:
    case = case_of((2, 20), 41, 24, 12, 5, *DTYPES[dtypes])
    seed = SEED if dropout_p else None
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, dropout_p=dropout_p, seed=seed)
    assert {"project", "accumulate", "output_gradient", "input_gradient"} | OWN <= set(on_triton)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 20), (17, 15), (24, 8), (40, 20)], ids=str)
@pytest.mark.parametrize("rows", [1, 37])
def test_ranks(on_triton: list[str], rows: int, ranks: tuple[int, int]) -> None:
    case = case_of((rows,), 24, 40, *ranks, *DTYPES["fp64"])
    dy = torch.randn(rows, 40, dtype=torch.float64)
    got, expected = (gradients(f, tracked(case), dy, **TERMS) for f in (lilora_accumulate, lilora_accumulate_ref))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(lilora_accumulate(**case, **TERMS), lilora_accumulate_ref(**case, **TERMS))
    assert set(on_triton) >= OWN


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32 on bf16"])
def test_where_ea_is_too_large_blas_has_it(on_triton: list[str], by_blas: None, dtypes: str) -> None:
    case = case_of((2, 20), 41, 24, 12, 5, *DTYPES[dtypes])
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, **TERMS)
    assert {"project", "accumulate", "output_gradient"} <= set(on_triton) and not OWN & set(on_triton)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_one_gradient_alone(on_triton: list[str], request: pytest.FixtureRequest, asked: str, fallback: bool) -> None:
    if fallback:
        request.getfixturevalue("by_blas")
    case = case_of((40,), 24, 40, 5, 3, *DTYPES["fp64"])
    case[asked].requires_grad_()
    got = gradients(lilora_accumulate, case, None, **TERMS)
    torch.testing.assert_close(got, gradients(lilora_accumulate_ref, case, None, **TERMS))
    assert ("input_gradient" in on_triton) == (asked in ("x", "A"))
    assert ("lilora_unroute" in on_triton) == (not fallback and asked in ("x", "A", "Ea", "weight", "scale"))


def test_numbers_by_value(on_triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((20,), 24, 40, 5, 3, *DTYPES["fp32"])
    expected = gradients(lilora_accumulate, tracked(case), None, **TERMS)
    monkeypatch.setattr("mbf.kernels.lilora.number_argument", lambda number, device: (number.item(), True))
    torch.testing.assert_close(gradients(lilora_accumulate, tracked(case), None, **TERMS), expected)


def test_leaves_y_and_strides_alone(on_triton: list[str]) -> None:
    case = case_of((20,), 24, 40, 5, 3, *DTYPES["fp32"])
    expected = gradients(lilora_accumulate, tracked(case), None, **TERMS)
    moved = {n: v.t().contiguous().t() if v.dim() else v.clone() for n, v in case.items()}
    got = gradients(lilora_accumulate, {n: v.requires_grad_() for n, v in moved.items()}, None, **TERMS)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    out = lilora_accumulate(**case, **TERMS)
    assert torch.equal(moved["y"], case["y"]) and torch.equal(lilora_accumulate(**moved, **TERMS), out)
    assert out.is_contiguous() and "accumulate" in on_triton


@pytest.mark.parametrize("sizes", [(6, 5, 100, 40), (6, 5, 2, 0), (6, 5, 0, 2), (6, 0, 2, 1), (0, 5, 2, 1)], ids=str)
def test_declines_what_it_does_not_compute(on_triton: list[str], sizes: tuple[int, ...]) -> None:
    case = case_of((7,), *sizes, *DTYPES["fp32"])
    got, expected = (gradients(f, tracked(case), None, **TERMS) for f in (lilora_accumulate, lilora_accumulate_ref))
    torch.testing.assert_close(got, expected)
    assert not on_triton


def test_opcheck(on_triton: list[str]) -> None:
    test_lilora.test_opcheck()
    assert on_triton
