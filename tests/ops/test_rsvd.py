from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.extmath import randomized_svd

from mbf.ops import native_status, use_backend
from mbf.ops.rsvd import rsvd, rsvd_ref, sketch_ref, svd_factors_ref

native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
norm = torch.linalg.vector_norm
# What the decompositions may lose: their own rounding in fp64 and fp32, one rounding of the result in the halves.
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def with_spectrum(m, n, spectrum, dtype=torch.float64):
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return ((U * spectrum(torch.arange(k, dtype=torch.float64))) @ V.mT).to(dtype)


def assert_orthonormal(U, Vh, tolerance):
    for rows in (U.mT, Vh):
        rows = rows.double()
        assert float((rows @ rows.mT - torch.eye(rows.shape[-2], dtype=torch.float64)).abs().max()) <= tolerance


def product(triple):
    return (triple.U.double() * triple.S.double().unsqueeze(-2)) @ triple.Vh.double()


@pytest.mark.parametrize("spectrum", [lambda i: 2.0**-i, lambda i: (1 + i) ** -2.0], ids=["geometric", "polynomial"])
@pytest.mark.parametrize("shape", [(63, 500), (500, 63), (80, 80)], ids=str)
def test_decaying_spectrum_against_torchs_svd(backend, spectrum, shape):
    M, rank = with_spectrum(*shape, spectrum), 6
    _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    best = norm(S[rank:])
    found = rsvd(M, rank, n_iter=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.S, S[:rank], rtol=1e-6, atol=0)
    assert norm(M - product(found)) <= 1.0001 * best
    torch.testing.assert_close((Vh[:rank] @ found.Vh.mT).abs(), torch.eye(rank, dtype=M.dtype), rtol=0, atol=1e-3)
    assert_orthonormal(found.U, found.Vh, 1e-12)


def test_power_iterations_help_on_a_slow_spectrum():
    M = with_spectrum(120, 200, lambda i: (1 + i) ** -0.5)
    errors = [
        float(norm(M - product(rsvd(M, 8, n_iter=n, generator=torch.Generator().manual_seed(1))))) for n in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (2, 3, 12, 500), (431, 12)], ids=str)
def test_exact_where_the_sketch_spans_the_matrix(backend, shape, dtype):
    """Full rank: the error is at most twice that of torch's own SVD in the dtype (for halves: fp32 rounded)."""
    M = torch.randn(shape).to(dtype)
    found = rsvd(M, min(shape[-2:]))
    own = torch.linalg.svd(M.to(torch.promote_types(dtype, torch.float32)), full_matrices=False)
    theirs = (own.U.to(dtype).double() * own.S.to(dtype).double().unsqueeze(-2)) @ own.Vh.to(dtype).double()
    assert all(part.dtype == dtype and part.is_contiguous() for part in found)
    slack = 1e-14 if dtype == torch.float64 else 1e-6 + (torch.finfo(dtype).eps if M.numel() < 64 else 0)
    exact = M.double()
    assert norm(product(found) - exact) <= 2 * norm(theirs - exact) + slack * norm(exact)
    assert_orthonormal(found.U, found.Vh, ROUNDING[dtype])


