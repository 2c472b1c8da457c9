"""lora_linear.cu and the kernels of csrc/cuda/lora under the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mbf.ops import (
    GroupLayer,
    LoraTerms,
    _cuda,
    _gpu,
    dropout_mask,
    lora_group,
    lora_group_ref,
    lora_linear,
    lora_linear_ref,
    lora_mlp,
    lora_mlp_ref,
)
from mbf.ops.philox import keep_scale
from tests.cuda.lora import DTYPES, assert_same_bits, linear, passes, poisoned
from tests.ops.lora_cases import FORMS, LAYOUTS, SEED, check_error_rule, laid_out, operands

every_dtype = pytest.mark.parametrize("dtypes", DTYPES)


def check(cuda: Any, form: str, lead: tuple[int, ...], d_in: int, d_out: int, r: int, dtypes: str) -> None:
    case = operands(form, lead, d_in, d_out, r, *DTYPES[dtypes])
    with poisoned():
        check_error_rule(linear(cuda), lora_linear_ref, case, scale=0.7, dropout_p=0.3, seed=SEED)


@every_dtype
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_dtype(cuda: Any, dtypes: str, form: str) -> None:
    check(cuda, form, (2, 9), 63, 40, 12, dtypes)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "r"),
    [(1, 63, 130, 3), (7, 130, 63, 1), (43, 64, 136, 12), (43, 130, 200, 16), (7, 520, 63, 33), (43, 63, 264, 64)],
)
def test_drawn_shapes(cuda: Any, dtypes: str, rows: int, d_in: int, d_out: int, r: int) -> None:
    check(cuda, "everything", (rows,), d_in, d_out, r, dtypes)


@pytest.mark.parametrize(("dtypes", "r"), [("fp32", 65), ("fp16", 100), ("bf16", 256)])
def test_ranks_beyond_a_chunk(cuda: Any, dtypes: str, r: int) -> None:
    check(cuda, "everything", (19,), 72, 40, r, dtypes)


@pytest.mark.parametrize(("dtypes", "r"), [("fp32", 3), ("bf16", 3), ("bf16", 20)])
def test_sums_in_parts(cuda: Any, traffic: Any, dtypes: str, r: int) -> None:
    """Columns of x in parts, rows of x and dy in parts, and dy in stripes."""
    case = operands("merged", (530,), 1090, 530, r, *DTYPES[dtypes])
    exact = {name: value.double() if value.is_floating_point() else value for name, value in case.items()}
    found = passes(cuda, case, dropout_p=0.2, seed=SEED)
    wanted = passes(ReferenceOps, exact, dropout_p=0.2, seed=SEED)
    of_torch = passes(ReferenceOps, case, dropout_p=0.2, seed=SEED)
    for n, (a, b, c) in enumerate(zip(found, wanted, of_torch, strict=True)):
        if a is None:
            assert b is None
            continue
        error, allowed = ((t.double() - b).norm() / b.norm() for t in (a, c))
        slack = 1e-6 + (torch.finfo(a.dtype).eps if a.numel() < 64 else 0.0)
        assert error <= 2 * allowed + slack, f"result {n}: {error:.3g}, torch {allowed:.3g}"


class ReferenceOps:
    """The operators in plain torch."""

    from mbf.ops.lora_linear import _backward as lora_linear_backward
    from mbf.ops.lora_linear import _forward as lora_linear

    lora_linear, lora_linear_backward = staticmethod(lora_linear), staticmethod(lora_linear_backward)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_the_mask_of_the_projection(cuda: Any, width: int, p: float) -> None:
    x, eye = torch.ones(3, 15, width), torch.eye(width)
    h = passes(
        cuda, {"x": x, "weight": torch.zeros(2, width), "A": eye, "B": torch.ones(2, width)}, dropout_p=p, seed=SEED
    )[1]
    mask = dropout_mask(SEED, x.shape, p)
    assert torch.equal(h, mask * torch.tensor(keep_scale(p), dtype=torch.float32))


@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_of_the_gradients(cuda: Any, width: int, dtype: torch.dtype) -> None:
    """With W = 0 and all else one, dx is mask times constant; with dh one row's alone, dA is that row's mask."""
    p, rows = 0.25, 45
    mask = dropout_mask(SEED, (rows, width), p)
    x, A, B = (torch.ones(shape, dtype=dtype) for shape in ((rows, width), (2, width), (1, 2)))
    h, zero = torch.zeros(rows, 2, dtype=dtype), torch.zeros(1, width, dtype=dtype)
    operands_ = (A, B, 1.0, None, None, p, torch.tensor(SEED), None, None)
    for row in (0, 31, 44):
        dy = torch.zeros(rows, 1, dtype=dtype)
        dy[row] = 1.0
        found = cuda.lora_linear_backward(dy, h, x, zero, *operands_, [True, False, False, True] + [False] * 5)
        factor = torch.tensor(keep_scale(p))
        assert torch.equal(found[0][row], (mask[row] * 2 * factor).to(dtype))
        assert found[0].count_nonzero() == mask[row].sum()
        assert torch.equal(found[3], (mask[row] * factor).to(dtype).expand(2, -1))


def test_what_is_dropped_does_not_count(cuda: Any) -> None:
    case = operands("plain", (40,), 64, 16, 4, torch.float32)
    mask = dropout_mask(SEED, (40, 64), 0.5)
    expected = passes(cuda, case, dropout_p=0.5, seed=SEED)
    spoilt = {**case, "x": torch.where(mask, case["x"], torch.inf)}
    found = passes(cuda, spoilt, dropout_p=0.5, seed=SEED)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[5], expected[5])  # h and dA


def test_a_probability_that_rounds_to_nothing_drops_nothing(cuda: Any) -> None:
    case = operands("plain", (5,), 64, 16, 4, torch.float32)
    assert_same_bits(passes(cuda, case, dropout_p=2.0**-18, seed=SEED), passes(cuda, case))


# -- the order of threads, layouts, what is asked ----------------------------------------------------------------------


@pytest.mark.parametrize(("dtypes", "r"), [("fp32", 12), ("bf16", 12), ("fp16", 40), ("bf16", 80)])
def test_the_same_bits_in_every_order_of_threads(cuda: Any, order: int, dtypes: str, r: int) -> None:
    case = operands("everything", (37,), 130, 136, r, *DTYPES[dtypes])
    found = passes(cuda, case, dropout_p=0.3, seed=SEED)
    cuda.seed(0)
    assert_same_bits(found, passes(cuda, case, dropout_p=0.3, seed=SEED))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(cuda: Any, layout: str) -> None:
    case = operands("everything", (21,), 64, 40, 8, torch.bfloat16)
    elsewhere = {name: laid_out(case[name], layout) for name in ("x", "A", "B", "mix", "merged_B")}
    expected = passes(cuda, case, dropout_p=0.3, seed=SEED)
    found = passes(cuda, {**case, **elsewhere}, dropout_p=0.3, seed=SEED)
    # torch's products may differ in a layout: the branch is compared where they take no part.
    branch = [n for n in range(len(found)) if n not in (0, 2, 3)]
    assert_same_bits([found[n] for n in branch], [expected[n] for n in branch])


def test_rows_cut_out_of_wider_ones(cuda: Any) -> None:
    """Every row begins at a multiple of 16 bytes, but its last octet is not all its own."""
    case = operands("plain", (21,), 63, 40, 8, torch.bfloat16)
    cut = {name: torch.nn.functional.pad(case[name], (0, 1), value=torch.nan)[:, :63] for name in ("x", "A")}
    expected = passes(cuda, case, dropout_p=0.3, seed=SEED)
    found = passes(cuda, {**case, **cut}, dropout_p=0.3, seed=SEED)
    for n in (1, 5, 6):  # h, dA, dB
        assert torch.equal(found[n], expected[n])


@pytest.mark.parametrize("asked", range(9))
def test_only_what_is_asked_is_computed(cuda: Any, traffic: Any, asked: int) -> None:
    """By the same barriers, too: the rows are several tiles of every kernel."""
    case = operands("everything", (70,), 24, 40, 5, torch.float32)
    everything = passes(cuda, case, dropout_p=0.3, seed=SEED)
    cuda.reset_counters()
    found = passes(cuda, case, [n == asked for n in range(9)], dropout_p=0.3, seed=SEED)
    assert_same_bits(found, [t if n < 2 or n == asked + 2 else None for n, t in enumerate(everything)])
    kernels = traffic()
    assert kernels["expand_kernel"].launches == 1 + (asked in (0, 3))
    assert ("output_gradient_kernel" in kernels) == (asked not in (1, 2))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3), (2, 3, 4)])
def test_any_leading_shape(cuda: Any, lead: tuple[int, ...]) -> None:
    case = operands("everything", lead, 16, 8, 2, torch.float32)
    found, expected = passes(cuda, case), passes(ReferenceOps, case)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_weights_of_any_dtype(cuda: Any, dtype: torch.dtype) -> None:
    case = operands("merged", (9,), 24, 40, 5, torch.float32)
    case["merge_weight"] = torch.tensor(0.625, dtype=dtype)
    found, expected = passes(cuda, case), passes(ReferenceOps, case)
    assert found[-1].dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_rows_beyond_the_reach_of_32_bits(cuda: Any) -> None:
    stride = 2**31 + 8
    try:
        memory = torch.empty(stride + 64, dtype=torch.bfloat16)  # of which two rows are ever touched
    except RuntimeError as error:
        pytest.skip(f"4 GiB of addresses are not to be had: {error}")
    x = memory.as_strided((2, 64), (stride, 1))
    case = operands("plain", (2,), 64, 16, 3, torch.bfloat16)
    x.copy_(case["x"])
    found, expected = (passes(cuda, {**case, "x": t}, dropout_p=0.3, seed=SEED) for t in (x, case["x"]))
    assert torch.equal(found[1], expected[1]) and torch.equal(found[5], expected[5])


# -- what is moved -----------------------------------------------------------------------------------------------------


def test_every_activation_is_moved_once(cuda: Any, traffic: Any) -> None:
    """T rows of d_in and d_out columns in whole tiles: no kernel reads x, y or dy twice, B̂ and A are read once."""
    T, d_in, d_out, r = 128, 256, 512, 16
    case = operands("plain", (T,), d_in, d_out, r, torch.bfloat16)
    passes(cuda, case)
    moved = traffic()
    x, y, z, A, B = (2 * n for n in (T * d_in, T * d_out, T * r, r * d_in, r * d_out))
    stripes = {"y": d_out // 128, "dx": d_in // 128, "dy": d_out // 512}  # z is read once for each
    assert moved["project_kernel"].loaded == x + A * T // 64
    assert moved["project_kernel"].stored == 4 * T * r
    assert moved["expand_kernel"].loaded == (y + stripes["y"] * z + B) + (2 * x + stripes["dx"] * z + A)
    assert moved["expand_kernel"].stored == y + x + 4 * r * d_in
    assert moved["output_gradient_kernel"].loaded == y + stripes["dy"] * z + B
    assert moved["output_gradient_kernel"].stored == 4 * (T * r + d_out * r)


# -- where Triton is absent --------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators compute tensors of the CPU as they do those of a GPU where Triton is absent."""
    monkeypatch.setattr(_gpu, "obstacle", lambda: "triton cannot be imported")
    monkeypatch.setattr(_gpu._cuda, "library", lambda: cuda)
    library = torch.library.Library("mbf", "IMPL")
    for name, run in _gpu._kernels.items():
        if name != "dropout_mask":
            library.impl(name, run, "CPU", allow_override=True)
    yield
    library._destroy()


