from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbf import ops
from mbf.ops import (
    LiloraTerms,
    dropout_mask,
    lilora,
    lilora_accumulate,
    lilora_accumulate_ref,
    lora_accumulate,
    lora_accumulate_ref,
)
from mbf.ops.philox import keep_scale
from tests.ops.lora_cases import LAYOUTS, SEED, assert_accurate, check_error_rule, gradients, laid_out, tracked
from tests.ops.test_lora_accumulate import DTYPES as SIBLINGS

DTYPES = {  # of y, of x, of the branch
    **SIBLINGS,
    "fp64": (torch.float64, torch.float64, torch.float64),
    "fp32 on fp16": (torch.float16, torch.float16, torch.float32),
    "fp64 on fp32": (torch.float32, torch.float32, torch.float64),
    "bf16 on fp64": (torch.float64, torch.float64, torch.bfloat16),
}
USUAL = ("fp32", "bf16", "fp16", "fp32 on bf16")
# All of dEb hangs on r̃ numbers a row, whose rounding is luck where they are one or two.
SHAPES = [((1,), 63, 500, 3, 7), ((7,), 500, 63, 12, 6), ((431,), 63, 63, 1, 3), ((3, 5), 64, 48, 8, 4)]
ASKED = ("y", "x", "A", "B", "Ea", "Eb", "weight", "scale")
native = pytest.mark.skipif(not ops.native_status().loaded, reason=f"no extension: {ops.native_status().reason}")


def case_of(
    lead: tuple[int, ...], d_in: int, d_out: int, r: int, inner: int, *dtypes: torch.dtype
) -> dict[str, Tensor]:
    """Random operands, w = 0.37 and s = 1.7 as tensors; of y, x and the branch in these dtypes."""
    generator = torch.Generator().manual_seed(hash((lead, d_in, d_out, r, inner)) % 2**31)

    def normal(*shape: int, of: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(of)

    of_y, of_x, of_branch = dtypes
    of_numbers = torch.promote_types(of_branch, torch.float32)
    return {
        "y": normal(*lead, d_out, of=of_y),
        "x": normal(*lead, d_in, of=of_x),
        "A": normal(r, d_in, of=of_branch, std=max(d_in, 1) ** -0.5),
        "B": normal(d_out, r, of=of_branch, std=max(r, 1) ** -0.5),
        "Ea": normal(inner, r, of=of_branch, std=max(r, 1) ** -0.5),
        "Eb": normal(d_out, inner, of=of_branch, std=max(inner, 1) ** -0.5),
        "weight": torch.tensor(0.37, dtype=of_numbers),
        "scale": torch.tensor(1.7, dtype=of_numbers),
    }


def delta(case: dict[str, Tensor]) -> Tensor:
    """ΔW, dense."""
    A, B, Ea, Eb, w, s = (case[name] for name in ("A", "B", "Ea", "Eb", "weight", "scale"))
    return s * (w * B + (1 - w) * Eb @ Ea) @ A


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 300])
def test_is_the_dense_matrix_of_the_definition(rows: int) -> None:
    case = case_of((rows,), 30, 25, 6, 3, *DTYPES["fp64"])
    W, dy = delta(case), torch.randn(rows, 25, dtype=torch.float64)
    for function in (lilora_accumulate, lilora_accumulate_ref):
        got = gradients(function, tracked(case), dy)
        torch.testing.assert_close(got["x"], dy @ W)
        torch.testing.assert_close(function(**case), case["y"] + case["x"] @ W.T)
    # ΔW is linear in each operand: a gradient is what stands beside a change of it in <dy, x ΔWᵀ>.
    for name in ("A", "B", "Ea", "Eb", "weight", "scale"):
        change = torch.randn_like(case[name])
        with_it, without = (delta({**case, name: case[name] + step}) for step in (change, 0 * change))
        torch.testing.assert_close((got[name] * change).sum(), (dy * (case["x"] @ (with_it - without).T)).sum())


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3, -2.0])
def test_is_two_loras_and_one_of_both_ranks(weight: float) -> None:
    case = case_of((9,), 30, 25, 6, 3, *DTYPES["fp64"])
    case["weight"] = torch.tensor(weight, dtype=torch.float64)
    y, x, A, B, Ea, Eb, _, s = case.values()
    got = lilora_accumulate(**case)
    for function in (lora_accumulate, lora_accumulate_ref):
        one = function(y, x, A, B, scale=s * weight)
        torch.testing.assert_close(got, function(one, x, Ea @ A, Eb, scale=s * (1 - weight)))
        gate = torch.tensor([weight] * 6 + [1 - weight] * 3, dtype=torch.float64)
        both = function(y, x, torch.cat([A, Ea @ A]), torch.cat([B, Eb], 1), scale=s, gate=gate)
        torch.testing.assert_close(got, both)


