"""``task_boundary_``: what SLAO does between two tasks, for all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbf.ops._gpu import in_cuda
from mbf.ops._inputs import by_device
from mbf.ops._library import define, native_serves, reference_only
from mbf.ops._overlap import check_apart
from mbf.ops._status import DONE, NOT_FINITE, NOT_FINITE_MESSAGE, given_up
from mbf.ops.basis import check_rows, orthonormal_rows_ref, settle
from mbf.ops.empty_like_all import empty_like_all, empty_like_all_ref
from mbf.ops.merge import check_pairs, go_together, merge_ref_, weight_tensor, written

Pairs = tuple[Sequence[Tensor], Sequence[Tensor]]


def task_boundary_ref_(
    merged_A: Sequence[Tensor],
    merged_B: Sequence[Tensor],
    Q: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
) -> Tensor:
    """``B_merge ← B_merge + λ (B − B_merge)``, ``A_merge ← A`` and Q of every A; returns the status of every A and then
    of every B. Where one isn't finite, nothing is merged or replaced, and Q means nothing."""
    finite = torch.stack([tensor.isfinite().all() for tensor in (*A, *B)])
    if bool(finite.all()):
        merge_ref_(merged_B, B, weight)
        for into, basis, matrix in zip(merged_A, Q, A, strict=True):
            into.copy_(matrix)
            basis.copy_(orthonormal_rows_ref(matrix))
    return torch.where(finite, DONE, NOT_FINITE).to(torch.int32)


def _fake(
    merged_A: Sequence[Tensor],
    merged_B: Sequence[Tensor],
    Q: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
) -> Tensor:
    return A[0].new_empty(2 * len(A), dtype=torch.int32)


# Q is written into tensors of the caller's, on the CPU A's own if need be: an operator that changes its inputs cannot
# return a list.
define(
    "task_boundary_(Tensor(a!)[] merged_A, Tensor(b!)[] merged_B, Tensor(c!)[] Q, Tensor[] A, Tensor[] B, "
    "Tensor weight) -> Tensor",
    task_boundary_ref_,
    _fake,
    cuda=in_cuda("task_boundary_"),
)


def task_boundary_(merged: Pairs, finetuned: Pairs, weight: float | Tensor, *, in_place: bool = False) -> list[Tensor]:
    """End a task and prepare the next (SLAO, Algorithm 1, steps 4 and 1): ``B_merge ← B_merge + λ (B_ft − B_merge)``,
    ``A_merge ← A_ft``, and Q, the orthonormal start of the next task's A, for all layers in one call.

    The same as ``merge_`` of every B, a copy of every A and ``orthonormal_rows`` of every A_ft, in fewer readings of
    them. A diverged task is caught before anything is written. Not differentiable.

    Args:
        merged: ``(A_merge, B_merge)``, lists with a ``[r, d_in]`` and a ``[d_out, r]`` for every layer, fp64, fp32,
            bf16 or fp16, of any strides; changed in place. No two may share memory.
        finetuned: ``(A_ft, B_ft)`` of the same shapes and devices; dtypes may differ.
        weight: λ, a finite number or a 0-d floating tensor on any device; the paper's is 1/√i.
        in_place: write Q over A_ft, whose values A_merge has now. Then ``finetuned`` is what the next task starts from;
            on the CPU next to no memory is taken. No two A_ft may share memory, nor one with anything else.

    Returns:
        Q for every layer, with the shape, dtype and device of its A_ft, possibly parts of one allocation; see
        ``orthonormal_rows``. The tensors of A_ft with ``in_place``.

    Raises:
        TypeError: for anything but such tensors.
        ValueError: when lengths, shapes or devices differ, r > d_in, tensors of ``merged`` share memory, λ is not
            finite, or a fine-tuned tensor holds NaN or infinity. Nothing is changed then.
    """
    (merged_A, merged_B), (A, B) = _two_lists(merged, "merged"), _two_lists(finetuned, "finetuned")

    def check() -> None:
        check_pairs(merged_A, A, ("A of merged", "A of finetuned"))
        check_pairs(merged_B, B, ("B of merged", "B of finetuned"))
        _check_layers(A, B)
        check_apart([*merged_A, *merged_B], [*A, *B])
        if in_place:
            names = [f"A of {pair}[{n}]" for pair in ("merged", "finetuned") for n in range(len(A))]
            check_apart([*merged_A, *A], [], names.__getitem__)

    lists = (merged_A, merged_B, A, B)
    served = go_together(*lists) and native_serves(*lists)
    over_A = served and in_place and all([a.is_contiguous() for a in A])
    if not served or (in_place and not over_A):  # the extension checks what it is given, which is then not Q over A_ft
        check()
    weight = weight_tensor(weight)
    with torch.no_grad():
        if served and A:
            try:
                Q = list(A) if over_A else empty_like_all(A)
                _on_one_device(merged_A, merged_B, Q, A, B, weight, range(len(A)))
            except (RuntimeError, TypeError):
                check()
                raise
        else:
            Q = _on_their_devices((merged_A, merged_B), (A, B), weight)
        if in_place:
            for into, basis in zip(A, Q, strict=True):
                if into is not basis:
                    into.copy_(basis)
            Q = list(A)
    written([*merged_A, *merged_B, *(A if in_place else ())])
    return Q


