"""Base products, whoever makes them: the BLAS, loops of our own (csrc/cpu/lora/gemm.h), tiles of AMX (amx.h).

What only one of them does is tested where this machine has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mbf.ops import frozen_linear, lora_linear, lora_linear_ref, native_status
from tests.ops.lora_cases import LAYOUTS, SEED, check_error_rule, gradients, laid_out, operands, tracked, with_weight

KERNELS = native_status().kernels
OWN = "own products"


def only_with(kernel: str) -> pytest.MarkDecorator:
    """For what that entry of ``native_status().kernels`` promises."""
    found = KERNELS or native_status().reason
    return pytest.mark.skipif(kernel not in KERNELS, reason=f"none with {kernel!r} here; the kernels are {found}")


def base_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """y and, with dy = x, dx of a square layer whose branch is exactly zero."""
    x = x.clone().requires_grad_()
    A = torch.randn(2, x.shape[1]) * 2**-20
    y = lora_linear(x, weight, A, torch.zeros(weight.shape[0], 2))
    (dx,) = torch.autograd.grad(y, x, x.detach())
    return y.detach(), dx


def permutation(size: int) -> tuple[Tensor, Tensor]:
    """Where each column comes from, and the matrix; its entries are powers of two."""
    order = torch.randperm(size)
    weight = torch.zeros(size, size)
    weight[torch.arange(size), order] = 0.25
    return order, weight


@pytest.mark.parametrize("rows", [64, 95, 257, 700])
@pytest.mark.parametrize("size", [64, 77, 577, 1200])
def test_every_bit_of_fp32_gets_through(rows: int, size: int) -> None:
    """24 random significant bits an element and exponents far apart, moved by a permutation: the result is exact."""
    mantissa = torch.randint(2**23, 2**24, (rows, size)).float()
    x = mantissa * torch.randn(rows, size).sign() * 2.0 ** torch.randint(-60, 60, (rows, size))
    order, weight = permutation(size)
    y, dx = base_product(x, weight)
    assert torch.equal(y, 0.25 * x[:, order])
    assert torch.equal(dx, 0.25 * x[:, order.argsort()])


@pytest.mark.parametrize(("rows", "size"), [(64, 64), (131, 100), (300, 700), (50, 1600)])
def test_sums_of_integers_are_exact(rows: int, size: int) -> None:
    x = torch.randint(-(2**9), 2**9, (rows, size)).float()
    weight = torch.randint(-4, 5, (size, size)).float()
    y, dx = base_product(x, weight)
    assert torch.equal(y.double(), x.double() @ weight.double().t())
    assert torch.equal(dx.double(), x.double() @ weight.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(64, 64, 64), (431, 500, 63), (257, 100, 1200), (70, 1300, 65)])
def test_error_rule(rows: int, d_in: int, d_out: int, layout: str, bias: bool) -> None:
    case = operands("plain", (rows,), d_in, d_out, 5, torch.float32)
    weight = laid_out(case.pop("weight"), layout)
    case["bias"] = case["bias"] if bias else None
    both = (with_weight(function, weight) for function in (lora_linear, lora_linear_ref))
    check_error_rule(*both, case, scale=1.3, dropout_p=0.1, seed=SEED)


@pytest.mark.parametrize(("rows", "size"), [(100, 600), (300, 2000), (64, 6000)])
def test_as_accurate_as_blas(rows: int, size: int) -> None:
    """Not only by the rule, whose 1e-6 would let two parts of three pass, or a sum that is never begun anew."""
    x, weight = torch.randn(rows, size), torch.randn(size, size)
    y, _ = base_product(x, weight)
    exact = x.double() @ weight.double().t()
    error, blas = ((value.double() - exact).norm() / exact.norm() for value in (y, x @ weight.t()))
    assert error < (1.5 if OWN in KERNELS else 1.2) * blas < 1e-6


@pytest.mark.parametrize("rows", [64, 300])
@pytest.mark.parametrize("size", [96, 384, 1000])
def test_the_base_is_not_rounded_at_the_size_of_a_larger_branch(rows: int, size: int) -> None:
    """As where CorDA or PiSSA has put the most of W into the adapter: what is left of the base is small."""
    A, B, x = torch.rand(4, size) / size, torch.rand(size, 4), torch.rand(rows, size)
    weight = torch.randn(size, size) * size**-0.5 * 0.1

    def found(product: Any, dtype: torch.dtype) -> list[Tensor]:
        here = x.to(dtype).requires_grad_()
        y = product(here, weight.to(dtype), A.to(dtype), B.to(dtype))
        return [y, *torch.autograd.grad(y, here, x.to(dtype))]

    def as_peft(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ weight.T + x @ A.T @ B.T

    for got, stock, exact in zip(
        *(found(*case) for case in ((lora_linear, torch.float32), (as_peft, torch.float32), (as_peft, torch.float64))),
        strict=True,
    ):
        assert (got - exact).norm() <= 1.5 * (stock - exact).norm()


@only_with("AMX")
def test_what_is_not_finite_stays_so_in_its_own_row() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(128, 96), torch.rand(96, 96) + 0.5
    x[3, 7], x[40, 9], x[90, 0] = torch.nan, torch.inf, -torch.inf
    x[91, 1] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # a NaN with its low bits only
    y, dx = base_product(x, weight)
    bad = torch.zeros(128, dtype=torch.bool)
    bad[[3, 40, 90, 91]] = True
    for found in (y, dx):
        assert torch.equal(~found.isfinite().all(1), bad)
        assert found[bad].isfinite().sum() == 0


def test_large_and_small_numbers() -> None:
    order, weight = permutation(64)
    x = torch.tensor([3e38, 1e30, 1.0, 1e-30, 3e-38, 0.0])[torch.randint(6, (64, 64))]
    y, _ = base_product(x, weight)
    torch.testing.assert_close(y, 0.25 * x[:, order], rtol=2**-16, atol=2**-126)
    normal = x.abs() > 1e-31
    assert torch.equal(y[normal[:, order]], (0.25 * x)[:, order][normal[:, order]])


@only_with("AMX")
def test_this_is_not_blas() -> None:
    """BLAS knows numbers below 2⁻¹²⁶, tiles do not."""
    y, _ = base_product(torch.full((64, 64), 2.0**-130), torch.eye(64))
    assert not y.any()
    y, _ = base_product(torch.full((63, 64), 2.0**-130), torch.eye(64))  # too few rows to be worth the packing
    assert (y == 2.0**-130).all()


@pytest.mark.skipif(not ("AMX" in KERNELS or OWN in KERNELS), reason="beyond four threads a tile BLAS cuts itself")
@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(512, 576, 576), (200, 2100, 520), (1024, 192, 70)])
def test_same_bits_however_many_threads_cut_the_product(rows: int, d_in: int, d_out: int) -> None:
    case = operands("plain", (rows,), d_in, d_out, 8, torch.float32)
    case |= {name: case[name].requires_grad_() for name in ("x", "A", "B")}
    dy = torch.randn(rows, d_out)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7, 32):
            torch.set_num_threads(threads)
            found.append(gradients(lora_linear, case, dy, dropout_p=0.2, seed=SEED))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name in other if not torch.equal(found[0][name], other[name])] == []


HELD_BACK = """
import torch
from mbf.ops import lora_linear, native_status
assert "AMX" not in native_status().kernels, native_status().kernels
y = lora_linear(torch.full((64, 64), 2.0**-130), torch.eye(64), torch.ones(2, 64), torch.zeros(64, 2))
assert (y == 2.0**-130).all()
"""


@only_with("AMX")
@pytest.mark.parametrize(
    ("variable", "value"), [("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"), ("ATEN_CPU_CAPABILITY", "avx2")]
)
def test_held_back_by_the_environment(variable: str, value: str) -> None:
    environment = os.environ | {variable: value}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", HELD_BACK], env=environment, cwd=root, check=True, timeout=300)


def test_backward_of_an_x_that_needs_no_gradient() -> None:
    case = tracked(operands("plain", (130,), 80, 90, 3, torch.float32))
    case["x"] = case["x"].detach()
    found = gradients(lora_linear, case, None)
    assert "x" not in found and all(value.isfinite().all() for value in found.values())


# -- loops of our own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out"),
    [(48, 32, 32), (49, 769, 47), (53, 1537, 16 * 3 + 1), (103, 40, 1030), (600, 96, 48), (55, 2048, 64)],
)
def test_edges_of_what_is_packed(rows: int, d_in: int, d_out: int, dtype: torch.dtype) -> None:
    """Rows, columns and depths that end inside a tile, a sliver and a block, with a branch and a mask on each."""
    case = operands("everything", (rows,), d_in, d_out, 9, torch.float32, base=dtype)
    weight = case.pop("weight")
    both = (with_weight(function, weight) for function in (lora_linear, lora_linear_ref))
    check_error_rule(*both, case, scale=0.7, dropout_p=0.3, seed=SEED)


@pytest.mark.parametrize("rank", [1, 200, 256, 257, 600])
def test_ranks_in_the_start_of_a_tile(rank: int) -> None:
    case = operands("plain", (61,), 70, 90, rank, torch.float32)
    weight = case.pop("weight")
    both = (with_weight(function, weight) for function in (lora_linear, lora_linear_ref))
    check_error_rule(*both, case, dropout_p=0.1, seed=SEED)


@only_with(OWN)
def test_what_is_not_finite_goes_the_way_of_ieee() -> None:
    x, weight = torch.randn(130, 96), torch.rand(96, 96) + 0.5
    x[3, 7], x[40, 9], x[129, 0] = torch.nan, torch.inf, -torch.inf
    for found in (frozen_linear(x, weight), torch.ops.mbf.frozen_linear_backward(x, weight)):
        assert found[3].isnan().all() and (found[40] == torch.inf).all() and (found[129] == -torch.inf).all()
        assert found.isfinite().all(1).sum() == 127


@pytest.mark.parametrize("rows", range(48, 60))
def test_every_rest_of_a_tile(rows: int) -> None:
    """Tiles of our own loops have six or twelve rows, and slivers sixteen or thirty-two columns."""
    for d_in, d_out in ((32, 33), (40, 48), (386, 79)):
        x, weight = torch.randint(-8, 8, (rows, d_in)).float(), torch.randint(-8, 8, (d_out, d_in)).float()
        y = frozen_linear(x, weight)
        assert torch.equal(y.double(), x.double() @ weight.double().mT)
        dx = torch.ops.mbf.frozen_linear_backward(y.remainder(8), weight)
        assert torch.equal(dx.double(), y.remainder(8).double() @ weight.double())


@only_with(OWN)
def test_our_loops_made_it() -> None:
    """They sum two halves of a depth of 576, each in order: beside 2²⁴ the ones of the first are lost."""
    x = torch.ones(48, 576)
    x[:, 0] = 2.0**24
    assert (frozen_linear(x, torch.ones(576, 576)) == 2.0**24 + 288).all()
    assert (torch.ops.mbf.frozen_linear_backward(x, torch.ones(576, 576)) == 2.0**24 + 288).all()


OWN_HELD_BACK = """
from mbf.ops import native_status
assert "own products" not in native_status().kernels, native_status().kernels
"""


@only_with(OWN)
def test_own_products_held_back_by_the_environment() -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", OWN_HELD_BACK], env=environment, cwd=root, check=True, timeout=300)
