"""The operands of the low-rank branch: from what users pass to what the operators take."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mbf.ops._inputs import FLOATS, finite
from mbf.ops.philox import check_p, draw_seed, keep_scale, seed_tensor, threshold

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")

SCHEMA = (
    "Tensor A, Tensor B, float scale, Tensor? gate, Tensor? mix, float dropout_p, Tensor? seed, "
    "Tensor? merged_B, Tensor? merge_weight"
)


class Branch(NamedTuple):
    """The branch's operands in the order of the operators' schemas: what ``prepare`` makes of the user's arguments."""

    A: Tensor
    B: Tensor
    scale: float
    gate: Tensor | None
    mix: Tensor | None
    dropout_p: float
    seed: Tensor | None
    merged_B: Tensor | None
    merge_weight: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The operands that can have a gradient, in order."""
        return self.A, self.B, self.gate, self.mix, self.merged_B, self.merge_weight

    @property
    def least(self) -> int:
        """The least half-word of the mask that is kept."""
        return threshold(self.dropout_p)

    @property
    def keep_scale(self) -> float:
        """What dropout multiplies a kept element by."""
        return keep_scale(self.dropout_p)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled for x's device."""
    # The first test alone is three times as cheap as the second.
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def autocast_to(device: torch.device, *tensors: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """Cast as autocast casts the operands of a matrix product: all floating tensors but float64 ones.

    Call it only where autocast is enabled for ``device``: ``autocasts``.
    """
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        t if t is None or t.dtype == torch.float64 or not t.dtype.is_floating_point else t.to(dtype) for t in tensors
    )


def prepare(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    gate: Tensor | None,
    mix: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    merged_B: Tensor | None,
    merge_weight: float | Tensor | None,
) -> Branch:
    """Check the user's arguments and turn them into the operators'.

    A tensor scale moves into the gate, and a 0-d gate to x's device; a float λ becomes a 0-d tensor, an int seed too;
    without a seed, one is drawn.
    """
    _check_factors(x, A, B)
    if torch.compiler.is_compiling() and not isinstance(scale, Tensor):
        # An operator's float is a constant of its graph, which would be compiled anew for every other; the product
        # makes it an input of the graph as soon as a second one comes.
        scale = A.new_ones((), dtype=torch.promote_types(A.dtype, torch.float32)) * scale
    if isinstance(scale, Tensor):
        if scale.dim() != 0:
            raise ValueError(
                f"scale has shape {list(scale.shape)}; it must be a float or a 0-d tensor. "
                "A factor that differs between rows or ranks is a gate"
            )
        if not scale.dtype.is_floating_point:
            raise TypeError(f"scale is a {scale.dtype} tensor; it must be floating-point")
        gate = scale if gate is None else gate * scale
        scale = 1.0
    elif scale.__class__ is not float or scale - scale != 0.0:  # as NaN and infinity do
        scale = finite(scale, "scale")
    if gate is not None:
        _check_gate(gate, x, A)
        if gate.dim() == 0 and gate.device != x.device:  # as torch has it beside tensors of another device
            gate = gate.to(x.device)
    if mix is not None and (mix.shape != (A.shape[0], A.shape[0]) or mix.device != x.device):
        raise ValueError(
            f"mix has shape {list(mix.shape)} on {mix.device}; it must be [r, r] = [{A.shape[0]}, {A.shape[0]}] "
            f"on {x.device}"
        )
    if mix is not None and mix.dtype not in FLOATS:
        raise TypeError(f"mix is {mix.dtype}; it must be floating-point: pass mix.to(A.dtype)")
    if merged_B is not None or merge_weight is not None:
        merge_weight = _checked_weight(B, merged_B, merge_weight)
    if dropout_p == 0.0:
        seed = None
    else:
        check_p(dropout_p)
        seed = draw_seed(x.device) if seed is None else seed_tensor(seed, x.device)
        if seed.device != x.device:
            raise ValueError(f"seed is on {seed.device} but x on {x.device}; move it there, or pass an int")
    return Branch(A, B, scale, gate, mix, float(dropout_p), seed, merged_B, merge_weight)


def _check_factors(x: Tensor, A: Tensor, B: Tensor) -> None:
    shape_A, shape_B, dtype, device = A.shape, B.shape, A.dtype, x.device
    if x.dim() < 1 or len(shape_A) != 2 or x.shape[-1] != shape_A[1]:
        raise ValueError(f"A has shape {list(shape_A)} and x {list(x.shape)}; they must be [r, d_in] and [..., d_in]")
    if len(shape_B) != 2 or shape_B[1] != shape_A[0]:
        raise ValueError(f"B has shape {list(shape_B)} and A {list(shape_A)}; they must be [d_out, r] and [r, d_in]")
    if dtype is not B.dtype or dtype not in FLOATS:
        raise TypeError(f"A is {dtype} and B {B.dtype}; they must have one floating-point dtype: the branch's")
    if A.device != device or B.device != device:
        raise ValueError(f"x is on {device}, A on {A.device}, B on {B.device}; move them to one device")


def _check_gate(gate: Tensor, x: Tensor, A: Tensor) -> None:
    if gate.dtype not in FLOATS:
        raise TypeError(f"gate is {gate.dtype}; it must be floating-point: pass gate.to(A.dtype)")
    if gate.dim() == 0:
        return
    wanted = (*x.shape[:-1], A.shape[0])
    lead = len(wanted) - gate.dim()
    if lead < 0 or any(g not in (1, w) for g, w in zip(gate.shape, wanted[lead:], strict=True)):
        raise ValueError(f"gate has shape {list(gate.shape)}; it must broadcast to x Aᵀ, {list(wanted)}")
    if gate.device != x.device:
        raise ValueError(f"gate is on {gate.device} but x on {x.device}; move it there")


def _checked_weight(B: Tensor, merged_B: Tensor | None, merge_weight: float | Tensor | None) -> Tensor:
    if merged_B is None or merge_weight is None:
        given, missing = ("merge_weight", "merged_B") if merged_B is None else ("merged_B", "merge_weight")
        raise ValueError(f"{given} is given without {missing}; pass both, or neither")
    if merged_B.shape != B.shape or merged_B.dtype != B.dtype or merged_B.device != B.device:
        raise ValueError(
            f"merged_B is {merged_B.dtype} {list(merged_B.shape)} on {merged_B.device}; it must be as B is, "
            f"{B.dtype} {list(B.shape)} on {B.device}"
        )
    if not isinstance(merge_weight, Tensor):
        if not torch.compiler.is_compiling():
            merge_weight = finite(merge_weight, "merge_weight")
        return torch.tensor(merge_weight, dtype=torch.float64, device="cpu")
    if merge_weight.dim() != 0:
        raise ValueError(f"merge_weight has shape {list(merge_weight.shape)}; it must be a float or a 0-d tensor")
    if not merge_weight.dtype.is_floating_point:
        raise TypeError(f"merge_weight is a {merge_weight.dtype} tensor; it must be floating-point")
    return merge_weight