def test_dropout_is_that_of_the_mask() -> None:
    case = case_of((4, 3), 63, 40, 12, 6, *DTYPES["fp64"])
    keep = dropout_mask(SEED, case["x"].shape, 0.3)
    kept = torch.where(keep, case["x"] * keep_scale(0.3), 0.0)
    got = gradients(lilora_accumulate, tracked(case), None, dropout_p=0.3, seed=SEED)
    torch.testing.assert_close(got["y"], torch.ones_like(case["y"]))  # of y's gradient, which comes last
    torch.testing.assert_close(lilora_accumulate(**case, dropout_p=0.3, seed=SEED), case["y"] + kept @ delta(case).T)
    torch.testing.assert_close(got["x"], torch.where(keep, delta(case).sum(0) * keep_scale(0.3), 0.0))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_error_rule(dtypes: str, p: float) -> None:
    case = case_of((2, 9), 63, 40, 12, 5, *DTYPES[dtypes])
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, dropout_p=p, seed=SEED if p else None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", USUAL)
def test_error_rule_at_odd_shapes(dtypes: str, shape: tuple) -> None:
    case = case_of(*shape, *DTYPES[dtypes])
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, dropout_p=0.1, seed=SEED)


@pytest.mark.parametrize("dtypes", USUAL)
def test_error_rule_at_a_layers_size(dtypes: str) -> None:
    case = case_of((700,), 576, 1000, 32, 16, *DTYPES[dtypes])
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, dropout_p=0.1, seed=SEED)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.integers(1, 60), st.sampled_from([256, 300, 431, 640])),
    d_in=st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 500])),
    d_out=st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 500])),
    r=st.one_of(st.integers(1, 40), st.sampled_from([64, 100])),
    inner=st.one_of(st.integers(1, 20), st.sampled_from([32, 50])),
    dtypes=st.sampled_from(USUAL),
    p=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_error_rule_at_drawn_shapes(
    rows: int, d_in: int, d_out: int, r: int, inner: int, dtypes: str, p: float
) -> None:
    torch.manual_seed(rows * 31 + d_in)
    case = case_of((rows,), d_in, d_out, r, inner, *DTYPES[dtypes])
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, dropout_p=p, seed=SEED if p else None)


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (1,), (2, 3, 4)])
@pytest.mark.parametrize(
    "sizes", [(6, 5, 2, 1), (1, 1, 1, 1), (0, 5, 2, 1), (6, 0, 2, 1), (6, 5, 0, 2), (6, 5, 2, 0), (0, 0, 0, 0)], ids=str
)
def test_sizes_of_zero_and_one(lead: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    case = tracked(case_of(lead, *sizes, *DTYPES["fp64"]))
    terms = {"dropout_p": 0.3, "seed": SEED}
    torch.testing.assert_close(lilora_accumulate(**case, **terms), lilora_accumulate_ref(**case, **terms))
    got, expected = (gradients(f, case, None, **terms) for f in (lilora_accumulate, lilora_accumulate_ref))
    torch.testing.assert_close(got, expected)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(2, 3), (70,)], ids=str)
