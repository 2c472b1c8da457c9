"""The low-rank branch ``s · (gate ⊙ (drop(x) Aᵀ mixᵀ)) Bᵀ`` that ``lora_linear`` and ``lora_accumulate`` share.

Formulas, forward and backward, with x ``[..., d_in]``, A ``[r, d_in]``, B ``[d_out, r]``, and dy the gradient of y::

    h = drop(x) Aᵀ        u = h mixᵀ        z = gate ⊙ u        y += s z B̂ᵀ        B̂ = B₀ + λ (B − B₀)

    dB̂ = s dyᵀ z          dB = λ dB̂         dB₀ = (1 − λ) dB̂    dλ = ⟨dB̂, B − B₀⟩
    dz = s dy B̂           dgate = Σ dz ⊙ u (over the axes that gate was broadcast along)
    du = gate ⊙ dz        dmix = duᵀ h      dh = du mix
    dA = dhᵀ drop(x)      dx += drop(dh A)

(B̂ = B and dB = dB̂ without a merged B₀.) The branch computes in the dtype of A and B. Backward keeps h, r numbers a
row, because it costs a product and a mask to make again; drop(x) is made again from x and the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mbf.ops._operands import Branch
from mbf.ops.philox import drop, keep_mask

# -- formulas ----------------------------------------------------------------------------------------------------------


def effective_B(B: Tensor, merged_B: Tensor | None, merge_weight: Tensor | None) -> Tensor:
    """``B̂ = B₀ + λ (B − B₀)``."""
    if merged_B is None or merge_weight is None:
        return B
    return merged_B + merge_weight * (B - merged_B)


def project(x: Tensor, branch: Branch) -> Tensor:
    """``h = drop(x) Aᵀ``, ``[..., r]``."""
    return F.linear(drop(in_branch_dtype(x, branch), mask(branch, x.shape[:-1], x.device), branch.dropout_p), branch.A)


def mask(branch: Branch, lead: Sequence[int], device: torch.device) -> Tensor | None:
    """The dropout mask of x ``[*lead, d_in]``, None without dropout."""
    return keep_mask((*lead, branch.A.shape[1]), branch.dropout_p, branch.seed, device)


def in_branch_dtype(tensor: Tensor, branch: Branch) -> Tensor:
    return tensor if tensor.dtype == branch.A.dtype else tensor.to(branch.A.dtype)


def rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as the matrix ``[rows, n]``, n of zero included."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def route(h: Tensor, gate: Tensor | None, mix: Tensor | None) -> tuple[Tensor, Tensor]:
    """``u = h mixᵀ`` and ``z = gate ⊙ u``."""
    u = h if mix is None else F.linear(h, mix.to(h.dtype))
    return u, u if gate is None else (u * gate).to(h.dtype)


def add_product_(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """``y += s · left right`` for matrices, rounding into y's dtype once."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scale)
    else:
        y.add_(left @ right, alpha=scale)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``s · left right`` for matrices, rounded once."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0.0, alpha=scale)


def add_branch_(y: Tensor, h: Tensor, branch: Branch) -> None:
    """``y += s z B̂ᵀ`` for y ``[..., d_out]``, contiguous."""
    z = route(h, branch.gate, branch.mix)[1]
    B = effective_B(branch.B, branch.merged_B, branch.merge_weight)
    add_product_(rows(y), rows(z), B.t(), branch.scale)


