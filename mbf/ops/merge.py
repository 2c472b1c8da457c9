"""``merge_``: move many tensors towards their fine-tuned values, in place and in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mbf.ops._gpu import in_cuda
from mbf.ops._inputs import FLOATS, by_device, check_dense, check_floating, finite
from mbf.ops._library import define, native_serves, reference_only
from mbf.ops._overlap import check_apart


def merge_ref_(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: Tensor) -> None:
    """``M ← M + λ (F − M)`` for every pair, in fp32 or wider, rounded once to M's dtype.

    ``torch.lerp`` is that formula written so that λ = 0 and λ = 1 give M and F to the last bit, where F − M is finite.
    """
    for M, F in zip(merged, finetuned, strict=True):
        compute = torch.promote_types(torch.promote_types(M.dtype, F.dtype), torch.float32)
        before, after = M.to(compute), F.to(compute)
        between = torch.lerp(before, after, weight.to(compute))
        M.copy_(torch.where(weight == 0, before, torch.where(weight == 1, after, between)))


class MergeNorms(NamedTuple):
    """Norms of every pair of a merge, fp64 ``[n]``; NaN or infinite where a tensor is not finite."""

    finetuned: Tensor
    step: Tensor
    merged: Tensor


def merge_with_norms_ref_(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: Tensor) -> Tensor:
    """``merge_ref_`` that returns ``[n, 3]``: Σ F², Σ (F − M)² with M as it was, Σ M² as it is written."""
    before = [M.to(torch.float64, copy=True) for M in merged]
    merge_ref_(merged, finetuned, weight)
    squares = [
        torch.stack([F.double().square().sum(), (F.double() - old).square().sum(), M.double().square().sum()])
        for M, F, old in zip(merged, finetuned, before, strict=True)
    ]
    return torch.stack(squares) if squares else weight.new_empty(0, 3, dtype=torch.float64)


def _merge_fake(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: Tensor) -> None:
    """Mutates ``merged`` and returns nothing."""


def _merge_with_norms_fake(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: Tensor) -> Tensor:
    return weight.new_empty(len(merged), 3, dtype=torch.float64)


# The weight is a 0-d tensor, not a float: a schedule's new λ then neither recompiles a graph nor reads a value back
# from a GPU.
_ARGUMENTS = "Tensor(a!)[] merged, Tensor[] finetuned, Tensor weight"
define(f"merge_({_ARGUMENTS}) -> ()", merge_ref_, _merge_fake, cuda=in_cuda("merge_"))
define(
    f"merge_with_norms_({_ARGUMENTS}) -> Tensor",
    merge_with_norms_ref_,
    _merge_with_norms_fake,
    cuda=in_cuda("merge_with_norms_"),
)


@overload
def merge_(
    merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: float | Tensor, *, norms: Literal[False] = False
) -> None: ...
@overload
def merge_(
    merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: float | Tensor, *, norms: Literal[True]
) -> MergeNorms: ...
def merge_(
    merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: float | Tensor, *, norms: bool = False
) -> MergeNorms | None:
    """Merge ``finetuned`` into ``merged`` in place: ``M ← M + λ (F − M)`` for every pair (SLAO, Algorithm 1, step 4).

    λ = 0 leaves M and λ = 1 gives F, both exactly; where M = F the pair is unchanged. Half precision is computed in
    fp32 and rounded once. On a CPU the result does not depend on the number of threads. Not differentiable: for a
    gradient in λ use ``lora_linear``'s ``merge_weight``.

    Args:
        merged: tensors of any shapes, strides and devices, fp64, fp32, bf16 or fp16; all are changed. None may share
            memory with another of the list, or with another's partner in ``finetuned``.
        finetuned: one tensor for each of ``merged``, of its shape and device; its dtype may differ.
        weight: λ, a finite number or a 0-d floating tensor on any device, which is never read back to the host.
        norms: take norms in the same pass.

    Returns:
        None; with ``norms`` those of F, of F − M as M was, and of M as it is now, for every pair, on the device of the
        first. A tensor with NaN or infinity makes its norm so, which tells a task that diverged for free (M then holds
        them, too; ``task_boundary_`` looks first).

    Raises:
        TypeError: for anything but floating tensors of the dtypes above.
        ValueError: when lengths, shapes or devices differ, tensors share memory as they may not, or λ is not 0-d or not
            finite. Nothing is changed then.
    """

    def check() -> None:
        check_pairs(merged, finetuned)
        check_apart(merged, finetuned)

    served = go_together(merged, finetuned) and native_serves(merged, finetuned)
    if not served:
        check()
    weight = weight_tensor(weight)
    squares: list[Tensor] = []
    groups = [list(range(len(merged)))] if served and merged else by_device(merged)
    try:
        for here in groups:
            pairs = [merged[n] for n in here], [finetuned[n] for n in here]
            with torch.no_grad():
                found = _operator(norms)(*pairs, weight.to(merged[here[0]].device))
            if norms:
                squares.append(found)
    except (RuntimeError, TypeError):
        check()
        raise
    written(merged)
    return _norms(squares, groups) if norms else None


def _norms(squares: list[Tensor], groups: list[list[int]]) -> MergeNorms:
    """The norms of all pairs in their order, on the first device; of one device, without waiting for it."""
    if len(squares) == 1:
        return MergeNorms(*squares[0].sqrt().unbind(1))
    together = torch.empty(
        sum(map(len, groups)), 3, dtype=torch.float64, device=squares[0].device if squares else "cpu"
    )
    for found, here in zip(squares, groups, strict=True):
        together[here] = found.to(together.device)
    return MergeNorms(*together.sqrt().unbind(1))


def _operator(norms: bool) -> Callable[..., Any]:
    if norms:
        return merge_with_norms_ref_ if reference_only() else torch.ops.mbf.merge_with_norms_.default
    return merge_ref_ if reference_only() else torch.ops.mbf.merge_.default


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that kernels wrote ``tensors`` behind its back; compiled graphs end in a copy_, which does."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def weight_tensor(weight: float | Tensor) -> Tensor:
    """λ as a 0-d fp64 tensor, or a ValueError."""
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or not weight.is_floating_point():
            raise ValueError(
                f"weight: got a {weight.dtype} tensor of shape {tuple(weight.shape)}; pass a float or a 0-d floating "
                "tensor"
            )
        return weight.detach().to(torch.float64)
    if not torch.compiler.is_compiling():
        weight = finite(weight, "weight")
    return torch.full((), weight, dtype=torch.float64, device="cpu")


def check_pairs(
    merged: Sequence[Tensor], finetuned: Sequence[Tensor], names: tuple[str, str] = ("merged", "finetuned")
) -> None:
    """Raise TypeError or ValueError unless every tensor of one list can be merged into its partner of the other."""
    if not _fit(merged, finetuned):  # a model has hundreds of pairs, so what's wrong is looked for only then
        _complain(merged, finetuned, *names)


def _fit(merged: Sequence[Tensor], finetuned: Sequence[Tensor]) -> bool:
    return go_together(merged, finetuned) and all(
        isinstance(M, Tensor)
        and isinstance(F, Tensor)
        and M.dtype in FLOATS
        and F.dtype in FLOATS
        and M.shape == F.shape
        and M.device == F.device
        and M.layout is F.layout is torch.strided
        for M, F in zip(merged, finetuned, strict=True)
    )


def go_together(*lists: Sequence[Tensor]) -> bool:
    """Whether these are lists of one length; a tensor is none, though it can be counted out."""
    return all(map(_is_list, lists)) and len(set(map(len, lists))) == 1


def _is_list(tensors: Sequence[Tensor]) -> bool:
    return isinstance(tensors, (list, tuple, nn.ParameterList))


def _complain(merged: Sequence[Tensor], finetuned: Sequence[Tensor], into: str, source: str) -> None:
    for argument, tensors in ((into, merged), (source, finetuned)):
        if isinstance(tensors, Tensor):
            raise TypeError(f"{argument}: got one tensor; pass a list of tensors, [{argument}]")
        if not _is_list(tensors):
            raise TypeError(f"{argument}: got {type(tensors).__name__}; pass a list of tensors")
        for n, tensor in enumerate(tensors):
            check_floating(tensor, f"{argument}[{n}]")
            check_dense(tensor, f"{argument}[{n}]")
    if len(merged) != len(finetuned):
        raise ValueError(f"{into} has {len(merged)} tensors and {source} has {len(finetuned)}; pass them in pairs")
    for n, (M, F) in enumerate(zip(merged, finetuned, strict=True)):
        if M.shape != F.shape:
            raise ValueError(f"{source}[{n}]: got shape {tuple(F.shape)}; {into}[{n}] has {tuple(M.shape)}")
        if M.device != F.device:
            raise ValueError(f"{source}[{n}]: is on {F.device}; move it to {M.device}, where {into}[{n}] is")
