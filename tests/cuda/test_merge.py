"""merge.cu under the stand-in: the CPU operator's bits, norms, and no byte more than there is to move."""

from __future__ import annotations

import itertools

import pytest
import torch

import mbf.ops  # noqa: F401  the operators of the CPU

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(FLOATING, FLOATING))
WEIGHTS = (0.0, 0.3, 0.5, 0.7071, 1.0, 1.25)

every_pair = pytest.mark.parametrize(("merged", "finetuned"), PAIRS, ids=lambda dtype: str(dtype).split(".")[-1])


def weight_of(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def pairs(shapes, merged, finetuned):
    M = [(torch.randn(shape) * 3).to(merged) for shape in shapes]
    F = [torch.randn(shape).to(finetuned) for shape in shapes]
    return M, F


def copies(tensors):
    """The same strides and storage offsets as well as the same values."""
    found = []
    for tensor in tensors:
        where = (tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride())
        found.append(torch.empty(0, dtype=tensor.dtype).set_(*where))
    return found


def expected(M, F, weight):
    """The CPU operator's result and its norms, both from the tensors as they were."""
    merged = copies(M)
    torch.ops.mbf.merge_(merged, F, weight_of(weight))
    norms = [
        torch.stack([t.double().square().sum() for t in (f, f.double() - m.double(), new)])
        for m, f, new in zip(M, F, merged, strict=True)
    ]
    return merged, torch.stack(norms)


def assert_bits(found, wanted):
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan()), n
        integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
        a, b = (torch.where(t.isnan(), 0, t).contiguous().view(integers) for t in (a, b))
        assert torch.equal(a, b), f"tensor {n}: {(a != b).sum()} of {a.numel()} elements differ"


@every_pair
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_pair_of_dtypes_gives_the_bits_of_the_cpu(cuda, merged, finetuned, weight):
    M, F = pairs([(3, 5), (8, 1031), (1,), (0, 4)], merged, finetuned)
    wanted, norms = expected(M, F, weight)
    plain, summed = copies(M), copies(M)
    cuda.merge_(plain, F, weight_of(weight))
    assert_bits(plain, wanted)
    torch.testing.assert_close(cuda.merge_with_norms_(summed, F, weight_of(weight)), norms, rtol=1e-6, atol=1e-9)
    assert_bits(summed, wanted)


def test_a_list_of_mixed_dtypes_sizes_and_strides(cuda, order):
    M, F = [], []
    for n, (merged, finetuned) in enumerate(PAIRS):
        shape = (2 + n, 777 * (1 + n % 3))
        M.append((torch.randn(shape) * 2).to(merged))
        F.append(torch.randn(shape).to(finetuned))
    M[3], F[3] = M[3].mT, F[3].mT
    M[5], F[7] = M[5][:, 1:-1], F[7][:, 3:]  # rows with gaps, the first not on 16 bytes
    M[7], F[5] = M[7][:, 3:], F[5][:, :-2]
    M[9] = M[9].flatten()[1:]  # contiguous, but for its beginning on 16 bytes
    F[9] = F[9].flatten()[1:]
    assert M[9].is_contiguous() and M[9].data_ptr() % 16
    wanted, norms = expected(M, F, 0.6)
    gaps = copies(M)
    found = cuda.merge_with_norms_(gaps, F, weight_of(0.6))
    assert_bits(gaps, wanted)
    assert_bits(
        [torch.empty(0).to(M[5].dtype).set_(gaps[5].untyped_storage())],
        [torch.empty(0).to(M[5].dtype).set_(wanted[5].untyped_storage())],
    )  # nothing written in between
    torch.testing.assert_close(found, norms, rtol=1e-6, atol=1e-9)


def test_norms_are_the_same_in_every_order_and_at_every_alignment(cuda):
    M, F = pairs([(9, 5000)], torch.float32, torch.bfloat16)
    found = []
    for seed, shift in itertools.product(range(4), (0, 1)):
        cuda.seed(seed)
        m, f = (torch.cat([t.new_zeros(shift), t.flatten()])[shift:] for t in (M[0], F[0]))
        found.append(cuda.merge_with_norms_([m], [f], weight_of(0.25)))
    for norms in found[1:]:
        assert torch.equal(norms, found[0])


def test_fp64_norms_to_the_last_digits(cuda):
    M, F = pairs([(4, 6001)], torch.float64, torch.float64)
    _, norms = expected(M, F, 0.4)
    torch.testing.assert_close(cuda.merge_with_norms_(M, F, weight_of(0.4)), norms, rtol=1e-13, atol=0)


def test_more_pairs_than_one_launch_holds(cuda, order, traffic):
    shapes = [(1 + n % 7, 3) for n in range(600)]
    M, F = pairs(shapes, torch.bfloat16, torch.float32)
    wanted, norms = expected(M, F, 0.3)
    found = cuda.merge_with_norms_(M, F, weight_of(0.3))
    assert_bits(M, wanted)
    torch.testing.assert_close(found, norms, rtol=1e-6, atol=1e-9)
    assert traffic()["merge_kernel"].launches == 5 and traffic()["add_pieces_kernel"].launches == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_norms_tell_which_tensor_is_not_finite(cuda, bad):
    M, F = pairs([(64, 300)] * 4, torch.float32, torch.bfloat16)
    F[1][13, 7] = bad
    M[3][2, 299] = bad
    norms = cuda.merge_with_norms_(M, F, weight_of(0.5))
    assert norms.isfinite().tolist() == [[True] * 3, [False] * 3, [True] * 3, [True, False, False]]


def test_where_nothing_moves_nothing_changes(cuda):
    M, F = pairs([(5, 999)], torch.float16, torch.float16)
    M[0][0, 0], F[0][0, 0] = 6e-8, 65504.0
    before = copies(M)
    cuda.merge_(M, F, weight_of(0.0))
    assert_bits(M, before)
    cuda.merge_(M, F, weight_of(1.0))
    assert_bits(M, F)


def test_every_byte_is_moved_once(cuda, traffic):
    M, F = pairs([(64, 1024), (3, 1000)], torch.float32, torch.bfloat16)
    cuda.merge_(M, F, weight_of(0.5))
    elements, threads = sum(m.numel() for m in M), 9 * 256
    assert traffic() == {"merge_kernel": (1, elements * 6 + threads * 8, elements * 4)}
    assert cuda.counters() == [1, elements * 6 + threads * 8, elements * 4]


def test_empty_lists(cuda, traffic):
    cuda.merge_([], [], weight_of(0.5))
    assert cuda.merge_with_norms_([], [], weight_of(0.5)).shape == (0, 3)
    none = torch.empty(0, 3)
    assert cuda.merge_with_norms_([none], [none], weight_of(0.5)).tolist() == [[0.0] * 3]
    assert "merge_kernel" not in traffic()


@pytest.mark.parametrize(
    ("M", "F", "weight", "message"),
    [
        ([torch.ones(2)], [], weight_of(0.5), "1 tensors and 0"),
        ([torch.ones(2)], [torch.ones(3)], weight_of(0.5), "shapes of pair 0 differ"),
        ([torch.ones(2, dtype=torch.int32)], [torch.ones(2)], weight_of(0.5), "must be fp64, fp32, bf16 or fp16"),
        ([torch.ones(2)], [torch.ones(2)], torch.tensor(0.5), "0-d fp64 tensor"),
    ],
)
def test_what_it_cannot_compute_is_refused(cuda, M, F, weight, message):
    before = copies(M)
    with pytest.raises(RuntimeError, match=message):
        cuda.merge_(M, F, weight)
    assert all(torch.equal(a, b) for a, b in zip(M, before, strict=True))