def branch_backward(
    dy: Tensor, h: Tensor, x: Tensor | None, keep: Tensor | None, branch: Branch, needs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Differentiate the branch.

    Args:
        dy: gradient of y, ``[rows, d_out]``.
        h: what ``project`` gave, ``[..., r]``.
        x: its input; read only for A's gradient.
        keep: the mask of x, None without dropout.
        branch: the operands.
        needs: which gradients are asked: of x, A, B, gate, mix, merged_B, merge_weight.

    Returns:
        dh ``[rows, r]``, from which the operator makes dx, and the gradients of A, B, gate, mix, merged_B and
        merge_weight, None where not asked.
    """
    _, B, scale, gate, mix, p, _, merged_B, merge_weight = branch
    need_x, need_A, need_B, need_gate, need_mix, need_merged_B, need_weight = needs
    dy = in_branch_dtype(dy, branch)
    u, z = route(h, gate, mix)
    dh = dA = dB = dgate = dmix = dmerged_B = dweight = None

    if need_B or need_merged_B or need_weight:
        dB = scaled_product(dy.t(), rows(z), scale)
        if merged_B is not None and merge_weight is not None:
            dweight = (dB * (B - merged_B)).sum().to(merge_weight) if need_weight else None
            dmerged_B = (1.0 - merge_weight) * dB if need_merged_B else None
            dB = merge_weight * dB if need_B else None

    if need_x or need_A or need_gate or need_mix:
        dz = scaled_product(dy, effective_B(B, merged_B, merge_weight), scale).view(h.shape)
        if gate is not None:
            dgate = (dz * u).sum_to_size(gate.shape).to(gate.dtype) if need_gate else None
            dz = (dz * gate).to(h.dtype)
        dh = rows(dz)
        if mix is not None:
            dmix = (dh.t() @ rows(h)).to(mix.dtype) if need_mix else None
            dh = dh @ mix.to(h.dtype)
        if need_A and x is not None:
            dA = dh.t() @ rows(drop(in_branch_dtype(x, branch), keep, p))

    return dh, [dA, dB, dgate, dmix, dmerged_B, dweight]


def input_gradient(dh: Tensor, keep: Tensor | None, branch: Branch) -> Tensor:
    """``drop(dh A)``, ``[rows, d_in]``."""
    return drop(dh @ branch.A, keep if keep is None else rows(keep), branch.dropout_p)


def add_input_gradient_(dx: Tensor, dh: Tensor, keep: Tensor | None, branch: Branch) -> None:
    """``dx += drop(dh A)`` for dx ``[rows, d_in]``."""
    if keep is None:
        add_product_(dx, dh, branch.A)
    else:
        dx.add_(input_gradient(dh, keep, branch))


# -- autograd ----------------------------------------------------------------------------------------------------------


def asked_like(operands: Iterable[Tensor | None], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """Fake gradients: each that is asked is as its operand is, the others are None."""
    return tuple(
        t.new_empty(t.shape) if need and t is not None else None for t, need in zip(operands, needs, strict=True)
    )


def packed(like: Tensor, gradients: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """For operators that return lists, which cannot hold None: an empty tensor stands for it."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def packed_fake(like: Tensor, operands: Iterable[Tensor | None], needs: Iterable[bool]) -> tuple[Tensor, ...]:
    """``asked_like``, packed."""
    return packed(like, asked_like(operands, needs))


def save(ctx: Any, h: Tensor, operands: Sequence[Any], *tensors: Tensor | None) -> None:
    """Save h, the operands of a ``Branch`` and further tensors for backward."""
    A, B, ctx.scale, gate, mix, ctx.dropout_p, seed, merged_B, merge_weight = operands
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, A, B, gate, mix, seed, merged_B, merge_weight, *tensors)


def saved(ctx: Any) -> tuple[Tensor, tuple[Any, ...], list[Tensor | None]]:
    """Return what was given to ``save``."""
    h, A, B, gate, mix, seed, merged_B, merge_weight, *tensors = ctx.saved_tensors
    return h, (A, B, ctx.scale, gate, mix, ctx.dropout_p, seed, merged_B, merge_weight), tensors


def needs(ctx: Any, lead: int) -> list[bool]:
    """Which gradients are asked: of the first ``lead`` inputs, then of ``Branch.tensors``."""
    asked = ctx.needs_input_grad
    return [*asked[: lead + 2], asked[lead + 3], asked[lead + 4], asked[lead + 7], asked[lead + 8]]


def spread(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Put None where scale, dropout_p and seed stand among the inputs."""
    *lead, A, B, gate, mix, merged_B, weight = gradients
    return (*lead, A, B, None, gate, mix, None, None, merged_B, weight)