@pytest.mark.parametrize("sizes", [(63, 8, 500), (5, 12, 40), (40, 12, 5), (3, 9, 4), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_factors_are_decomposed_exactly(backend, sizes, dtype):
    m, r, n = sizes
    B, A = torch.randn(2, m, r).to(dtype), torch.randn(2, r, n).to(dtype)
    exact = B.double() @ A.double()
    rank = min(sizes)
    found = rsvd((B, A), rank)
    S = torch.linalg.svdvals(exact)[..., :rank]
    assert norm(product(found) - exact) <= ROUNDING[dtype] * norm(exact)
    assert norm(found.S.double() - S) <= ROUNDING[dtype] * norm(S)
    assert_orthonormal(found.U, found.Vh, ROUNDING[dtype])


def test_truncated_factors_are_the_best_approximation(backend):
    B, A = torch.randn(50, 12, dtype=torch.float64), torch.randn(12, 70, dtype=torch.float64)
    found = rsvd((B, A), 5)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    torch.testing.assert_close(product(found), (U[:, :5] * S[:5]) @ Vh[:5])


def test_the_product_of_factors_is_never_formed():
    """4096 × 4096 in fp64 would be 134 MB; the factors' own sizes are far below."""
    B, A = torch.randn(4096, 4), torch.randn(4, 4096)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        rsvd((B, A), 4)
    assert max(event.cpu_memory_usage for event in profile.function_events) < 8 * 2**20


def test_beyond_the_matrixs_rank_u_and_vh_stay_orthonormal(backend):
    M = torch.outer(torch.randn(30), torch.randn(20))
    for found in (rsvd(M, 4), rsvd(torch.zeros(30, 20), 4), rsvd((torch.zeros(30, 5), torch.randn(5, 20)), 4)):
        assert_orthonormal(found.U, found.Vh, 1e-5)
        assert float(found.S[1:].max()) <= 1e-4


def test_signs_follow_the_rule_and_not_the_sketch(backend):
    M = with_spectrum(40, 60, lambda i: 3.0**-i)
    first, second = (rsvd(M, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(first.Vh, second.Vh)
    torch.testing.assert_close(first.U, second.U)
    largest = first.Vh.gather(-1, first.Vh.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()


def test_generator_decides_the_sketch(backend):
    M = torch.randn(60, 60)
    one, same, other = (rsvd(M, 3, n_iter=0, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.U, same.U) and not torch.equal(one.U, other.U)
    torch.manual_seed(7)
    first = rsvd(M, 3, n_iter=0)
    torch.manual_seed(7)
    assert torch.equal(first.Vh, rsvd(M, 3, n_iter=0).Vh)


def test_factors_draw_no_random_number():
    state = torch.get_rng_state()
    rsvd((torch.randn(9, 3, generator=torch.Generator()), torch.randn(3, 9, generator=torch.Generator())), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_lists_are_what_a_loop_gives(backend):
    normal = partial(torch.randn, dtype=torch.float64)  # a BLAS may round products of batches and of matrices apart
    dense = [normal(30, 20), normal(20, 30), normal(30, 20), normal(2, 9, 8)]
    pairs = [(normal(30, 4), normal(4, 20)), (normal(9, 4), normal(4, 9))] * 2
    mixed = [*dense, *pairs]
    listed = rsvd(mixed, 3, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    for found, entry in zip(listed, mixed, strict=True):
        alone = rsvd(entry, 3, generator=generator)
        torch.testing.assert_close(product(found), product(alone))
        torch.testing.assert_close(found.S, alone.S)
    assert rsvd([], 3) == []


def test_no_gradient(backend):
    B, A = torch.randn(9, 3, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    assert not any(part.requires_grad for part in (*rsvd((B, A), 2), *rsvd(B, 2)))


@pytest.mark.parametrize(
    ("entry", "options", "error", "message"),
    [
        (torch.randn(5, 4), {"rank": 5}, ValueError, "rank is 5; matrix_or_factors has 4 singular triples"),
        (torch.randn(5, 4), {"rank": 0}, ValueError, "rank is 0"),
        ((torch.randn(9, 3), torch.randn(3, 9)), {"rank": 4}, ValueError, "has 3 singular triples"),
        ([torch.randn(9, 9), torch.randn(2, 9)], {"rank": 3}, ValueError, r"matrix_or_factors\[1\] has 2"),
        ((torch.randn(9, 3), torch.randn(4, 9)), {"rank": 2}, ValueError, r"B \(9, 3\) and A \(4, 9\)"),
        ((torch.randn(9, 3), torch.randn(3, 9).double()), {"rank": 2}, ValueError, "float32.*float64"),
        ((torch.randn(9, 3),), {"rank": 2}, TypeError, "tuple of 1"),
        (torch.randn(9), {"rank": 1}, ValueError, r"shape \(9,\)"),
        (torch.ones(3, 3).long(), {"rank": 1}, TypeError, "torch.int64"),
        ([(torch.randn(3, 3), None)], {"rank": 1}, TypeError, r"A of matrix_or_factors\[0\]: got NoneType"),
        (torch.randn(5, 4), {"rank": 2, "n_iter": -1}, ValueError, "n_iter"),
        (torch.randn(5, 4), {"rank": 2, "oversample": -1}, ValueError, "oversample"),
        ([torch.randn(5, 4), torch.full((5, 4), torch.nan)], {"rank": 2}, ValueError, r"\[1\]: holds NaN"),
        ((torch.full((5, 2), torch.inf), torch.randn(2, 5)), {"rank": 2}, ValueError, "holds NaN or infinity"),
    ],
)
def test_errors_name_the_entry(backend, entry, options, error, message):
    with pytest.raises(error, match=message):
        rsvd(entry, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    matrices = [torch.randn(2, 14, 9).to(dtype), torch.randn(5, 8).mT.to(dtype)]
    torch.library.opcheck(torch.ops.mbf.rsvd.default, (matrices, torch.arange(3), 3, 2, 2))
    B, A = torch.randn(3, 14, 4).to(dtype), torch.randn(3, 4, 9).to(dtype)
    torch.library.opcheck(torch.ops.mbf.svd_factors.default, ([B, B[0]], [A, A[1]], 3))


def test_a_list_of_any_shapes_is_one_call():
    with torch.autograd.profiler.profile() as profile:
        rsvd([torch.randn(9, 8), torch.randn(8, 9), torch.randn(9, 8), (torch.randn(9, 3), torch.randn(3, 9))], 2)
    names = [event.name for event in profile.function_events]
    assert names.count("mbf::rsvd") == 1 and names.count("mbf::svd_factors") == 1


@native
@pytest.mark.parametrize("shape", [(40, 70), (9, 5), (3, 700), (700, 3), (600, 530)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_makes_the_references_sketch(shape, dtype):
    """Without power iterations on a flat spectrum, what is found is what was drawn."""
    M = torch.randn(2, *shape).to(dtype)
    rank = min(3, *shape)
    found = rsvd(M, rank, n_iter=0, oversample=2, generator=torch.Generator().manual_seed(3))
    with use_backend("reference"):
        expected = rsvd(M, rank, n_iter=0, oversample=2, generator=torch.Generator().manual_seed(3))
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2}[dtype]
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=tolerance * float(other.abs().max()))


@native
@pytest.mark.parametrize("shape", [(600, 512), (130, 1024), (1100, 2032), (600, 500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_distance(shape, dtype):
    """Also a power of two apart; ranks for several visits, rows for several strips, blocks and a rest."""
    M = with_spectrum(*shape, lambda i: 0.9**i, dtype)
    call = partial(rsvd, rank=16, n_iter=1, oversample=9)
    found = call(M, generator=torch.Generator().manual_seed(3))
    with use_backend("reference"):
        expected = call(M.double(), generator=torch.Generator().manual_seed(3))
    assert norm(product(found) - product(expected)) <= ROUNDING[dtype] * norm(product(expected))


def test_the_sketch_is_philox_and_nearly_normal():
    seed = torch.tensor(-(2**62) + 12345)
    sketch = sketch_ref(seed, 1001, 7)
    blocks = dropout_blocks(seed, 4)
    sums = [sum(blocks[0][:4]), sum(blocks[0][4:]), sum(blocks[1][:4])]
    expected = torch.tensor([2 * s - 262139 for s in sums]).float() * torch.tensor(1 / 75674)
    assert torch.equal(sketch.flatten()[:3], expected)
    assert torch.equal(sketch_ref(seed, 13, 7).flatten(), sketch.flatten()[:91])
    assert abs(float(sketch.mean())) < 0.04 and abs(float(sketch.var()) - 1) < 0.05 and (sketch != 0).all()
    assert not torch.equal(sketch_ref(seed + 2**33, 13, 7), sketch[:13])


def dropout_blocks(seed, count):
    """Half-words of the first blocks of the sketch's stream, in Python's integers."""
    found = []
    for j in range(count):
        key0, key1 = int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF
        c = [j, 0, 1, 0]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ key0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ key1, p0 & 0xFFFFFFFF]
            key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
        found.append([half for word in c for half in (word & 0xFFFF, word >> 16)])
    return found


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_numbers_whose_squares_leave_fp32(backend, scale):
    M = with_spectrum(60, 40, lambda i: 2.0**-i, torch.float32)
    plain, scaled = (rsvd(m, 4, generator=torch.Generator().manual_seed(0)) for m in (M, M * scale))
    torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.Vh, plain.Vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spectrum", [lambda i: 0.6**i, lambda i: (1 + i) ** -1.5, lambda i: (1 + i) ** -1.0], ids="123"
)
@pytest.mark.parametrize("shape", [(1000, 300), (300, 1000), (513, 514)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_residual_and_angles_beside_the_peers(backend, spectrum, shape, dtype):
    """Within 1.05 of the best, and no worse than torch.svd_lowrank and scikit-learn's randomized_svd."""
    rank, generator = 8, torch.Generator().manual_seed(0)
    M = with_spectrum(*shape, spectrum).to(dtype)
    exact = M.double()
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    best = norm(S[rank:])
    found = rsvd(M, rank, generator=generator)
    error = norm(exact - product(found)) / best
    assert error <= (1.05 if dtype != torch.bfloat16 else 1.3)
    if dtype == torch.bfloat16:  # U and Vh are rounded to eight bits, which no peer does
        return
    u, s, v = torch.svd_lowrank(M, q=rank + 8, niter=2)
    theirs = norm(exact - (u[:, :rank] * s[:rank]).double() @ v[:, :rank].double().mT) / best
    u, s, vh = randomized_svd(M.numpy(), rank, n_oversamples=8, n_iter=2, random_state=0)
    sklearns = norm(exact - torch.from_numpy((u * s) @ vh).double()) / best
    assert error <= max(theirs, sklearns) + 2e-3
    for mine, true in ((found.U.double().mT, U[:, :rank].mT), (found.Vh.double(), Vh[:rank])):
        cosines = torch.linalg.svdvals(mine @ true.mT)
        assert float(cosines.min()) >= 0.9  # of the angles between the leading subspaces
        assert float(cosines[0]) >= 1 - 1e-5


@pytest.mark.parametrize("tiny", [1e-310, 1e-322])
def test_rows_of_subnormal_numbers(backend, tiny):
    """A dead rank, and a matrix of nothing else: 1 over the largest entry would be infinite."""
    B, A = torch.randn(12, 4).double(), torch.randn(4, 10).double()
    A[1] *= tiny
    found = rsvd((B, A), 4)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(B @ A)[:4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(found), B @ A, rtol=1e-10, atol=1e-12)
    M = torch.randn(12, 10).double() * tiny
    for n_iter in (0, 2):
        found = rsvd(M, 3, n_iter=n_iter)
        assert all(bool(part.isfinite().all()) for part in found)
        torch.testing.assert_close(found.U.mT @ found.U, torch.eye(3).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.Vh @ found.Vh.mT, torch.eye(3).double(), rtol=0, atol=1e-12)


@native
def test_bits_do_not_depend_on_the_number_of_threads():
    entries = [
        torch.randn(1500, 40),
        torch.randn(3, 60, 80),
        torch.randn(9, 700).bfloat16(),
        torch.randn(20, 9).double(),
    ]
    entries += [(torch.randn(90, 6), torch.randn(6, 40)), (torch.randn(2, 8, 3), torch.randn(2, 3, 8))]
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outcomes.append(rsvd(entries, 3, generator=torch.Generator().manual_seed(1)))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(
            torch.equal(a, b) for x, y in zip(outcomes[0], other, strict=True) for a, b in zip(x, y, strict=True)
        )


def test_stacked_factors_of_several_loras(backend):
    """Σ B_i A_i = [B_1 .. B_K] [A_1; ..; A_K], and ranks beyond the sizes."""
    B, A = [torch.randn(50, r) for r in (4, 8, 3)], [torch.randn(r, 30) for r in (4, 8, 3)]
    exact = sum(b.double() @ a.double() for b, a in zip(B, A, strict=True))
    found = rsvd((torch.cat(B, 1), torch.cat(A)), 15)
    assert norm(product(found) - exact) <= 3e-6 * norm(exact)
    B, A = torch.randn(6, 40), torch.randn(40, 9)
    found = rsvd((B, A), 6)
    assert norm(product(found) - B.double() @ A.double()) <= 3e-6 * norm(B.double() @ A.double())
    assert_orthonormal(found.U, found.Vh, 3e-6)


def test_empty_batches(backend):
    assert [part.shape for part in rsvd(torch.randn(0, 5, 4), 2)] == [(0, 5, 2), (0, 2), (0, 2, 4)]
    assert [part.shape for part in rsvd((torch.randn(0, 5, 3), torch.randn(0, 3, 4)), 2)] == [
        (0, 5, 2),
        (0, 2),
        (0, 2, 4),
    ]


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 2**31), n_iter=st.integers(0, 3))
def test_both_references_agree_on_any_shape(m, n, seed, n_iter):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(m, n, generator=generator, dtype=torch.float64)
    k = min(m, n)
    dense = rsvd_ref(M, torch.randn(n, k, generator=generator, dtype=torch.float64), k, n_iter)
    exact = svd_factors_ref(M, torch.eye(n, dtype=torch.float64), k)
    torch.testing.assert_close(dense[1], exact[1], rtol=0, atol=1e-10)
    torch.testing.assert_close((dense[0] * dense[1]) @ dense[2], M, rtol=0, atol=1e-10)
    torch.testing.assert_close((exact[0] * exact[1]) @ exact[2], M, rtol=0, atol=1e-10)
