"""task_boundary.cu under the stand-in: the same as the CPU's operator, and nothing written where a task diverged."""

from __future__ import annotations

import pytest
import torch

import mbf.ops  # noqa: F401  the operators of the CPU

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYERS = [(8, 500, 63), (3, 63, 431), (1, 1, 1), (8, 1100, 2050), (16, 64, 8)]  # r, d_in, d_out
WEIGHT = torch.tensor(0.37, dtype=torch.float64)


def factors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    A = [torch.randn(r, d_in, generator=generator).to(dtype) for r, d_in, _ in LAYERS]
    return A, [torch.randn(d_out, r, generator=generator).to(dtype) for r, _, d_out in LAYERS]


def boundary(operator, merged, finetuned):
    """What it writes and returns, given tensors of its own; Q begins as NaN."""
    M_A, M_B = ([t.clone() for t in tensors] for tensors in merged)
    Q = [torch.full_like(a, torch.nan) for a in finetuned[0]]
    return M_A, M_B, Q, operator(M_A, M_B, Q, *finetuned, WEIGHT)


@pytest.mark.parametrize("merged_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_cpus(cuda, dtype, merged_dtype):
    merged, finetuned = factors(merged_dtype, 0), factors(dtype, 1)
    A, B, Q, status = boundary(cuda.task_boundary_, merged, finetuned)
    expected_A, expected_B, expected_Q, expected_status = boundary(torch.ops.mbf.task_boundary_, merged, finetuned)
    assert torch.equal(status, expected_status) and not status.any()
    assert all(torch.equal(a, b) for a, b in zip([*A, *B], [*expected_A, *expected_B], strict=True))
    rounding = max(2 * torch.finfo(dtype).eps, 1e-14)
    for found, wanted in zip(Q, expected_Q, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=rounding)


def test_every_order_gives_the_same_bits(cuda, order):
    merged, finetuned = factors(torch.float32, 0), factors(torch.float32, 1)
    found = boundary(cuda.task_boundary_, merged, finetuned)
    cuda.seed(0)
    again = boundary(cuda.task_boundary_, merged, finetuned)
    for tensors, others in zip(found[:3], again[:3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("factor", "layer", "place"), [(0, 0, 0), (0, 3, -1), (1, 1, 5), (1, 3, -1), (1, 2, 0)])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_diverged_task_writes_nothing(cuda, dtype, factor, layer, place, value):
    merged, finetuned = factors(dtype, 0), factors(dtype, 1)
    finetuned[factor][layer].view(-1)[place] = value
    A, B, Q, status = boundary(cuda.task_boundary_, merged, finetuned)
    assert all(torch.equal(a, b) for a, b in zip([*A, *B], [*merged[0], *merged[1]], strict=True))
    assert all(q.isnan().all() for q in Q)
    expected = torch.zeros(2 * len(LAYERS), dtype=torch.int32)
    expected[factor * len(LAYERS) + layer] = 2
    assert torch.equal(status, expected)


def test_strides_offsets_and_dependent_rows(cuda):
    merged, finetuned = factors(torch.bfloat16, 0), factors(torch.bfloat16, 1)
    finetuned[0][0][3] = finetuned[0][0][2]
    wide = torch.full((500, 20), torch.nan).bfloat16()
    wide[:, :8] = merged[0][0].mT
    merged[0][0], merged[1][1] = wide[:, :8].mT, torch.randn(3, 431).bfloat16().mT
    finetuned[1][3] = torch.cat([torch.zeros(1), torch.randn(2050 * 8)]).bfloat16()[1:].view(2050, 8)
    Q = [torch.full_like(a, torch.nan) for a in finetuned[0]]
    expected_B = [b.clone() for b in merged[1]]
    torch.ops.mbf.merge_(expected_B, finetuned[1], WEIGHT)
    status = cuda.task_boundary_(*merged, Q, *finetuned, WEIGHT)
    assert status.tolist() == [1, *[0] * 9]
    assert Q[0].isnan().all() and not Q[1].isnan().any()
    assert all(torch.equal(a, b) for a, b in zip([*merged[0], *merged[1]], [*finetuned[0], *expected_B], strict=True))
    assert wide[:, 8:].isnan().all()


def test_more_layers_than_a_launch_holds(cuda):
    A, B = ([torch.randn(2, 9) for _ in range(600)] for _ in range(2))
    M_A, _, Q, status = boundary(cuda.task_boundary_, (A, A), (B, B))
    assert not status.any() and all(torch.equal(m, b) for m, b in zip(M_A, B, strict=True))
    gram = torch.stack(Q) @ torch.stack(Q).mT
    torch.testing.assert_close(gram, torch.eye(2).expand(600, 2, 2), rtol=0, atol=1e-6)
    B[599][1, 8] = torch.nan
    assert boundary(cuda.task_boundary_, (A, A), (B, B))[3].tolist() == [0] * 599 + [2] + [0] * 599 + [2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lists: lists[3].pop(), "one length"),
        (lambda lists: lists[2].__setitem__(0, lists[2][0].double()), "Q 0 must be contiguous"),
        (lambda lists: lists[0].__setitem__(1, torch.ones(2)), "shapes of pair 1 differ"),
        (lambda lists: [x.__setitem__(2, torch.ones(2, 1, 1)) for x in (lists[0], lists[2], lists[3])], "one matrix"),
    ],
)
def test_what_it_cannot_compute_is_refused(cuda, spoil, message):
    merged, finetuned = factors(torch.float32, 0), factors(torch.float32, 1)
    lists = [*merged, [torch.empty_like(a) for a in finetuned[0]], *finetuned]
    spoil(lists)
    with pytest.raises(RuntimeError, match=message):
        cuda.task_boundary_(*lists, WEIGHT)
