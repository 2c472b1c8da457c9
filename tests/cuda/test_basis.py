"""basis.cu under the stand-in, against Householder QR in fp64."""

from __future__ import annotations

import pytest
import torch

from mbf.ops.basis import orthonormal_rows_ref

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 7), (3, 63), (12, 12), (16, 576), (2, 3, 8, 1100), (40, 200), (64, 130), (120, 121)]
norm = torch.linalg.vector_norm


def off_identity(Q):
    Q = Q.double()
    return float((Q @ Q.mT - torch.eye(Q.shape[-2], dtype=torch.float64)).abs().max())


def with_condition(r, d, condition):
    """Random ``[r, d]`` in fp64 whose singular values fall from 1 to 1 / condition."""
    U = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q
    return (U * torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)) @ V.mT


def poison(like):
    """New memory is often what was freed last: NaN then, where a kernel leaves a number unwritten."""
    for tensor in like:
        torch.full_like(tensor, torch.nan)


def rows(cuda, A):
    """Q of every matrix, written into memory full of NaN, and the status of all."""
    Q = [torch.full_like(matrix, torch.nan, memory_format=torch.contiguous_format) for matrix in A]
    return *Q, cuda.orthonormal_rows(A, Q)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_of_qr(cuda, shape, dtype):
    A = torch.randn(shape).to(dtype)
    poison([A])
    Q, status = rows(cuda, [A])
    assert Q.dtype == dtype and Q.shape == A.shape and Q.is_contiguous()
    assert status.tolist() == [0] * A.shape[:-2].numel()
    exact = orthonormal_rows_ref(A.double())
    rounding = torch.finfo(dtype).eps
    assert off_identity(Q) <= max(4 * rounding, 1e-14)
    assert norm(Q.double() - exact) <= (rounding + 1e-14 * A.shape[-2]) * norm(exact) * 10


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_up_to_a_condition_of_a_million(cuda, condition, dtype):
    """Error against fp64 at most twice that of torch's QR in fp32 + 1e-6; the larger two take a second round."""
    A = with_condition(16, 500, condition).to(dtype)
    if dtype == torch.bfloat16 and condition > 1e2:
        A = A * torch.logspace(-3, 3, 16, dtype=torch.float64).to(dtype)[:, None]  # rows of other lengths
    Q, status = rows(cuda, [A])
    assert status.tolist() == [0]
    assert off_identity(Q) <= {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 2**-7}[dtype]
    exact = orthonormal_rows_ref(A.double())
    wide = A if dtype == torch.float64 else A.float()
    theirs_Q, theirs_R = torch.linalg.qr(wide.mT)
    theirs = (theirs_Q * theirs_R.diagonal().sign()).mT.to(dtype).double()
    assert norm(Q.double() - exact) <= 2 * norm(theirs - exact) + 1e-6 * norm(exact)
    if condition <= 100 and dtype != torch.bfloat16:
        assert float((Q.double() - exact).abs().max()) <= 1e-5


def test_a_list_of_mixed_shapes_and_dtypes(cuda, order, traffic):
    A = [torch.randn(r, d).to(dtype) for r, d in ((8, 900), (5, 7), (33, 64)) for dtype in DTYPES]
    A += [torch.randn(64, 8).mT, torch.randn(4, 2, 50)[:, 1:], torch.randn(3 * 70 + 1)[1:].view(3, 70)]
    *Q, status = rows(cuda, A)
    assert not status.any() and len(status) == 17 + 3 - 2
    for q, a in zip(Q, A, strict=True):
        torch.testing.assert_close(
            q.double(), orthonormal_rows_ref(a.double()), rtol=0, atol=2 * torch.finfo(a.dtype).eps
        )
    cuda.seed(0)
    *again, _ = rows(cuda, A)
    assert all(torch.equal(a, b) for a, b in zip(Q, again, strict=True))
    assert traffic()["apply_kernel"].launches == 8  # one a dtype


def test_more_matrices_than_a_launch_holds(cuda):
    A = torch.randn(150, 2, 40)
    *Q, status = rows(cuda, [*A[:100], A[100:]])
    assert not status.any() and len(status) == 150
    assert off_identity(torch.cat([torch.stack(Q[:100]), Q[100]])) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told(cuda, dtype, value):
    A = torch.randn(3, 4, 2100).to(dtype)
    A[1, 3, 2099] = value
    Q, status = rows(cuda, [A])
    assert status.tolist() == [0, 2, 0]
    assert Q[1].isnan().all() and off_identity(Q[::2]) <= max(4 * torch.finfo(dtype).eps, 1e-14)


def test_dependent_zero_and_extreme_rows_are_given_up(cuda):
    A = torch.randn(6, 3, 40, dtype=torch.float64)
    A[1, 2] = 2 * A[1, 0]
    A[2, 1] = 0
    A[3] *= 1e-150
    A[4] *= 1e150
    Q, status = rows(cuda, [A])
    assert status.tolist() == [0, 1, 1, 1, 1, 0]
    assert Q[1:5].isnan().all() and not Q[::5].isnan().any()
    tall = torch.randn(200, 210)  # more rows than shared memory holds
    Q, status = rows(cuda, [tall])
    assert status.tolist() == [1] and Q.isnan().all()


def test_a_matrix_is_read_twice_and_written_once(cuda, traffic):
    """The second round is decided on the device, and costs nothing where it isn't made."""
    A = torch.randn(8, 4096)
    rows(cuda, [A])
    found = traffic()
    gram = found["gram_kernel"]
    assert gram.loaded == A.numel() * 4 + 4 * 31 * 36 * 8 + 8 * 4 * 256  # and the shares so far, and flags of round 2
    assert found["apply_kernel"].stored == A.numel() * 4


@pytest.mark.parametrize(
    ("A", "message"),
    [([torch.randn(5, 4)], "it is 5"), ([torch.randn(4)], r"\[..., r, d\]")],
)
def test_what_it_cannot_compute_is_refused(cuda, A, message):
    with pytest.raises(RuntimeError, match=message):
        rows(cuda, A)