def _on_their_devices(merged: Pairs, finetuned: Pairs, weight: Tensor) -> list[Tensor]:
    Q = empty_like_all_ref(finetuned[0])
    groups = by_device(Q)
    if len(groups) > 1:
        _check_finite(*finetuned)
    for here in groups:
        M_A, M_B, Q_here, A, B = ([tensors[n] for n in here] for tensors in (*merged, Q, *finetuned))
        _on_one_device(M_A, M_B, Q_here, A, B, weight.to(Q_here[0].device), here)
    return Q


def _on_one_device(
    merged_A: Sequence[Tensor],
    merged_B: Sequence[Tensor],
    Q: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
    places: Sequence[int],
) -> None:
    """``task_boundary_ref_`` by the fastest kernel; Q, too, has what that gave up. ``places`` of all are for errors."""
    operator = task_boundary_ref_ if reference_only() else torch.ops.mbf.task_boundary_.default
    status = operator(merged_A, merged_B, Q, A, B, weight).tolist()
    settle(A, Q, status[: len(A)], lambda n: f"A[{places[n]}] of finetuned")
    given_up(status[len(A) :], B, lambda n: f"B[{places[n]}] of finetuned")


def _two_lists(pairs: Pairs, name: str) -> Pairs:
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
        what = f"{len(pairs)} entries" if isinstance(pairs, (tuple, list)) else type(pairs).__name__
        raise TypeError(f"{name}: got {what}; pass (A, B), a list of tensors each")
    return pairs


def _check_layers(A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
    if len(A) != len(B):
        raise ValueError(f"finetuned has {len(A)} A and {len(B)} B; pass one of each for every layer")
    for n, (a, b) in enumerate(zip(A, B, strict=True)):
        if a.dim() != 2 or not 1 <= a.shape[0] <= a.shape[1]:
            check_rows(a, f"A[{n}] of finetuned")
            raise ValueError(f"A[{n}] of finetuned: has shape {tuple(a.shape)}; pass one matrix [r, d_in] a layer")
        if a.device != b.device:
            raise ValueError(f"B[{n}] of finetuned: is on {b.device}; move it to {a.device}, where A[{n}] is")


def _check_finite(A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
    """Look at all devices before the first of them writes."""
    for tensors, name in ((A, "A"), (B, "B")):
        for n, tensor in enumerate(tensors):
            if not tensor.isfinite().all():
                raise ValueError(NOT_FINITE_MESSAGE.format(f"{name}[{n}] of finetuned"))
