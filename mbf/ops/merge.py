"""``merge_``: move many tensors towards their fine-tuned values, in place and in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mbf.ops._inputs import check_floating
from mbf.ops._library import define, reference_only


def merge_ref_(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: Tensor) -> None:
    """``M ← M + λ (F − M)`` for every pair, in fp32 or wider, rounded once to M's dtype.

    ``torch.lerp`` is that formula written so that λ = 0 and λ = 1 give M and F to the last bit.
    """
    for M, F in zip(merged, finetuned, strict=True):
        compute = torch.promote_types(torch.promote_types(M.dtype, F.dtype), torch.float32)
        M.copy_(torch.lerp(M.to(compute), F.to(compute), weight.to(compute)))


def _merge_fake(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: Tensor) -> None:
    """Mutates ``merged`` and returns nothing."""


# The weight is a 0-d tensor, not a float: a schedule's new λ then neither recompiles a graph nor reads a value back
# from a GPU.
define("merge_(Tensor(a!)[] merged, Tensor[] finetuned, Tensor weight) -> ()", merge_ref_, _merge_fake)


def merge_(merged: Sequence[Tensor], finetuned: Sequence[Tensor], weight: float | Tensor) -> None:
    """Merge ``finetuned`` into ``merged`` in place: ``M ← M + λ (F − M)`` for every pair (SLAO, Algorithm 1, step 4).

    λ = 0 leaves M and λ = 1 gives F, both exactly; where M = F the pair is unchanged. Half precision is computed in
    fp32 and rounded once. On a CPU the result does not depend on the number of threads. Not differentiable: for a
    gradient in λ use ``lora_linear``'s ``merge_weight``.

    Args:
        merged: tensors of any shapes, strides and devices, fp64, fp32, bf16 or fp16; all are changed. None may share
            memory with another of the list, or with another's partner in ``finetuned``.
        finetuned: one tensor for each of ``merged``, of its shape and device; its dtype may differ.
        weight: λ, a finite number or a 0-d floating tensor on any device, which is never read back to the host.

    Raises:
        TypeError: for anything but floating tensors of the dtypes above.
        ValueError: when lengths, shapes or devices differ, two of ``merged`` are the same memory, or λ is not 0-d or
            not finite. Nothing is changed then.
    """
    _check_pairs(merged, finetuned)
    weight = _weight_tensor(weight)
    with torch.no_grad():
        for device in dict.fromkeys(M.device for M in merged):  # a model may be spread over several
            here = [n for n, M in enumerate(merged) if M.device == device]
            pairs = [merged[n] for n in here], [finetuned[n] for n in here]
            if reference_only():
                merge_ref_(*pairs, weight.to(device))
            else:
                torch.ops.mbf.merge_(*pairs, weight.to(device))
    if not torch.compiler.is_compiling():  # kernels write behind autograd's back; compiled graphs end in a copy_
        torch.autograd.graph.increment_version(merged)


def _weight_tensor(weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or not weight.is_floating_point():
            raise ValueError(
                f"weight: got a {weight.dtype} tensor of shape {tuple(weight.shape)}; pass a float or a 0-d floating "
                "tensor"
            )
        return weight.detach().to(torch.float64)
    if not torch.compiler.is_compiling() and not math.isfinite(weight):
        raise ValueError(f"weight: got {weight}; λ must be finite")
    return torch.full((), weight, dtype=torch.float64)


def _check_pairs(merged: Sequence[Tensor], finetuned: Sequence[Tensor]) -> None:
    for argument, tensors in (("merged", merged), ("finetuned", finetuned)):
        if isinstance(tensors, Tensor):
            raise TypeError(f"{argument}: got one tensor; pass a list of tensors, [{argument}]")
        for n, tensor in enumerate(tensors):
            check_floating(tensor, f"{argument}[{n}]")
    if len(merged) != len(finetuned):
        raise ValueError(f"merged has {len(merged)} tensors and finetuned has {len(finetuned)}; pass them in pairs")
    for n, (M, F) in enumerate(zip(merged, finetuned, strict=True)):
        if M.shape != F.shape:
            raise ValueError(f"finetuned[{n}]: got shape {tuple(F.shape)}; merged[{n}] has {tuple(M.shape)}")
        if M.device != F.device:
            raise ValueError(f"finetuned[{n}]: is on {F.device}; move it to {M.device}, where merged[{n}] is")
    if not torch.compiler.is_compiling():
        _check_distinct(merged)


def _check_distinct(merged: Sequence[Tensor]) -> None:
    first: dict[int, int] = {}
    for n, M in enumerate(merged):
        if M.numel() and first.setdefault(M.data_ptr(), n) != n:
            raise ValueError(f"merged[{n}]: is the same memory as merged[{first[M.data_ptr()]}]; pass it once")
