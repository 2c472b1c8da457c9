from __future__ import annotations

import math

import pytest
import torch

from mbf.ops import merge_, native_status, orthonormal_rows, task_boundary_, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYERS = [(8, 500, 63), (3, 63, 431), (16, 576, 192), (1, 1, 1), (8, 4096, 5)]  # r, d_in, d_out
native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def factors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = [torch.randn(r, d_in, generator=generator).to(dtype) for r, d_in, _ in LAYERS]
    return A, [torch.randn(d_out, r, generator=generator).to(dtype) for r, _, d_out in LAYERS]


def copies(pair):
    return tuple([t.clone() for t in tensors] for tensors in pair)


def equal(pair, other):
    return all(torch.equal(a, b) for x, y in zip(pair, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("merged_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_merge_replacement_and_basis(backend, merged_dtype, dtype):
    merged, finetuned = factors(merged_dtype), factors(dtype, seed=1)
    before, expected_B = copies(finetuned), [b.clone() for b in merged[1]]
    merge_(expected_B, finetuned[1], 1 / math.sqrt(3))
    Q = task_boundary_(merged, finetuned, 1 / math.sqrt(3))
    assert equal(finetuned, before)
    assert equal(merged, ([a.to(merged_dtype) for a in finetuned[0]], expected_B))
    assert all(torch.equal(a, b) for a, b in zip(Q, orthonormal_rows(finetuned[0]), strict=True))


def test_strided_and_dependent_layers(backend):
    merged, finetuned = factors(), factors(seed=1)
    finetuned[0][0][3] = finetuned[0][0][2]
    finetuned[0][2].zero_()
    wide = torch.full((500, 20), math.nan)
    merged[0][0], merged[1][1] = wide[:, :8].mT, torch.randn(3, 431).mT
    finetuned[0][4] = torch.randn(4096, 8).mT
    expected_B = [b.clone() for b in merged[1]]
    merge_(expected_B, finetuned[1], 0.4)
    Q = task_boundary_(merged, finetuned, torch.tensor(0.4, dtype=torch.float64))
    assert equal(merged, (finetuned[0], expected_B))
    assert wide[:, 8:].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(Q, orthonormal_rows(finetuned[0]), strict=True))


@pytest.mark.parametrize(("factor", "layer"), [(0, 0), (0, 4), (1, 1), (1, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_diverged_task_changes_nothing(backend, factor, layer, value, dtype):
    merged, finetuned = factors(dtype), factors(dtype, seed=1)
    finetuned[factor][layer].view(-1)[-1] = value
    before = copies(merged)
    with pytest.raises(ValueError, match=rf"{'AB'[factor]}\[{layer}\] of finetuned: holds NaN or infinity"):
        task_boundary_(merged, finetuned, 0.5)
    assert equal(merged, before)


def test_the_largest_numbers_are_finite(backend):
    merged, finetuned = factors(torch.float16), factors(torch.float16, seed=1)
    finetuned[1][0][0, 0] = torch.finfo(torch.float16).max
    task_boundary_(merged, finetuned, 1.0)
    assert merged[1][0][0, 0] == torch.finfo(torch.float16).max


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "kind", ["as made", "fp64", "strided A", "close rows", "dependent rows", "another dtype", "large"]
)
def test_in_place_q_takes_the_place_of_a(backend, kind):
    """The same numbers as in memory of its own, over A_ft, whose values A_merge has."""
    merged, finetuned = factors(), factors(seed=1)
    if kind == "fp64":
        merged, finetuned = factors(torch.float64), factors(torch.float64, seed=1)
    elif kind == "strided A":
        finetuned[0][1] = torch.stack([finetuned[0][1]] * 2, -1)[..., 0]
        merged[0][2] = torch.stack([merged[0][2]] * 2, -1)[..., 1]
    elif kind == "close rows":  # that take the second round of Cholesky QR, and one in fp64
        finetuned[0][0][1] = finetuned[0][0][0] + 1e-5 * finetuned[0][0][2]
        finetuned[0][2][5] = finetuned[0][2][4] + 1e-2 * finetuned[0][2][5]
    elif kind == "dependent rows":
        finetuned[0][1][1] = finetuned[0][1][0]
    elif kind == "another dtype":
        merged = ([t.double() for t in merged[0]], merged[1])
    elif kind == "large":
        finetuned[0].append(torch.randn(200, 12000))
        finetuned[1].append(torch.randn(3, 200))
        merged = tuple([*kept, torch.zeros_like(new[-1])] for kept, new in zip(merged, finetuned, strict=True))
    twin = tuple([t.clone() for t in tensors] for tensors in merged)
    A_ft = [t.clone() for t in finetuned[0]]
    with use_backend(backend):
        expected = task_boundary_(twin, (A_ft, finetuned[1]), 0.3)
        Q = task_boundary_(merged, finetuned, 0.3, in_place=True)
    for n, (q, wanted) in enumerate(zip(Q, expected, strict=True)):
        assert q is finetuned[0][n] and torch.equal(q, wanted)
    for kept, others in zip(merged, twin, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(merged[0], A_ft, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_in_place_changes_nothing_where_a_task_diverged_or_memory_is_shared(backend):
    merged, finetuned = factors(), factors(seed=1)
    finetuned[1][2][0, 0] = math.inf
    finetuned[0][1][1] = finetuned[0][1][0]  # given up by the kernel, and mended only if all is well
    before = [t.clone() for t in (*merged[0], *merged[1], *finetuned[0])]
    with use_backend(backend), pytest.raises(ValueError, match=r"B\[2\] of finetuned: holds NaN or infinity"):
        task_boundary_(merged, finetuned, 0.3, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip((*merged[0], *merged[1], *finetuned[0]), before, strict=True))
    finetuned[1][2][0, 0] = 0.0
    merged[0][1] = finetuned[0][1]
    with (
        use_backend(backend),
        pytest.raises(ValueError, match=r"A of finetuned\[1\]: is the same memory as A of merged\[1\]"),
    ):
        task_boundary_(merged, finetuned, 0.3, in_place=True)
    task_boundary_(merged, finetuned, 0.3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("how", ["merged A is A", "A overlap"])
def test_in_place_shared_memory_is_refused_where_a_is_strided(backend, how):
    merged, finetuned = factors(), factors(seed=1)
    whole = torch.randn(finetuned[0][1].shape[0] + 2, 2 * finetuned[0][1].shape[1])
    finetuned[0][1] = whole[2:, ::2]
    if how == "merged A is A":
        merged[0][1] = finetuned[0][1]
    else:
        merged[0].append(torch.zeros_like(merged[0][1]))
        merged[1].append(torch.zeros_like(merged[1][1]))
        finetuned[0].append(whole[:-2, ::2])
        finetuned[1].append(torch.randn_like(finetuned[1][1]))
    before = [t.clone() for t in (*merged[0], *merged[1], *finetuned[0])]
    with use_backend(backend), pytest.raises(ValueError, match="memory"):
        task_boundary_(merged, finetuned, 0.3, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip((*merged[0], *merged[1], *finetuned[0]), before, strict=True))


def test_in_place_tells_autograd():
    merged, finetuned = factors(), factors(seed=1)
    A = finetuned[0][0] = torch.nn.Parameter(finetuned[0][0])
    loss = (A**2).sum()
    task_boundary_(merged, finetuned, 0.3, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def broken(change):
    merged, finetuned = factors(), factors(seed=1)
    change(merged, finetuned)
    return merged, finetuned


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, f: f[0].pop(), ValueError, "A of merged has 5 tensors and A of finetuned has 4"),
        (lambda m, f: [x[0].pop() for x in (m, f)], ValueError, "finetuned has 4 A and 5 B"),
        (lambda m, f: m[1].__setitem__(1, torch.ones(2)), ValueError, r"B of finetuned\[1\]: got shape \(431, 3\)"),
        (lambda m, f: [x[0].__setitem__(0, torch.ones(5, 4)) for x in (m, f)], ValueError, "r is 5"),
        (lambda m, f: [x[0].__setitem__(0, torch.ones(2, 2, 4)) for x in (m, f)], ValueError, "one matrix"),
        (lambda m, f: m[0].__setitem__(0, f[0]), TypeError, r"A of merged\[0\]: got list"),
        (
            lambda m, f: m[1].__setitem__(4, m[0][4][:5, :8]),
            ValueError,
            r"merged\[9\]: is the same memory as merged\[4\]",
        ),
    ],
)
def test_errors_name_the_tensor_and_change_nothing(change, error, message):
    merged, finetuned = broken(change)
    before = merged[1][0].clone()
    with pytest.raises(error, match=message):
        task_boundary_(merged, finetuned, 0.5)
    assert torch.equal(merged[1][0], before)


def test_a_weight_that_is_not_finite():
    with pytest.raises(ValueError, match="weight: got nan"):
        task_boundary_(factors(), factors(), math.nan)


def test_parameters_and_autograd():
    merged, finetuned = factors(), factors(seed=1)
    merged = tuple([torch.nn.Parameter(t) for t in tensors] for tensors in merged)
    loss = (merged[0][0] ** 2).sum()
    Q = task_boundary_(merged, finetuned, 0.5)
    assert not Q[0].requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    (mA, mB), (A, B) = factors(), factors(seed=1)
    Q = [torch.zeros_like(a) for a in A]
    inputs = (mA[:3], mB[:3], Q[:3], A[:3], B[:3], torch.tensor(0.3, dtype=torch.float64))
    torch.library.opcheck(torch.ops.mbf.task_boundary_.default, inputs)


@native
def test_bits_do_not_depend_on_the_number_of_threads():
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            merged = factors()
            outcomes.append((*merged, task_boundary_(merged, factors(seed=1), 0.3)))
    finally:
        torch.set_num_threads(threads)
    assert equal(outcomes[0], outcomes[1]) and equal(outcomes[0], outcomes[2])