def layers(count: int, d_in: int, d_out: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[GroupLayer]]:
    cases = [operands("merged", (9,), d_in, d_out, 3 + n, dtype) for n in range(count)]
    terms = [{name: c[name].requires_grad_() for name in ("A", "B", "merged_B", "merge_weight")} for c in cases]
    return cases[0]["x"].requires_grad_(), [
        GroupLayer(c["weight"], LoraTerms(**t, scale=0.7), c["bias"], 0.3, SEED + n)
        for n, (c, t) in enumerate(zip(cases, terms, strict=True))
    ]


def gradients_of(y: torch.Tensor, x: torch.Tensor, of: list[GroupLayer]) -> list[torch.Tensor]:
    terms = [t for layer in of for t in layer.terms if isinstance(t, torch.Tensor)]
    return [y, *torch.autograd.grad(y, [x, *terms], torch.linspace(-1.0, 1.0, y.numel()).view(y.shape).to(y.dtype))]


def test_lora_linear_where_triton_is_absent(on_cuda: None, traffic: Any) -> None:
    case = operands("everything", (9,), 63, 40, 12, torch.float32, torch.bfloat16)
    check_error_rule(lora_linear, lora_linear_ref, case, scale=0.7, dropout_p=0.3, seed=SEED)
    assert {"project_kernel", "expand_kernel", "output_gradient_kernel"} <= traffic().keys()


