"""Whether the tensors that an operator writes lie apart in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Span(NamedTuple):
    """From a tensor's first byte to its last; more than its own where it has gaps."""

    begin: int
    end: int
    n: int
    written: bool
    tensor: Tensor
    name: str


def check_apart(
    merged: Sequence[Tensor], finetuned: Sequence[Tensor], name: Callable[[int], str] = "merged[{}]".format
) -> None:
    """Raise ValueError where memory of ``merged`` is also another's, of ``merged`` or ``finetuned``.

    A tensor may be its own partner in ``finetuned``, exactly; the two then lie alike. ``name`` is what the error calls
    a tensor of ``merged``.
    """
    if torch.compiler.is_compiling():
        return
    spans = [*_spans(merged, True, name), *_spans(finetuned, False, "finetuned[{}]".format)]
    spans.sort(key=lambda span: span[:3])
    end = 0
    together: list[_Span] = []
    for span in spans:
        if span.begin >= end:
            _check(together)
            together = []
        together.append(span)
        end = max(end, span.end)
    _check(together)


def _spans(tensors: Sequence[Tensor], written: bool, name: Callable[[int], str]) -> Iterator[_Span]:
    for n, tensor in enumerate(tensors):
        begin, elements = tensor.data_ptr(), tensor.numel()
        if not begin or not elements:  # neither one of no elements nor one on meta has memory
            continue
        if not tensor.is_contiguous():
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            if written and reach < elements:
                raise ValueError(
                    f"{name(n)}: several of its elements are one in memory, as in expanded tensors; pass its clone()"
                )
            elements = reach
        yield _Span(begin, begin + elements * tensor.element_size(), n, written, tensor, name(n))


def _check(together: list[_Span]) -> None:
    """Spans that overlap; what has gaps may yet lie apart, as the columns of one matrix do."""
    for place, one in enumerate(together):
        for other in together[place + 1 :]:
            if not (one.written or other.written) or other.begin >= one.end:
                continue
            if (one.n == other.n and _lie_alike(one.tensor, other.tensor)) or not _meet(one.tensor, other.tensor):
                continue
            second, first = sorted((one, other), key=lambda span: (span.written, span.n))
            found = "is the same memory as" if one.begin == other.begin else "shares memory with"
            raise ValueError(f"{first.name}: {found} {second.name}; pass it once, or a clone() of it")


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether tensors whose spans overlap have a byte in common."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    if _beside(one, other):
        return False
    return bool(torch.isin(_bytes(one), _bytes(other)).any())


def _beside(one: Tensor, other: Tensor) -> bool:
    """Whether both are columns of rows of one length, and have none in common."""
    alike = one.dim() == other.dim() == 2 and one.stride(0) == other.stride(0) and one.dtype == other.dtype
    if not alike or one.stride(1) != 1 or other.stride(1) != 1 or not one.stride(0):
        return False
    row = one.stride(0) * one.element_size()
    place = (other.data_ptr() - one.data_ptr()) % row  # of the other's first column in one's rows
    widths = [tensor.shape[1] * tensor.element_size() for tensor in (one, other)]
    return widths[0] <= place and place + widths[1] <= row


def _bytes(tensor: Tensor) -> Tensor:
    """The addresses of all its bytes."""
    size = tensor.element_size()
    found = tensor.data_ptr() + torch.arange(size)
    for length, step in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + step * size * torch.arange(length)).flatten()
    return found
