from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf.ops import native_status, use_backend
from mbf.ops.basis import orthonormal_rows, orthonormal_rows_ref

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
SHAPES = [(1, 1), (1, 7), (3, 63), (8, 500), (12, 12), (16, 576), (2, 3, 4, 31)]


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def gram_error(Q):
    Q = Q.double()
    return float((Q @ Q.mT - torch.eye(Q.shape[-2], dtype=torch.float64)).abs().max())


def outside_row_space(A, Q):
    """Norm of the part of A's rows that Q does not span, over A's norm."""
    A, Q = A.double(), Q.double()
    return float(torch.linalg.vector_norm(A - (A @ Q.mT) @ Q) / torch.linalg.vector_norm(A))


def with_condition(r, d, condition):
    """Random ``[r, d]`` in fp64 whose singular values fall from 1 to 1 / condition."""
    U = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q
    return (U * torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_orthonormal_and_span_the_same(backend, shape, dtype):
    A = torch.randn(shape).to(dtype)
    Q = orthonormal_rows(A)
    assert Q.dtype == dtype and Q.shape == A.shape and Q.is_contiguous()
    rounding = max(2 * torch.finfo(dtype).eps, 1e-13)
    assert gram_error(Q) <= rounding
    assert outside_row_space(A, Q) <= rounding
    L = A.double() @ Q.double().mT
    assert (L.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert float(L.triu(1).abs().max()) <= rounding * float(L.abs().max())


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_torchs_qr(backend, condition, dtype):
    """Against Cholesky QR in fp64, the other road to the same factor; torch has no half-precision QR."""
    A = with_condition(8, 500, condition).float()
    L = torch.linalg.cholesky(A.double() @ A.double().mT)
    exact = torch.linalg.solve_triangular(L, A.double(), upper=False)
    Qt, R = torch.linalg.qr(A.mT)
    theirs = (Qt * R.diagonal().sign()).mT.to(dtype)
    ours = orthonormal_rows(A).to(dtype)
    norm = torch.linalg.vector_norm
    assert norm(ours.double() - exact) <= (2 * norm(theirs.double() - exact) / norm(exact) + 1e-6) * norm(exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_orthonormal_rows_come_back_unchanged(backend, dtype):
    Q = orthonormal_rows(torch.randn(5, 16, 200, dtype=dtype))
    torch.testing.assert_close(orthonormal_rows(Q), Q, rtol=0, atol=2 * torch.finfo(dtype).eps)
    exact = torch.eye(4, 9, dtype=dtype)
    assert torch.equal(orthonormal_rows(exact), exact)


def test_positive_scaling_of_rows_changes_nothing(backend):
    A = torch.randn(4, 30, dtype=torch.float64)
    scales = torch.tensor([1e-200, 1.0, 3e7, 1e200], dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(orthonormal_rows(A * scales), orthonormal_rows(A), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "A",
    [
        torch.zeros(3, 5),
        torch.tensor([[1.0, 2, 3, 4], [2.0, 4, 6, 8], [0.0, 1, 0, 1]]),
        torch.tensor([[0.0, 0, 0, 0], [3.0, 0, 4, 0], [3.0, 0, 4, 0], [0.0, 0, 0, 0]]),
        torch.ones(6, 6),
        torch.cat([torch.linspace(-1, 1, 40).sin().view(4, 10)] * 2)[:, :9],
    ],
    ids=["zero", "twice the first", "zero rows and equal rows", "all ones", "repeated"],
)
def test_dependent_rows_are_completed(backend, A):
    Q = orthonormal_rows(A)
    assert gram_error(Q) <= 1e-6
    if A.any():
        assert outside_row_space(A, Q) <= 1e-6


def test_completion_takes_the_first_of_the_furthest_unit_vectors():
    assert torch.equal(orthonormal_rows(torch.zeros(2, 4)), torch.eye(2, 4))
    A = torch.tensor([[2.0, 0, 0], [5.0, 0, 0]])
    assert torch.equal(orthonormal_rows(A), torch.eye(2, 3))


def test_dependent_matrices_leave_the_others_of_the_batch_alone():
    A = torch.randn(3, 4, 20)
    A[1, 2] = A[1, 0]
    Q = orthonormal_rows(A)
    torch.testing.assert_close(Q[0], orthonormal_rows(A[0]))
    torch.testing.assert_close(Q[2], orthonormal_rows(A[2]))
    assert gram_error(Q) <= 1e-6


def test_lists_of_mixed_widths_are_what_a_loop_gives(backend):
    A = [torch.randn(8, 64), torch.randn(8, 96), torch.randn(8, 64, dtype=torch.float64), torch.randn(2, 3, 5)]
    A += [torch.randn(8, 64), torch.randn(64, 8).mT]
    for Q, matrix in zip(orthonormal_rows(A), A, strict=True):
        torch.testing.assert_close(Q, orthonormal_rows(matrix))
    assert orthonormal_rows([]) == []


def test_a_list_of_any_shapes_and_dtypes_is_one_call():
    A = [torch.randn(4, 10), torch.randn(4, 12), torch.randn(3, 4, 10).half(), torch.randn(6, 12).double()]
    with torch.autograd.profiler.profile() as profile:
        orthonormal_rows(A)
    assert [event.name for event in profile.function_events].count("mbf::orthonormal_rows") == 1


def test_no_gradient_and_the_input_is_untouched(backend):
    A = torch.nn.Parameter(torch.randn(3, 8))
    before = A.detach().clone()
    assert not orthonormal_rows(A).requires_grad
    assert torch.equal(A, before)


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (torch.randn(5, 4), ValueError, r"A: has shape \(5, 4\).*r is 5"),
        ([torch.randn(2, 4), torch.randn(3, 2)], ValueError, r"A\[1\]: has shape \(3, 2\)"),
        (torch.randn(4), ValueError, r"A: has shape \(4,\)"),
        (torch.randn(0, 4), ValueError, "r is 0"),
        (torch.ones(2, 4).int(), TypeError, "A: got torch.int32"),
        ([torch.randn(2, 4), None], TypeError, r"A\[1\]: got NoneType"),
        ([torch.randn(2, 4), torch.full((2, 4), torch.inf)], ValueError, r"A\[1\]: holds NaN or infinity"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, "A: holds NaN or infinity"),
    ],
)
def test_errors_name_the_matrix(backend, A, error, message):
    with pytest.raises(error, match=message):
        orthonormal_rows(A)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_operator_itself_never_hides_nan(dtype, value):
    A = torch.randn(2, 3, 40).to(dtype)
    A[1, 2, 39] = value
    (Q,), status = operator([A])
    assert gram_error(Q[0]) <= 2 * torch.finfo(dtype).eps
    assert status.tolist() == [0, 2]


def operator(A):
    """What the operator writes into memory full of NaN, and what it says of it."""
    torch.use_deterministic_algorithms(True)  # which fills fresh memory
    try:
        assert torch.empty(3).isnan().all()
        *Q, status = torch.ops.mbf.orthonormal_rows(A)
    finally:
        torch.use_deterministic_algorithms(False)
    return Q, status


# What of the fast path each of these takes: all in fp32, Q in fp32, Q in fp64, a second round, none.
@native
@pytest.mark.parametrize(
    ("condition", "dtype", "status"),
    [
        *((condition, torch.float32, 0) for condition in (1, 2, 3, 30, 1e4, 1e6)),
        (1, torch.bfloat16, 0),
        *((1, torch.float64, 0), (1e5, torch.float64, 0), (1e9, torch.float64, 1)),
    ],
)
@pytest.mark.parametrize("shape", [(8, 500), (16, 4096), (3, 63), (64, 576), (64, 2500), (130, 300)], ids=str)
def test_the_fast_path_up_to_a_condition_of_a_million(shape, condition, dtype, status):
    A = with_condition(*shape, condition).to(dtype)
    (Q,), found = operator([A])
    assert found.tolist() == [status]
    if status == 0:
        rounding = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 2**-8}[dtype]
        assert gram_error(Q) <= rounding
        assert outside_row_space(A, Q) <= rounding
    assert gram_error(orthonormal_rows(A)) <= {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize("condition", [1, 10, 100])
def test_agrees_with_the_signed_qr_in_fp64(backend, condition):
    A = with_condition(16, 1000, condition).float()
    Qt, R = torch.linalg.qr(A.double().mT)
    assert float((orthonormal_rows(A) - (Qt * R.diagonal().sign()).mT).abs().max()) <= 1e-5


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_numbers_whose_squares_leave_fp64(backend, scale):
    A = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(orthonormal_rows(A * scale), orthonormal_rows(A), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", [(1e-41, 1e-41, 1e-41), (5e37, 5e37, 5e37), (1e-36, 1.0, 1e36)], ids=str)
def test_rows_at_the_ends_of_fp32(backend, dtype, scales):
    """Their lengths, or the inverses of these, are beyond what fp32 holds."""
    A = (torch.randn(3, 1000).double() * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype)
    exact = orthonormal_rows_ref(A.double())
    Q = orthonormal_rows(A)
    assert torch.linalg.vector_norm(Q.double() - exact) <= 2 * torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)


@native
def test_bits_do_not_depend_on_the_number_of_threads():
    A = [torch.randn(r, d).to(dtype) for r, d in ((8, 900), (64, 576), (5, 7)) for dtype in DTYPES] * 2
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outcomes.append(orthonormal_rows(A))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("case", ["fp32", "batched transposed fp16", "strided"])
def test_opcheck(case):
    A = {
        "fp32": torch.randn(3, 9),
        "batched transposed fp16": torch.randn(2, 9, 4).mT.half(),
        "strided": torch.randn(4, 2, 9)[:, 1],
    }[case]
    inputs = [A, torch.randn(2, 5)]
    torch.library.opcheck(torch.ops.mbf.orthonormal_rows.default, (inputs,))


@pytest.mark.parametrize("width", [4099, 4104, 4112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_so_much_that_it_goes_past_the_caches(dtype, width):
    """From 8 MiB of results on, where rows begin on whole vectors; or else anywhere, and end within a vector."""
    A = [torch.randn(r, width).to(dtype) for r in (1, 7, 8, 40, 64)] * (9 if dtype == torch.float32 else 18)
    Q = orthonormal_rows(A)
    assert all(torch.equal(q, orthonormal_rows(matrix)) for q, matrix in zip(Q, A, strict=True))
    assert max(map(gram_error, Q)) <= 2 * torch.finfo(dtype).eps


def test_a_parameter_has_a_basis_without_gradient(backend):
    A = [torch.nn.Parameter(torch.randn(3, 9)), torch.randn(2, 9)]
    assert not any(Q.requires_grad for Q in orthonormal_rows(A))
    assert orthonormal_rows([]) == []


@pytest.mark.parametrize("scale", [1e-15, 1e-13, 1e13, 1e15])
def test_rows_whose_products_leave_fp32(backend, scale):
    A = torch.randn(5, 700)
    torch.testing.assert_close(orthonormal_rows(A * scale), orthonormal_rows(A), rtol=0, atol=3e-7)


@settings(max_examples=40, deadline=None)
@given(r=st.integers(1, 12), extra=st.integers(0, 20), rank=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_any_rank_gives_an_orthonormal_basis_that_spans_the_rows(r, extra, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    d = r + extra
    A = (
        torch.randint(-3, 4, (r, rank), generator=generator).double()
        @ torch.randn(rank, d, generator=generator).double()
    )
    Q = orthonormal_rows_ref(A)
    assert gram_error(Q) <= 1e-12
    if A.any():
        assert outside_row_space(A, Q) <= 1e-12