def test_lora_group_where_triton_is_absent(on_cuda: None, traffic: Any) -> None:
    x, members = layers(3, 64, 40, torch.float32)
    found = gradients_of(torch.cat(lora_group(x, members), 1), x, members)
    assert traffic()["project_kernel"].launches == 3
    expected = gradients_of(torch.cat(lora_group_ref(x, members), 1), x, members)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_mlp_where_triton_is_absent(on_cuda: None, traffic: Any, recompute: bool) -> None:
    x, (gate, up) = layers(2, 64, 40, torch.float32)
    _, (down,) = layers(1, 40, 64, torch.float32)
    found = gradients_of(lora_mlp(x, gate, up, down, recompute=recompute), x, [gate, up, down])
    assert traffic()["project_kernel"].launches == 3 + 2 * recompute
    expected = gradients_of(lora_mlp_ref(x, gate, up, down), x, [gate, up, down])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("r", [12, 100])
def test_on_a_gpu(dtypes: str, form: str, r: int) -> None:
    library = _cuda.library()
    if library is None:
        pytest.skip(_cuda.cuda_status().reason)

    def function(**case: Any) -> torch.Tensor:
        moved = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in case.items()}
        return linear(library)(**moved).cpu()

    case = operands(form, (700,), 1090, 530, r, *DTYPES[dtypes])
    check_error_rule(function, lora_linear_ref, case, scale=0.7, dropout_p=0.3, seed=SEED)


# -- what is declined --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(257, 8), "B": torch.ones(4, 257)}, "A has 257 rows; the kernels take ranks up to 256"),
        ({"A": torch.ones(2, 8).double(), "B": torch.ones(4, 2).double()}, "A and B must both be fp32, bf16 or fp16"),
        ({"A": torch.ones(2, 8).half(), "B": torch.ones(4, 2).half()}, "x must have the dtype of A and B"),
        ({"x": torch.ones(3, 8).double()}, "x must have the dtype of A and B"),
    ],
)
def test_what_the_kernels_do_not_take(cuda: Any, change: dict[str, torch.Tensor], message: str) -> None:
    case = {"x": torch.ones(3, 8), "weight": torch.ones(4, 8), "A": torch.ones(2, 8), "B": torch.ones(4, 2), **change}
    with pytest.raises(RuntimeError, match=message):
        cuda.lora_linear(case["x"], case["weight"], None, case["A"], case["B"], 1.0, *[None] * 2, 0.0, *[None] * 3)
