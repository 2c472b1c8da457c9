"""rsvd.cu and the operators around it, under the stand-in."""

from __future__ import annotations

import pytest
import torch

from mbf.ops import _rsvd_cuda
from mbf.ops.rsvd import rsvd_ref, sketch_ref, svd_factors_ref

norm = torch.linalg.vector_norm
SEED = 2**40 + 17


def product(U, S, Vh):
    return (U.double() * S.double().unsqueeze(-2)) @ Vh.double()


def off_identity(Q):
    Q = Q.double()
    return float((Q @ Q.mT - torch.eye(Q.shape[-2], dtype=torch.float64)).abs().max())


def with_spectrum(m, n, spectrum, dtype=torch.float64):
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q for d in (m, n))
    return ((U * spectrum(torch.arange(k, dtype=torch.float64))) @ V.mT).to(dtype)


def split(flat):
    """U, S, Vh of every entry, and the status."""
    *parts, status = flat
    count = len(parts) // 3
    return [tuple(parts[n::count]) for n in range(count)], status


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (130, 24), (1, 1025)], ids=str)
def test_the_sketch_is_the_references(cuda, shape):
    seeds = torch.tensor([0, SEED, -5, 2**62])
    found = cuda.sketch(seeds, *shape)
    assert all(torch.equal(one, sketch_ref(seed, *shape)) for one, seed in zip(found, seeds, strict=True))


@pytest.mark.parametrize("k", [1, 2, 5, 24, 33])
def test_small_svds(cuda, order, k):
    stack = torch.randn(3, k, k, dtype=torch.float64)
    stack[1] = with_spectrum(k, k, lambda i: 10.0 ** (-8 * i / k))
    stack[2] = torch.linalg.qr(stack[2]).Q * 1e-120  # equal singular values, and small ones
    U, S, V, status = cuda.svd([stack])
    assert not status.any()
    assert off_identity(U.mT) <= 1e-13 and off_identity(V) <= 1e-13
    assert (S[:, :-1] >= S[:, 1:]).all()
    exact = torch.linalg.svdvals(stack)
    assert ((S - exact).abs() <= 1e-13 * exact[:, :1]).all()
    assert (norm(product(U, S, V) - stack, dim=(1, 2)) <= 1e-13 * norm(stack, dim=(1, 2))).all()
    cuda.seed(0)
    assert all(torch.equal(a, b) for a, b in zip((U, S, V), cuda.svd([stack])[:3], strict=True))


def test_small_svds_of_many_sizes_in_one_call(cuda, traffic):
    stacks = [torch.randn(1 + n % 3, 1 + n % 7, 1 + n % 7, dtype=torch.float64) for n in range(60)]
    *parts, status = cuda.svd(stacks)
    assert not status.any() and len(status) == sum(map(len, stacks))
    for M, U, S, V in zip(stacks, parts[:60], parts[60:120], parts[120:], strict=True):
        torch.testing.assert_close(product(U, S, V), M, rtol=0, atol=1e-12)
    assert traffic()["svd_kernel"].launches == 2


def test_a_singular_value_of_zero_is_given_up(cuda):
    M = torch.randn(4, 6, 6, dtype=torch.float64)
    M[1] = 0
    M[2, :, 3] = 0
    M[3, 0, 0] = torch.nan
    assert cuda.svd([M])[3].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_iter", [0, 2])
def test_dense_matrices_are_the_references(cuda, dtype, n_iter):
    matrices = [
        with_spectrum(60, 90, lambda i: 0.7**i),
        torch.stack([with_spectrum(40, 30, lambda i: (1 + i) ** -1.5)] * 2),
    ]
    matrices = [M.to(dtype) for M in matrices]
    seeds = torch.tensor([SEED, 1, 2])
    found, status = split(_rsvd_cuda.rsvd(cuda, matrices, seeds, 5, 8, n_iter))
    assert not status.any()
    for M, triple, here in zip(matrices, found, (seeds[:1], seeds[1:]), strict=True):
        assert all(part.dtype == dtype for part in triple)
        flat = M.reshape(-1, *M.shape[-2:])
        for n, seed in enumerate(here):
            mine = [part.reshape(len(flat), *part.shape[M.dim() - 2 :])[n] for part in triple]
            theirs = rsvd_ref(flat[n], sketch_ref(seed, M.shape[-1], 13), 5, n_iter)
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
            for part, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(part, other, rtol=0, atol=tolerance * float(other.abs().max()))
            best = norm(torch.linalg.svdvals(flat[n].double())[5:])
            if n_iter and dtype != torch.bfloat16:
                assert norm(product(*mine) - flat[n].double()) <= 1.05 * best


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_of_factors(cuda, dtype):
    B = [torch.randn(50, 6).to(dtype), torch.randn(2, 9, 3).to(dtype)]
    A = [torch.randn(6, 40).to(dtype), torch.randn(2, 3, 8).to(dtype)]
    found, status = split(_rsvd_cuda.svd_factors(cuda, B, A, 3))
    assert not status.any()
    for b, a, triple in zip(B, A, found, strict=True):
        for part, other in zip(triple, svd_factors_ref(b, a, 3), strict=True):
            assert part.dtype == dtype and part.shape == other.shape
            rounding = max(4 * torch.finfo(dtype).eps, 1e-12)
            torch.testing.assert_close(part, other, rtol=0, atol=rounding * float(other.abs().max()))
    assert _rsvd_cuda.svd_factors(cuda, [torch.randn(4, 6)], [torch.randn(6, 40)], 3) is NotImplemented


def test_what_went_wrong_is_told(cuda):
    M = torch.randn(4, 20, 30)
    M[1] = torch.outer(torch.randn(20), torch.randn(30))  # of rank 1, where 8 are asked for
    M[2, 19, 29] = torch.inf
    _, status = split(_rsvd_cuda.rsvd(cuda, [M], torch.arange(4), 5, 3, 1))
    assert status[[0, 2, 3]].tolist() == [0, 2, 0] and status[1] in (0, 1)
    B, A = torch.randn(3, 9, 2), torch.randn(3, 2, 9)
    B[1] = 0
    A[2, 1, 8] = torch.nan
    assert split(_rsvd_cuda.svd_factors(cuda, [B], [A], 2))[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cuda: cuda.svd([torch.randn(2, 3, 4, dtype=torch.float64)]), "k from 1 to 1024"),
        (lambda cuda: cuda.svd([torch.randn(2, 3, 3)]), "fp64"),
        (lambda cuda: cuda.sketch(torch.zeros(2), 3, 3), "int64"),
    ],
)
def test_what_it_cannot_compute_is_refused(cuda, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(cuda)


def test_cores_that_are_too_large_are_left_to_torch(cuda):
    assert _rsvd_cuda.rsvd(cuda, [torch.randn(1100, 1090)], torch.tensor([1]), 1025, 8, 0) is NotImplemented
    wide = [torch.randn(1100, 1030)], [torch.randn(1030, 1100)]
    assert _rsvd_cuda.svd_factors(cuda, *wide, 8) is NotImplemented
