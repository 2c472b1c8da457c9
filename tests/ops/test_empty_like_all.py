from __future__ import annotations

import pytest
import torch

from mbf.ops import native_status, use_backend
from mbf.ops.empty_like_all import empty_like_all, empty_like_all_ref

native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")


def mixture(count: int) -> list[torch.Tensor]:
    """Each dtype ``count`` times a matrix and something odd."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    shapes = ((16, 4096), (3, 0, 5), (), (7, 3))
    return [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in dtypes for _ in range(count)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("count", [1, 40])
def test_shapes_dtypes_and_nothing_in_common(backend, count):
    like = [*mixture(count), torch.zeros(5, 6).mT, torch.zeros(4, 2, 9)[:, 1], torch.nn.Parameter(torch.zeros(3, 3))]
    with use_backend(backend):
        found = empty_like_all(like)
    for n, (tensor, wanted) in enumerate(zip(found, like, strict=True)):
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
        assert tensor.is_contiguous() and not tensor.requires_grad
        tensor.fill_(n)
    assert all(bool((tensor == n).all()) for n, tensor in enumerate(found))


@native
def test_what_is_large_together_is_one_allocation_a_dtype():
    """It begins on a huge page, every part on a cache line; what is small, and each alone, has its own."""
    like = [torch.zeros(r, 4099, dtype=dtype) for r in (3, 60) for dtype in (torch.float32, torch.bfloat16)] * 16
    found = empty_like_all(like)
    storages = {d: {t.untyped_storage().data_ptr() for t in found if t.dtype == d} for d in {t.dtype for t in found}}
    assert len(storages[torch.float32]) == 1 and len(storages[torch.bfloat16]) == 32
    assert found[0].data_ptr() % (1 << 21) == 0
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found)


def test_to_autograd_each_is_a_tensor_of_its_own():
    """A change of one in place is none of another, though they are of one allocation."""
    first, second = empty_like_all([torch.zeros(256, 8192), torch.zeros(256, 8192)])
    first.fill_(1.0), second.fill_(2.0)
    weight = torch.ones((), requires_grad=True)
    loss = (first * weight).sum()  # saves first
    second.add_(1.0)
    loss.backward()
    assert second._version != first._version and not first._is_view()
    first.mul_(weight)
    assert first.requires_grad and not second.requires_grad


def test_opcheck():
    """But for the comparison of results in and out of a graph: they have no values."""
    torch.library.opcheck(
        torch.ops.mbf.empty_like_all.default,
        ([torch.zeros(2, 3), torch.zeros(4).half()],),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_meta_tensors_have_results_without_memory():
    assert [t.is_meta for t in empty_like_all_ref([torch.zeros(2, device="meta")])] == [True]
    assert empty_like_all([torch.zeros(2, 3, device="meta")])[0].is_meta


@native
def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match=r"empty_like_all: like\[1\] is Int"):
        torch.ops.mbf.empty_like_all([torch.zeros(2), torch.zeros(2, dtype=torch.int32)])
