from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mbf import ops
from mbf.ops import MoraTerms, dropout_mask, mora_accumulate, mora_accumulate_ref, mora_size
from mbf.ops.philox import keep_scale
from tests.ops.lora_cases import LAYOUTS, SEED, assert_accurate, laid_out, tracked

DTYPES = {  # of y, of x, of M
    "fp64": (torch.float64, torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp32 on bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32 on fp16": (torch.float16, torch.float16, torch.float32),
    "fp32 x, bf16 y": (torch.bfloat16, torch.float32, torch.float32),
    "bf16 x, fp32 y": (torch.float32, torch.bfloat16, torch.bfloat16),
    "bf16 M, fp32 x": (torch.float32, torch.float32, torch.bfloat16),
    "fp64 on fp32": (torch.float32, torch.float32, torch.float64),
}
# d_in, d_out, q: whole chunks; a padded input, output repeated, cut off inside a chunk, cut off by whole chunks;
# q beyond both sides.
SHAPES = [
    (64, 64, 16),
    (63, 40, 12),
    (40, 131, 12),
    (63, 29, 12),
    (130, 24, 12),
    (7, 50, 8),
    (9, 11, 26),
    (500, 431, 34),
]
KINDS = (1, 6)
native = pytest.mark.skipif(
    not ops.native_status().loaded, reason=f"needs the compiled kernels, which are {ops.native_status().reason}"
)


def case_of(lead: tuple[int, ...], d_in: int, d_out: int, q: int, *dtypes: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(hash((lead, d_in, d_out, q)) % 2**31)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    of_y, of_x, of_M = dtypes
    return {
        "y": normal(*lead, d_out).to(of_y),
        "x": normal(*lead, d_in).to(of_x),
        "M": normal(q, q, std=q**-0.5).to(of_M),
    }


def results(function: Any, case: dict[str, Tensor], dy: Tensor | None = None, **terms: Any) -> dict[str, Tensor]:
    """The output, as "out", and the gradients of the operands that ask for one."""
    out = function(**case, **terms)
    leaves = {name: value for name, value in case.items() if value.requires_grad}
    found = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out) if dy is None else dy)
    return {"out": out.detach()} | dict(zip(leaves, found, strict=True))


def check_error_rule(case: dict[str, Tensor], **terms: Any) -> None:
    dy = torch.randn(case["y"].shape, dtype=torch.float64).to(case["y"].dtype)
    assert_accurate(
        results(mora_accumulate, tracked(case), dy, **terms),
        results(mora_accumulate_ref, tracked(case), dy, **terms),
        results(mora_accumulate_ref, tracked(case, torch.float64), dy.double(), **terms),
    )