def test_gradcheck(rows: tuple[int, ...]) -> None:
    case = tracked(case_of(rows, 5, 4, 3, 2, *DTYPES["fp64"]))

    def function(*values: Tensor) -> Tensor:
        return lilora_accumulate(**dict(zip(case, values, strict=True)), dropout_p=0.4, seed=SEED)

    assert torch.autograd.gradcheck(function, list(case.values()))


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("asked", ASKED)
def test_one_gradient_alone(asked: str, rows: int) -> None:
    case = case_of((rows,), 24, 40, 5, 3, *DTYPES["fp64"])
    case[asked].requires_grad_()
    terms = {"dropout_p": 0.2, "seed": SEED}
    got = gradients(lilora_accumulate, case, None, **terms)
    torch.testing.assert_close(got, gradients(lilora_accumulate_ref, case, None, **terms))
    assert got.keys() == {"y", asked}


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["constant dy", "dy of y"])
def test_differentiable_once(loss: Any) -> None:
    case = tracked(case_of((3,), 8, 8, 4, 2, *DTYPES["fp64"]))
    (dx,) = torch.autograd.grad(loss(lilora_accumulate(**case)), case["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def test_what_is_kept() -> None:
    for asked in ("B", "A"):
        case = case_of((50,), 40, 30, 4, 2, *DTYPES["fp32"])
        case[asked].requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            lilora_accumulate(**case, dropout_p=0.2)
        given = {value.data_ptr() for name, value in case.items() if name not in ("x", "y")}
        beside = [t for t in kept if t.data_ptr() not in given]
        assert sorted(t.numel() for t in beside) == [1, 50 * 4] + [50 * 40] * (asked == "A"), "the seed and h"
        assert (case["x"].data_ptr() in [t.data_ptr() for t in beside]) == (asked == "A")


def test_floats_are_as_good_as_tensors() -> None:
    case = case_of((7,), 24, 40, 5, 3, *DTYPES["fp64"])
    expected = lilora_accumulate(**case)
    for name in ("weight", "scale"):
        assert torch.equal(lilora_accumulate(**{**case, name: case[name].item()}), expected)
        for dtype in (torch.float32, torch.bfloat16):
            narrow = {**case, name: case[name].to(dtype)}
            wide = {**case, name: case[name].to(dtype).double()}
            assert torch.equal(lilora_accumulate(**narrow), lilora_accumulate(**wide))


# -- layouts, threads, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
def test_leaves_y_and_strides_alone(dtypes: str, layout: str) -> None:
    case = case_of((23,), 30, 50, 8, 4, *DTYPES[dtypes])
    terms = {"dropout_p": 0.2, "seed": SEED}
    dy = torch.randn(23, 50).to(case["y"].dtype)
    expected = gradients(lilora_accumulate, tracked(case), dy, **terms)
    moved = {n: (laid_out(v, layout) if v.dim() else v.clone()).requires_grad_() for n, v in case.items()}
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        y = lilora_accumulate(**moved, **terms)
        found = torch.autograd.grad(y, list(moved.values()), laid_out(dy, layout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(moved["y"], case["y"]) and y.is_contiguous()
    torch.testing.assert_close(y, lilora_accumulate(**case, **terms), rtol=0, atol=0)
    torch.testing.assert_close(
        dict(zip(list(moved)[1:], found[1:], strict=True)), {n: expected[n] for n in moved if n != "y"}, rtol=0, atol=0
    )


@native
@pytest.mark.parametrize("dtypes", USUAL)
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "r", "inner"), [(1100, 200, 72, 8, 4), (600, 72, 200, 19, 7), (20, 640, 900, 8, 8)]
)
def test_same_bits_for_every_number_of_threads(
    rows: int, d_in: int, d_out: int, r: int, inner: int, dtypes: str
) -> None:
    case = tracked(case_of((rows,), d_in, d_out, r, inner, *DTYPES[dtypes]))
    dy = torch.randn(rows, d_out)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(gradients(lilora_accumulate, case, dy, dropout_p=0.3, seed=SEED))
        found[-1]["out"] = lilora_accumulate(**case, dropout_p=0.3, seed=SEED)
    for other in found[1:]:
        assert [name for name in other if not torch.equal(found[0][name], other[name])] == []


# -- the operator in torch ---------------------------------------------------------------------------------------------


def test_reference_backend_is_plain_torch_with_the_same_result() -> None:
    case = tracked(case_of((4,), 30, 25, 8, 3, *DTYPES["fp64"]))
    terms = {"dropout_p": 0.3, "seed": SEED}
    got = gradients(lilora_accumulate, case, None, **terms)
    assert lilora_accumulate(**case).grad_fn.name() == "lilora_accumulateBackward"
    with ops.use_backend("reference"):
        assert "lilora" not in lilora_accumulate(**case).grad_fn.name()
        torch.testing.assert_close(gradients(lilora_accumulate, case, None, **terms), got)


@pytest.mark.parametrize("rows", [20, 300])
def test_composed_of_torchs_operators(rows: int) -> None:
    """What serves where there is no kernel: with two products for few rows, with one of the joined factors for many."""
    case = case_of((rows,), 24, 40, 5, 3, *DTYPES["fp64"])
    operands = [*list(case.values())[2:], 0.3, torch.tensor(SEED)]
    assert lilora._worth_joining(rows, lilora.Operands(*operands)) == (rows == 300)
    terms = {"dropout_p": 0.3, "seed": SEED}
    out, h = lilora._forward(case["y"], case["x"], *operands)
    torch.testing.assert_close(out, lilora_accumulate_ref(**case, **terms))
    dy = torch.randn(rows, 40, dtype=torch.float64)
    expected = gradients(lilora_accumulate_ref, tracked(case), dy, **terms)
    names = ("x", "A", "B", "Ea", "Eb", "weight", "scale")
    found = lilora._backward(dy, h, case["x"], *operands, [True] * 7)
    torch.testing.assert_close(dict(zip(names, found, strict=True)), {name: expected[name] for name in names})
    for n, name in enumerate(names):
        alone = lilora._backward(dy, h, case["x"], *operands, [name == other for other in names])
        assert [m for m, gradient in enumerate(alone) if gradient is not None] == [n]
        torch.testing.assert_close(alone[n], expected[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    case = case_of((4,), 30, 25, 8, 3, *DTYPES["fp32"])
    assert not lilora_accumulate(**case).requires_grad
    expected = lilora_accumulate_ref(**case)
    with mode():
        got = lilora_accumulate(**tracked(case))
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)


def test_autocast() -> None:
    case = case_of((70,), 80, 90, 12, 6, *DTYPES["fp32"])

    def cast(**operands: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lilora_accumulate(**operands)

    def in_torch(**operands: Any) -> Tensor:
        return lilora_accumulate_ref(**narrowed(operands))

    assert torch.equal(cast(**case), lilora_accumulate(**narrowed(case))) and cast(**case).dtype == torch.float32
    exact = tracked(case, torch.float64)
    found = []
    for _ in range(6):  # a number's gradient is judged over several dy, as one alone may cancel to nothing
        dy = torch.randn(70, 90)
        found.append([gradients(f, tracked(case), dy) for f in (cast, in_torch)])
        found[-1].append(gradients(lilora_accumulate_ref, exact, dy))
    assert_accurate(*({name: torch.stack([one[n][name] for one in found]) for name in case} for n in range(3)))


def narrowed(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.bfloat16() if n in ("x", "A", "B", "Ea", "Eb") else v for n, v in case.items()}


def test_compiles_whole_and_not_anew_for_other_weights_and_scales() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    case = tracked(case_of((4,), 30, 25, 8, 3, *DTYPES["fp64"]))
    counter = CompileCounterWithBackend("aot_eager")

    def step(**operands: Any) -> Tensor:
        return lilora_accumulate(**operands, dropout_p=0.3, seed=SEED)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    numbers = ((0.5, 0.7), (0.3, 1.3), (0.9, 2.9), (0.1, 0.2))
    for turn in (lambda value: value, lambda value: torch.tensor(value, requires_grad=True)):
        counts = []
        for weight, scale in numbers:
            now = {**case, "weight": turn(weight), "scale": turn(scale)}
            torch.testing.assert_close(*(gradients(f, now, None) for f in (compiled, step)), check_dtype=False)
            counts.append(counter.frame_count)
        assert counts[1] == counts[-1]
    assert any(node.target is torch.ops.mbf.lilora_accumulate.default for node in counter.graphs[-1].graph.nodes)


def test_opcheck() -> None:
    case = case_of((2, 3), 10, 14, 4, 2, torch.bfloat16, torch.float32, torch.float32)
    y, x, *operands = case.values()
    operands += [0.3, torch.tensor(SEED)]
    backward = torch.ops.mbf.lilora_accumulate_backward.default
    dy, h = torch.randn(2, 3, 14).bfloat16(), torch.randn(2, 3, 4)
    torch.library.opcheck(backward, (dy, h, x, *operands, [True] * 7))
    only = ("test_schema", "test_faketensor")
    for needs in ([n == m for m in range(7)] for n in range(7)):
        given = None if needs[0] else x
        torch.library.opcheck(backward, (dy, h, given, *operands, needs), test_utils=only)
    for value in case.values():
        value.requires_grad_()
    torch.library.opcheck(torch.ops.mbf.lilora_accumulate.default, (y, x, *operands))


# -- terms and errors --------------------------------------------------------------------------------------------------


def test_terms_accumulate() -> None:
    case = case_of((4,), 30, 25, 8, 3, *DTYPES["fp32"])
    terms = LiloraTerms(*list(case.values())[2:])
    torch.testing.assert_close(terms.accumulate(case["y"], case["x"]), lilora_accumulate_ref(**case))
    assert LiloraTerms(*terms[:5]).scale == 1.0
    torch.manual_seed(5)
    dropped = terms.accumulate(case["y"], case["x"], 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropped, lilora_accumulate(**case, dropout_p=0.5, seed=ops.draw_seed("cpu")))


GIVEN = case_of((4,), 6, 5, 3, 2, *DTYPES["fp32"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"A": GIVEN["A"][:, :5]}, ValueError, r"A has shape \[3, 5\] and x \[4, 6\]"),
        ({"B": GIVEN["B"].T}, ValueError, r"B has shape \[3, 5\] and A \[3, 6\]"),
        ({"Ea": GIVEN["Ea"].T}, ValueError, r"Ea has shape \[3, 2\]; it must be \[r̃, r\], \[r̃, 3\] with A \[3, 6\]"),
        ({"Ea": GIVEN["Ea"][0]}, ValueError, r"Ea has shape \[3\]"),
        ({"Eb": GIVEN["Eb"].T}, ValueError, r"Eb has shape \[2, 5\]; it must be \[d_out, r̃\] = \[5, 2\] with B"),
        ({"Ea": GIVEN["Ea"].double()}, TypeError, r"Ea is torch.float64 and A torch.float32; A, B, Ea and Eb must"),
        ({"Eb": GIVEN["Eb"].half()}, TypeError, r"Eb is torch.float16 and A torch.float32"),
        ({"Eb": GIVEN["Eb"].to("meta")}, ValueError, r"Eb is on meta but x on cpu"),
        ({"y": GIVEN["y"][:3]}, ValueError, r"y has shape \[3, 5\]; it must be \[4, 5\]"),
        ({"y": GIVEN["y"].int()}, ValueError, r"y is torch.int32 on cpu"),
        ({"y": GIVEN["y"].to("meta")}, ValueError, r"y is torch.float32 on meta; .* on cpu"),
        ({"weight": torch.ones(2)}, ValueError, r"weight is a torch.float32 tensor of shape \[2\]; it must be a float"),
        ({"weight": torch.tensor(1)}, ValueError, r"weight is a torch.int64 tensor of shape \[\]"),
        ({"weight": torch.tensor(1.0, device="meta")}, ValueError, r"weight is on meta; it must be on cpu, where A is"),
        ({"scale": torch.ones(1)}, ValueError, r"scale is a torch.float32 tensor of shape \[1\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0"),
        ({"dropout_p": 0.5, "seed": torch.ones((), dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lilora_accumulate(**{**GIVEN, **changed})


# -- the C++ kernels ---------------------------------------------------------------------------------------------------


@native
def test_the_cpu_has_kernels_of_its_own() -> None:
    for name in ("lilora_accumulate", "lilora_accumulate_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mbf::{name}", "CPU")


LEVEL = """
import torch
from mbf import ops
from mbf.ops import lilora_accumulate, lilora_accumulate_ref
from tests.ops.lora_cases import SEED, check_error_rule
from tests.ops.test_lilora import DTYPES, USUAL, case_of
assert ops.native_status().loaded
for dtypes in USUAL:
    case = case_of((60,), 65, 130, 19, 10, *DTYPES[dtypes])
    check_error_rule(lilora_accumulate, lilora_accumulate_ref, case, dropout_p=0.3, seed=SEED)
"""


@native
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", LEVEL], env=environment, cwd=root, check=True, timeout=300)
