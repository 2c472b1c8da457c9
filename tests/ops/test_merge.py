from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf.ops import native_status, use_backend
from mbf.ops._library import reference_only
from mbf.ops.merge import merge_, merge_ref_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (7,), (431, 3), (576, 8), (63, 12), (5, 1, 3), (), (0, 4), (0, 1)]

native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def random_pairs(shapes, merged=torch.float32, finetuned=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(shape, generator=generator).to(merged) for shape in shapes],
        [torch.randn(shape, generator=generator).to(finetuned or merged) for shape in shapes],
    )


def relative_error(found, exact):
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


@pytest.mark.parametrize(("merged", "finetuned"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("weight", [0.3, 1 / math.sqrt(3), -0.25, 1.5])
def test_error_is_at_most_twice_that_of_lerp_in_the_same_dtype(backend, merged, finetuned, weight):
    M, F = random_pairs(SHAPES, merged, finetuned)
    exact = [m.double() + weight * (f.double() - m.double()) for m, f in zip(M, F, strict=True)]
    torchs = [torch.lerp(m, f.to(merged), weight) for m, f in zip(M, F, strict=True)]
    merge_(M, F, weight)
    for found, expected, theirs in zip(M, exact, torchs, strict=True):
        if not expected.numel():
            continue
        slack = 1e-6 + (torch.finfo(merged).eps if expected.numel() < 64 else 0)
        if merged == torch.float64:
            slack = 1e-15
        assert found.dtype == merged
        assert relative_error(found, expected) <= 2 * relative_error(theirs, expected) + slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_and_equal_tensors_are_exact(backend, dtype):
    M, F = random_pairs([(37, 5)], dtype)
    before = M[0].clone()
    merge_(M, F, 0.0)
    assert torch.equal(M[0], before)
    merge_(M, F, 1.0)
    assert torch.equal(M[0], F[0])
    merge_(M, F, 0.123)
    assert torch.equal(M[0], F[0])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_are_exact_where_the_difference_is_not_finite(backend, dtype, norms):
    most = torch.finfo(dtype).max
    F = torch.tensor([most, -most, math.inf, math.nan, 2.0] * 5, dtype=dtype)
    M = torch.tensor([-most, most, 1.0, 1.0, 1.0] * 5, dtype=dtype)
    found = M.clone()
    merge_([found], [F], 0.0, norms=norms)
    assert torch.equal(found, M)
    merge_([found], [F], 1.0, norms=norms)
    assert torch.equal(found.isnan(), F.isnan()) and torch.equal(found.nan_to_num(0.0), F.nan_to_num(0.0))


def test_closed_form_of_slaos_merge(backend):
    """B_merge(T) = Σ w_i B_i with w_i = i^(-1/2) · Π_{j>i} (1 − j^(-1/2)), which sum to 1."""
    tasks = 6
    B = [torch.randn(40, 8, dtype=torch.float64) for _ in range(tasks)]
    merged = [B[0].clone()]
    for i in range(2, tasks + 1):
        merge_(merged, [B[i - 1]], 1 / math.sqrt(i))
    w = [i**-0.5 * math.prod(1 - j**-0.5 for j in range(i + 1, tasks + 1)) for i in range(1, tasks + 1)]
    assert sum(w) == pytest.approx(1.0, abs=1e-14)
    torch.testing.assert_close(merged[0], sum(w_i * B_i for w_i, B_i in zip(w, B, strict=True)))


def test_strided_tensors_change_only_their_own_elements(backend):
    buffer = torch.full((6, 10), math.nan)
    M = buffer[::2, 1::3]
    M.copy_(torch.randn(3, 3))
    F = torch.randn(3, 3).t()
    expected = M + 0.4 * (F - M)
    merge_([M], [F], 0.4)
    torch.testing.assert_close(buffer[::2, 1::3], expected)
    assert buffer.isnan().sum() == 60 - 9


def test_neighbours_in_one_buffer_are_left_alone(backend):
    """Lengths around a vector of eight: the remainder must not spill over."""
    for n in range(1, 20):
        buffer = torch.full((n + 16,), math.nan)
        buffer[8 : 8 + n] = torch.randn(n)
        F = torch.randn(n)
        expected = buffer[8 : 8 + n] + 0.4 * (F - buffer[8 : 8 + n])
        merge_([buffer[8 : 8 + n]], [F], 0.4)
        torch.testing.assert_close(buffer[8 : 8 + n], expected)
        assert buffer[:8].isnan().all() and buffer[8 + n :].isnan().all()


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tensor_weight_is_a_float_weight(backend, weight_dtype):
    M, F = random_pairs(SHAPES)
    again = [m.clone() for m in M]
    merge_(M, F, torch.tensor(0.375, dtype=weight_dtype))
    merge_(again, F, 0.375)
    assert all(torch.equal(a, b) for a, b in zip(M, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay(backend, dtype):
    M = [torch.tensor([1.0, math.nan, 2.0, math.inf, 0.0] * 2, dtype=dtype)]
    F = [torch.tensor([math.nan, 1.0, 3.0, 0.0, -math.inf] * 2, dtype=dtype)]
    merge_(M, F, 0.25)
    expected = torch.tensor([math.nan, math.nan, 2.25, math.nan, -math.inf] * 2, dtype=dtype)
    torch.testing.assert_close(M[0], expected, rtol=0, atol=0, equal_nan=True)


def test_parameters_merge_and_autograd_hears_of_it(backend):
    M = torch.nn.Parameter(torch.randn(4, 3))
    loss = (M * M).sum()
    merge_([M], [torch.randn(4, 3, requires_grad=True)], 0.5)
    assert M.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_list_and_inference_tensors(backend):
    merge_([], [], 0.5)
    with torch.inference_mode():
        M, F = torch.zeros(9), torch.ones(9)
        merge_([M], [F], 0.5)
        assert torch.equal(M, torch.full((9,), 0.5))


@pytest.mark.parametrize(
    ("merged", "finetuned", "weight", "error", "message"),
    [
        ([torch.ones(2, 3)], [], 0.5, ValueError, "merged has 1 tensors and finetuned has 0"),
        ([torch.ones(2, 3)], [torch.ones(3, 2)], 0.5, ValueError, r"finetuned\[0\].*\(3, 2\).*\(2, 3\)"),
        ([torch.ones(2), torch.ones(2).int()], [torch.ones(2)] * 2, 0.5, TypeError, r"merged\[1\].*int32"),
        ([torch.ones(2)], [3.0], 0.5, TypeError, r"finetuned\[0\].*float"),
        (torch.ones(2), torch.ones(2), 0.5, TypeError, "merged: got one tensor"),
        ([torch.ones(2)], [torch.ones(2)], math.nan, ValueError, "weight: got nan"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(1), ValueError, r"weight: .*\(1,\).*0-d"),
        ([torch.ones(2)], [torch.ones(2)], torch.tensor(1), ValueError, "weight: got a torch.int64"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], 0.5, ValueError, r"finetuned\[0\].*meta.*cpu"),
    ],
)
def test_errors_name_the_argument(merged, finetuned, weight, error, message):
    with pytest.raises(error, match=message):
        merge_(merged, finetuned, weight)


def test_the_same_memory_twice_is_refused_and_nothing_changes():
    M = torch.ones(4)
    with pytest.raises(ValueError, match=r"merged\[2\]: is the same memory as merged\[0\]"):
        merge_([M, torch.ones(4), M.view(2, 2)], [torch.zeros(4), torch.zeros(4), torch.zeros(2, 2)], 0.5)
    assert torch.equal(M, torch.ones(4))


@pytest.mark.parametrize(("merged", "finetuned"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8])
def test_norms_in_the_same_pass(backend, merged, finetuned, weight):
    shapes = [(7,), (431, 3), (2000, 35), (0, 4), ()]
    M, F = random_pairs(shapes, merged, finetuned)
    before, again = [m.to(torch.float64, copy=True) for m in M], [m.clone() for m in M]
    merge_(again, F, weight)
    found = merge_(M, F, weight, norms=True)
    assert all(torch.equal(a, b) for a, b in zip(M, again, strict=True))
    exact = [
        [f.double().norm(), (f.double() - m).norm(), new.double().norm()]
        for m, f, new in zip(before, F, M, strict=True)
    ]
    rounding = 1e-13 if torch.float64 in (merged, finetuned) else 1e-6  # F − M is rounded to the dtype of the merge
    torch.testing.assert_close(torch.stack(found, 1), torch.tensor(exact), rtol=rounding, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_tell_a_diverged_task(backend, value):
    M, F = random_pairs([(9, 5), (40_000,), (3,)])
    F[1][39_999] = value
    assert merge_(M, F, 0.5, norms=True).finetuned.isfinite().tolist() == [True, False, True]


def test_norms_of_nothing(backend):
    assert [n.shape for n in merge_([], [], 0.5, norms=True)] == [(0,)] * 3
    assert merge_([torch.ones(3)], [torch.ones(3)], 0.5) is None


@pytest.mark.parametrize("name", ["merge_", "merge_with_norms_"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_opcheck(dtypes, name):
    M, F = random_pairs([(5, 3), (7,)], *dtypes)
    M.append(torch.randn(4, 6).t())
    F.append(torch.randn(6, 4))
    torch.library.opcheck(getattr(torch.ops.mbf, name).default, (M, F, torch.tensor(0.3, dtype=torch.float64)))


def test_a_new_weight_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(merge_, backend=counter, fullgraph=True)
    M, F = random_pairs([(5, 3), (7,)])
    for weight in (0.1, 0.7, 0.9):
        expected = [m.clone() for m in M]
        merge_(expected, F, weight)
        compiled(M, F, torch.tensor(weight))
        for m, e in zip(M, expected, strict=True):
            torch.testing.assert_close(m, e)
    assert counter.frame_count == 1


@native
def test_the_native_kernel_serves_the_cpu():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mbf::merge_", "CPU")
    M, F = random_pairs(SHAPES)
    with torch.autograd.profiler.profile() as profile:
        merge_(M, F, 0.5)
    names = [event.name for event in profile.function_events]
    assert names.count("mbf::merge_") == 1
    assert "aten::lerp" not in names


def test_the_reference_backend_calls_no_operator_of_ours():
    M, F = random_pairs(SHAPES)
    with use_backend("reference"), torch.autograd.profiler.profile() as profile:
        merge_(M, F, 0.5)
    names = [event.name for event in profile.function_events]
    assert "mbf::merge_" not in names
    assert names.count("aten::lerp") == len(SHAPES)


@native
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90_000), min_size=1, max_size=6),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    weight=st.floats(-1, 2),
)
def test_bits_do_not_depend_on_the_number_of_threads(lengths, dtypes, weight):
    M, F = random_pairs([(n,) for n in lengths], *dtypes)
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append([m.clone() for m in M])
            merge_(outcomes[-1], F, weight)
            again = [m.clone() for m in M]
            outcomes[-1] += merge_(again, F, weight, norms=True)
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


# Runs without mbf: the schema and the shared object suffice, and importing them takes a second instead of ten.
AGAIN = """
import sys, torch
library, cases = torch.library.Library("mbf", "DEF"), torch.load(sys.argv[3])
library.define(sys.argv[1])
torch.ops.load_library(sys.argv[2])
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
for merged, finetuned, weight, expected in cases:
    torch.ops.mbf.merge_([merged], [finetuned], weight)
    assert torch.equal(merged, expected), (merged.dtype, finetuned.dtype, weight)
"""


@native
def test_bits_do_not_depend_on_the_instruction_set(tmp_path):
    cases = []
    for merged, finetuned in itertools.product(DTYPES, DTYPES):
        for weight in (0.3, 0.8):
            (M,), (F,) = random_pairs([(1003,)], merged, finetuned)
            expected = M.clone()
            merge_([expected], [F], weight)
            cases.append((M, F, torch.tensor(weight, dtype=torch.float64), expected))
    torch.save(cases, tmp_path / "cases.pt")
    schema = str(torch.ops.mbf.merge_.default._schema).removeprefix("mbf::")
    run = subprocess.run(
        [sys.executable, "-c", AGAIN, schema, str(native_status().path), str(tmp_path / "cases.pt")],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_reference_reads_as_the_formula():
    M, F = random_pairs([(6, 4)], torch.float64)
    expected = M[0] + 0.2 * (F[0] - M[0])
    merge_ref_(M, F, torch.tensor(0.2, dtype=torch.float64))
    torch.testing.assert_close(M[0], expected)


def test_a_default_device_is_not_that_of_the_weight():
    merged, finetuned = [torch.zeros(3)], [torch.ones(3)]
    with torch.device("meta"):
        merge_(merged, finetuned, 0.5)
    assert torch.equal(merged[0], torch.full((3,), 0.5))


def test_a_backend_s_block_can_be_entered_again():
    block = use_backend("reference")
    for _ in range(2):
        with block:
            assert reference_only()
        assert not reference_only()
