from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mbf import ops
from mbf.ops import frozen_linear, frozen_linear_ref
from mbf.ops.frozen_linear import gains
from tests.ops.lora_cases import LAYOUTS, assert_accurate, laid_out

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LEADS = [(1,), (7,), (300,), (2, 431), (2, 3, 5), (), (0,), (3, 0)]


def results(function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    ("d_in", "d_out", "biased"), [(63, 500, True), (64, 96, False), (1, 3, True), (700, 65, False)]
)
def test_error_rule(lead: tuple[int, ...], d_in: int, d_out: int, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(d_in + len(lead))
    x, weight = torch.randn(*lead, d_in).to(dtype), (torch.randn(d_out, d_in) / d_in**0.5).to(dtype)
    bias = torch.randn(d_out).to(dtype) if biased else None
    dy = torch.randn(*lead, d_out).to(dtype)
    got, plain = (results(function, x, weight, bias, dy) for function in (frozen_linear, F.linear))
    wide = [None if t is None else t.double() for t in (x, weight, bias, dy)]
    assert_accurate(got, plain, results(F.linear, *wide))


@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_wherever_they_lie(layout: str, dtype: torch.dtype) -> None:
    x, weight, dy = torch.randn(200, 80).to(dtype), (torch.randn(96, 80) / 9).to(dtype), torch.randn(200, 96).to(dtype)
    lies = laid_out(weight, layout)
    got, plain = results(frozen_linear, x, lies, None, dy), results(F.linear, x, weight, None, dy)
    assert_accurate(got, plain, results(F.linear, x.double(), weight.double(), None, dy.double()))


def test_x_of_any_strides_and_poisoned_memory() -> None:
    x = torch.full((90, 3, 140), torch.nan)[:, 1, ::2]
    x.copy_(torch.randn(90, 70))
    weight, dy = torch.randn(40, 70), torch.randn(40, 90).t()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        got = results(frozen_linear, x, weight, None, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_accurate(
        got, results(F.linear, x, weight, None, dy), results(F.linear, x.double(), weight.double(), None, dy)
    )


@pytest.mark.parametrize("rows", [5, 700])
def test_same_bits_for_every_number_of_threads(rows: int) -> None:
    x, weight, dy = torch.randn(rows, 200), torch.randn(300, 200), torch.randn(rows, 300)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(results(frozen_linear, x, weight, None, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_gradcheck() -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3, 5), (6, 5), (6,)))
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, bias), x.requires_grad_())


def test_opcheck() -> None:
    x, weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.randn(5)
    torch.library.opcheck(torch.ops.mbf.frozen_linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.mbf.frozen_linear.default, (x, weight, None))
    torch.library.opcheck(torch.ops.mbf.frozen_linear_backward.default, (torch.randn(2, 3, 5), weight))


def test_keeps_nothing_but_the_weight() -> None:
    x, weight = torch.randn(30, 20, requires_grad=True), torch.randn(10, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x, weight)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


def test_reference_and_no_grad() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with ops.use_backend("reference"):
        assert torch.equal(frozen_linear(x, weight), frozen_linear_ref(x, weight))
    assert not frozen_linear(x, weight).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(frozen_linear(x, weight), F.linear(x, weight))


def test_autocast() -> None:
    x, weight, bias = torch.randn(70, 80), torch.randn(90, 80), torch.randn(90)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(x, weight, bias)
    expected = frozen_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert y.dtype is torch.bfloat16 and torch.equal(y, expected)


def test_compiles_in_one_graph() -> None:
    x, weight = torch.randn(70, 80, requires_grad=True), torch.randn(90, 80)
    y = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(70, 80), rtol=1e-4, atol=1e-4)


x, W, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((x[:, :3], W), ValueError, r"weight has shape \[5, 4\] and x \[3, 3\]"),
        ((x, W[0]), ValueError, r"weight has shape \[4\]"),
        ((x, W, b[:4]), ValueError, r"bias has shape \[4\]; it must be \[d_out\] = \[5\]"),
        ((x, W.double()), TypeError, "weight is torch.float64 on cpu but x torch.float32 on cpu"),
        ((x, W, b.half()), TypeError, "bias is torch.float16"),
        ((x, W.clone().requires_grad_()), ValueError, "weight requires a gradient"),
        ((x, W, b.clone().requires_grad_()), ValueError, r"bias.requires_grad_\(False\)"),
        ((x.long(), W.long()), TypeError, "x is torch.int64"),
    ],
)
def test_bad_input(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        frozen_linear(*given)


@pytest.mark.parametrize(
    ("kernels", "fp32", "bf16", "fp16"),
    [
        ("AVX2, own products", True, True, True),
        ("baseline", False, True, True),
        ("AVX-512, native bf16", False, False, True),
        ("AVX-512, native bf16, own products", True, False, True),
        ("AVX-512, native bf16, native fp16, fp32 on AMX", True, False, False),
        ("", False, False, False),
    ],
)
def test_where_it_gains(monkeypatch: pytest.MonkeyPatch, kernels: str, fp32: bool, bf16: bool, fp16: bool) -> None:
    status = ops.native_status()._replace(kernels=kernels)
    monkeypatch.setattr(sys.modules["mbf.ops.frozen_linear"], "native_status", lambda: status)
    assert [gains(dtype, 1000) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [fp32, bf16, fp16]
    assert not any(gains(dtype, 3) for dtype in DTYPES)
    assert not gains(torch.float64, 1000)