def dense(M: Tensor, d_in: int, d_out: int, kind: int) -> Tensor:
    """ΔW, entry by entry from the definition: from where x_j goes, by M, to where y_o comes from."""
    q = len(M)
    n = math.ceil(d_in / q)
    W = torch.zeros(d_out, d_in, dtype=torch.float64)
    for k in range(n * q):  # the places of the padded input
        i, b = divmod(k, q)
        column = torch.zeros(q, dtype=torch.float64)
        if kind == 1:
            column[b] = 1.0
        else:
            angle = i * 10000.0 ** (-2 * (b % (q // 2)) / q)
            if b < q // 2:
                column[b], column[b + q // 2] = math.cos(angle), math.sin(angle)
            else:
                column[b - q // 2], column[b] = -math.sin(angle), math.cos(angle)
        column = M.double() @ column
        for o in range(d_out):
            a = o % q if kind == 1 else o % (n * q) - i * q
            if 0 <= a < q:
                W[o, k % d_in] += column[a]
    return W


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_in", "d_out", "q"), SHAPES[:-1])
def test_is_the_dense_matrix_of_the_definition(d_in: int, d_out: int, q: int, kind: int) -> None:
    case = case_of((5,), d_in, d_out, q, *DTYPES["fp64"])
    W = dense(case["M"], d_in, d_out, kind)
    expected = case["y"] + 0.7 * case["x"] @ W.T
    for function in (mora_accumulate, mora_accumulate_ref):
        torch.testing.assert_close(function(**case, kind=kind, scale=0.7), expected)
    leaves = tracked(case)
    dy = torch.randn(5, d_out, dtype=torch.float64)
    got = results(mora_accumulate, leaves, dy, kind=kind, scale=0.7)
    torch.testing.assert_close(got["x"], 0.7 * dy @ W)
    # ΔW is linear in M, so dM is what stands beside M in <dy, x ΔWᵀ>.
    moved = torch.randn(q, q, dtype=torch.float64)
    torch.testing.assert_close(
        (got["M"] * moved).sum(), 0.7 * (dy * (case["x"] @ dense(moved, d_in, d_out, kind).T)).sum()
    )
    assert torch.equal(got["y"], dy)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_mask(kind: int) -> None:
    case = case_of((4, 3), 63, 40, 12, *DTYPES["fp64"])
    keep = dropout_mask(SEED, case["x"].shape, 0.3)
    kept = torch.where(keep, case["x"] * keep_scale(0.3), 0.0)
    W = dense(case["M"], 63, 40, kind)
    got = results(mora_accumulate, tracked(case), None, kind=kind, dropout_p=0.3, seed=SEED)
    torch.testing.assert_close(got["out"], case["y"] + kept @ W.T)
    torch.testing.assert_close(got["x"], torch.where(keep, W.sum(0) * keep_scale(0.3), 0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_error_rule(dtypes: str, kind: int, p: float) -> None:
    case = case_of((2, 9), 63, 40, 12, *DTYPES[dtypes])
    check_error_rule(case, kind=kind, scale=1.7, dropout_p=p, seed=SEED if p else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16", "fp32 on bf16"])
@pytest.mark.parametrize("rows", [1, 7, 431])
@pytest.mark.parametrize(("d_in", "d_out", "q"), SHAPES)
def test_error_rule_at_odd_shapes(d_in: int, d_out: int, q: int, rows: int, dtypes: str, kind: int) -> None:
    case = case_of((rows,), d_in, d_out, q, *DTYPES[dtypes])
    check_error_rule(case, kind=kind, scale=0.3, dropout_p=0.1, seed=SEED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16", "fp32 on bf16"])
def test_error_rule_at_a_layers_size(dtypes: str, kind: int) -> None:
    case = case_of((700,), 576, 1000, 112, *DTYPES[dtypes])
    check_error_rule(case, kind=kind, dropout_p=0.1, seed=SEED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (1,), (2, 3, 4)])
@pytest.mark.parametrize(("d_in", "d_out", "q"), [(1, 1, 2), (1, 5, 2), (6, 1, 4), (0, 3, 2), (3, 0, 2), (0, 0, 2)])
def test_sizes_of_zero_and_one(lead: tuple[int, ...], d_in: int, d_out: int, q: int, kind: int) -> None:
    case = case_of(lead, d_in, d_out, q, *DTYPES["fp64"])
    W = dense(case["M"], d_in, d_out, kind) if d_in else torch.zeros(d_out, 0, dtype=torch.float64)
    got = results(mora_accumulate, tracked(case), None, kind=kind, scale=0.4)
    torch.testing.assert_close(got["out"], case["y"] + 0.4 * case["x"] @ W.T)
    torch.testing.assert_close(got["x"], (0.4 * W.sum(0)).expand(case["x"].shape))
    torch.testing.assert_close(got["M"], results(mora_accumulate_ref, tracked(case), None, kind=kind, scale=0.4)["M"])


def test_kind_1_takes_a_q_of_one_and_odd_ones() -> None:
    for q in (1, 3):
        case = case_of((4,), 5, 7, q, *DTYPES["fp64"])
        expected = case["y"] + case["x"] @ dense(case["M"], 5, 7, 1).T
        torch.testing.assert_close(mora_accumulate(**case, kind=1), expected)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_in", "d_out"), [(8, 8), (7, 10), (9, 3)])
def test_gradcheck(d_in: int, d_out: int, kind: int) -> None:
    case = tracked(case_of((2, 3), d_in, d_out, 4, *DTYPES["fp64"]))

    def function(y: Tensor, x: Tensor, M: Tensor, scale: Tensor) -> Tensor:
        return mora_accumulate(y, x, M, kind=kind, scale=scale, dropout_p=0.4, seed=SEED)

    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, [*case.values(), scale])


@pytest.mark.parametrize("asked", ["y", "x", "M"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_gradient_alone(kind: int, asked: str) -> None:
    case = case_of((50,), 63, 40, 12, *DTYPES["fp32"])
    whole = results(mora_accumulate, tracked(case), None, kind=kind, dropout_p=0.2, seed=SEED)
    case[asked].requires_grad_()
    got = results(mora_accumulate, case, None, kind=kind, dropout_p=0.2, seed=SEED)
    assert got.keys() == {"out", asked}
    assert all(torch.equal(value, whole[name]) for name, value in got.items())


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["constant dy", "dy of y"])
def test_differentiable_once(loss: Any) -> None:
    case = tracked(case_of((3,), 8, 8, 4, *DTYPES["fp64"]))
    (dx,) = torch.autograd.grad(loss(mora_accumulate(**case)), case["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def test_keeps_x_for_M_only() -> None:
    for asked, kept in (("x", False), ("M", True)):
        case = case_of((50,), 40, 30, 8, *DTYPES["fp32"])
        case[asked].requires_grad_()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            mora_accumulate(**case, dropout_p=0.2)
        pointers = [t.data_ptr() for t in saved]
        assert (case["x"].data_ptr() in pointers) == kept and case["y"].data_ptr() not in pointers
        assert sum(t.numel() for t in saved) <= case["M"].numel() + 1 + kept * case["x"].numel()


# -- layouts, threads, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaves_y_and_strides_alone(layout: str, kind: int) -> None:
    case = case_of((23,), 30, 50, 8, *DTYPES["fp32"])
    terms = {"kind": kind, "dropout_p": 0.2, "seed": SEED}
    dy = torch.randn(23, 50)
    expected = results(mora_accumulate, tracked(case), dy, **terms)
    moved = {name: laid_out(value, layout).requires_grad_() for name, value in case.items()}
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        y = mora_accumulate(**moved, **terms)
        found = torch.autograd.grad(y, list(moved.values()), laid_out(dy, layout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(moved["y"], case["y"]) and y.is_contiguous()
    assert torch.equal(y, mora_accumulate(**case, **terms))
    for name, value in zip(moved, found, strict=True):
        assert name == "y" or torch.equal(value, expected[name]), name


@native  # torch's own products are cut by the number of threads
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16", "fp32 on bf16"])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "q"), [(5, 200, 300, 34), (900, 200, 150, 34), (700, 512, 512, 128), (600, 313, 175, 130)]
)
def test_same_bits_for_every_number_of_threads(
    rows: int, d_in: int, d_out: int, q: int, dtypes: str, kind: int
) -> None:
    case = tracked(case_of((rows,), d_in, d_out, q, *DTYPES[dtypes]))
    dy = torch.randn(rows, d_out)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(results(mora_accumulate, case, dy, kind=kind, dropout_p=0.3, seed=SEED))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind: int) -> None:
    case = case_of((300,), 60, 70, 16, *DTYPES["fp64"])
    whole = mora_accumulate(**case, kind=kind)
    for row in (0, 5, 299):
        one = mora_accumulate(case["y"][row], case["x"][row], case["M"], kind=kind)
        torch.testing.assert_close(one, whole[row])


def test_what_is_cut_off_is_not_read() -> None:
    case = tracked(case_of((6,), 40, 12, 8, *DTYPES["fp32"]))
    with torch.no_grad():
        case["x"][:, 16:] = torch.nan
    got = results(mora_accumulate, case, None)
    assert all(value.isfinite().all() for value in got.values()) and not got["x"][:, 16:].any()


LEVEL = """
import torch
from tests.ops.test_mora import DTYPES, KINDS, case_of, check_error_rule
from tests.ops.lora_cases import SEED
for kind in KINDS:
    for dtypes in DTYPES.values():
        for rows, d_in, d_out, q in ((7, 40, 131, 12), (300, 130, 100, 34), (64, 65, 29, 66)):
            check_error_rule(case_of((rows,), d_in, d_out, q, *dtypes), kind=kind, dropout_p=0.3, seed=SEED)
"""


@native
@pytest.mark.parametrize(
    ("variable", "value"),
    [("ATEN_CPU_CAPABILITY", "default"), ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")],
)
def test_every_instruction_set(variable: str, value: str) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {variable: value}
    subprocess.run([sys.executable, "-c", LEVEL], env=environment, cwd=root, check=True, timeout=300)


@native
def test_the_kernel_computes() -> None:
    """A bf16 result is rounded once, which torch's several operators are not: it is the fp32 kernel's, rounded."""
    case = case_of((30,), 63, 40, 12, *DTYPES["fp32 on bf16"])
    expected = mora_accumulate(case["y"].float(), case["x"].float(), case["M"]).bfloat16()
    assert torch.equal(mora_accumulate(**case), expected)
    case["M"] = case["M"].half()
    expected = mora_accumulate(case["y"].float(), case["x"].float(), case["M"].float()).bfloat16()
    assert torch.equal(mora_accumulate(**case), expected)
    assert not torch.equal(mora_accumulate_ref(**case), expected)


# -- the operator in torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reference_backend_is_plain_torch_with_the_same_result(kind: int) -> None:
    case = tracked(case_of((4,), 30, 25, 8, *DTYPES["fp64"]))
    terms = {"kind": kind, "dropout_p": 0.3, "seed": SEED}
    got = results(mora_accumulate, case, None, **terms)
    assert mora_accumulate(**case).grad_fn.name() == "mora_accumulateBackward"
    with ops.use_backend("reference"):
        assert "mora" not in mora_accumulate(**case).grad_fn.name()
        torch.testing.assert_close(results(mora_accumulate, case, None, **terms), got)


def test_no_grad_and_inference_mode() -> None:
    case = case_of((4,), 30, 25, 8, *DTYPES["fp32"])
    expected = mora_accumulate_ref(**case)
    assert not mora_accumulate(**case).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(mora_accumulate(**case), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: int) -> None:
    case = case_of((70,), 80, 90, 34, *DTYPES["fp32"])
    with torch.autocast("cpu", torch.bfloat16):
        got = results(mora_accumulate, tracked(case), None, kind=kind)
    narrow = {"y": case["y"], "x": case["x"].bfloat16(), "M": case["M"].bfloat16()}
    expected = results(mora_accumulate, tracked(narrow), None, kind=kind)
    assert expected["M"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_not_anew_for_another_scale(kind: int) -> None:
    case = tracked(case_of((4,), 30, 25, 8, *DTYPES["fp64"]))
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def step(y: Tensor, x: Tensor, M: Tensor, scale: float | Tensor) -> Tensor:
        return mora_accumulate(y, x, M, kind=kind, scale=scale, dropout_p=0.3, seed=SEED)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for values in ((0.5, 0.7, 1.3, 2.9), map(torch.tensor, (0.5, 0.7, 1.3))):
        counts = []
        for scale in values:
            terms = {"kind": kind, "dropout_p": 0.3, "seed": SEED}
            torch.testing.assert_close(
                results(compiled, case, None, scale=scale),
                results(mora_accumulate, case, None, scale=scale, **terms),
                check_dtype=False,
            )
            counts.append(counter.frame_count)
        assert counts[1] == counts[-1]
    assert any(node.target is torch.ops.mbf.mora_accumulate.default for node in counter.graphs[-1].graph.nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: int) -> None:
    case = case_of((2, 3), 10, 14, 4, torch.bfloat16, torch.float32, torch.float32)
    terms = [kind, 0.5, 0.3, torch.tensor(SEED)]
    backward = torch.ops.mbf.mora_accumulate_backward.default
    dy = torch.randn(2, 3, 14).bfloat16()
    torch.library.opcheck(backward, (dy, case["x"], case["M"], 10, *terms, [True, True]))
    only = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (dy, None, case["M"], 10, *terms, [True, False]), test_utils=only)
    torch.library.opcheck(backward, (dy, case["x"], case["M"], 10, *terms, [False, True]), test_utils=only)
    torch.library.opcheck(
        torch.ops.mbf.mora_accumulate.default, (*(value.requires_grad_() for value in case.values()), *terms)
    )


# -- terms, sizes, errors ----------------------------------------------------------------------------------------------


def test_terms_accumulate() -> None:
    case = case_of((4,), 30, 25, 8, *DTYPES["fp32"])
    terms = MoraTerms(case["M"], 1, 0.3)
    torch.testing.assert_close(terms.accumulate(case["y"], case["x"]), mora_accumulate_ref(**case, kind=1, scale=0.3))
    assert MoraTerms(case["M"]) == (case["M"], 6, 1.0)
    torch.manual_seed(5)
    dropped = MoraTerms(case["M"]).accumulate(case["y"], case["x"], 0.5)
    torch.manual_seed(5)
    seed = ops.draw_seed("cpu")
    assert torch.equal(dropped, mora_accumulate(**case, dropout_p=0.5, seed=seed))


def test_size_is_that_of_the_budget() -> None:
    assert mora_size(4096, 4096, 8) == mora_size(4096, 4096, 8, kind=1) == 256
    assert mora_size(576, 576, 8, kind=1) == 96
    assert (mora_size(192, 576, 8, kind=1), mora_size(192, 576, 8)) == (78, 78)
    assert (mora_size(1536, 576, 8, kind=1), mora_size(1536, 576, 8)) == (130, 130)
    assert (mora_size(5, 4, 1, kind=1), mora_size(5, 4, 1)) == (3, 2)
    assert mora_size(1, 1, 1) == 2  # of one number there is no pair
    for d_out, d_in in ((4096, 4096), (11008, 4096), (1024, 4096), (14336, 4096)):
        for r in (8, 16, 64):
            assert abs(mora_size(d_out, d_in, r) ** 2 / ((d_out + d_in) * r) - 1) < 0.01


y, x, M = torch.randn(4, 5), torch.randn(4, 6), torch.randn(2, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kind": 2}, ValueError, r"kind is 2; it must be 1 \(sharing\) or 6 \(rotation\)"),
        ({"M": M[0]}, ValueError, r"M has shape \[2\]; it must be square"),
        ({"M": x}, ValueError, r"M has shape \[4, 6\]; it must be square"),
        ({"M": M[:0, :0]}, ValueError, r"M has shape \[0, 0\]; .* q of at least 1"),
        ({"M": torch.randn(3, 3)}, ValueError, r"M has shape \[3, 3\]; q must be even for kind 6"),
        ({"y": y[:3]}, ValueError, r"y has shape \[3, 5\] and x \[4, 6\]"),
        ({"y": y[0]}, ValueError, r"y has shape \[5\] and x \[4, 6\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x \[\]; they must be"),
        ({"y": y.int()}, TypeError, r"y: got torch.int32; pass a tensor of fp64, fp32, bf16 or fp16"),
        ({"x": x.to(torch.float8_e5m2)}, TypeError, r"x: got torch.float8_e5m2"),
        ({"M": M.int()}, TypeError, r"M: got torch.int32"),
        ({"y": y.to("meta")}, ValueError, r"y is on meta but x on cpu"),
        ({"M": M.to("meta")}, ValueError, r"M is on meta but x on cpu"),
        ({"scale": torch.ones(2)}, ValueError, r"scale has shape \[2\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0"),
        ({"dropout_p": 0.5, "seed": torch.ones(())}, ValueError, r"seed is a torch.float32 tensor"),
        ({"dropout_p": 0.5, "seed": torch.ones((), dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mora_accumulate(**{"y": y, "x": x, "M": M, **changed})
    with pytest.raises(ValueError, match="kind is 3"):
        mora_size(4, 4, 1, kind=3)
