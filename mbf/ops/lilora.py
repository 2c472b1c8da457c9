"""``mbf::lilora_accumulate``: LiLoRA's branch, a LoRA in a LoRA, as two up-projections of one h.

LiLoRA (arXiv 2508.06202; the authors' code is ``PEFT_LiLoRA/peft/tuners/lilora.py`` of chanceche/LiLoRA) shares A
``[r, d_in]`` and B ``[d_out, r]``, the paper's B₀, among all tasks, and gives each task a LoRA of B: Ea ``[r̃, r]``, Eb
``[d_out, r̃]`` and a w in (0, 1), the sigmoid of a learnt number: ΔW = s (w B + (1 − w) Eb Ea) A. With a = s w and
b = s (1 − w), which are numbers of the run, never constants of a graph::

    h = drop(x) Aᵀ        u = h Eaᵀ        z = (a h, b u)        y += z (B, Eb)ᵀ

    (dB, dEb) = dyᵀ z                      (p, q) = dy (B, Eb)           t = q Ea
    dEa = b qᵀ h                           dh = a p + b t
    da = ⟨p, h⟩    db = ⟨t, h⟩             dw = s (da − db)              ds = w da + (1 − w) db
    dA = dhᵀ drop(x)                       dx = drop(dh A)

So the passes over x, y and dy are those of a LoRA with r ranks on x's side and r + r̃ on y's. The branch computes in the
dtype of A, B, Ea and Eb. Backward keeps h; z and drop(x) are made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mbf.ops import _branch
from mbf.ops._autograd import differentiable
from mbf.ops._gpu import entrance
from mbf.ops._inputs import finite, wrong_type
from mbf.ops._library import define, reference_only
from mbf.ops._operands import Branch, autocast_to, autocasts, prepare
from mbf.ops.lora_accumulate import check_output
from mbf.ops.lora_linear import LoraTerms
from mbf.ops.philox import drop, dropout


class LiloraTerms(NamedTuple):
    """What one forward of a layer computes with, in the names of ``lilora_accumulate``."""

    A: Tensor
    B: Tensor
    Ea: Tensor
    Eb: Tensor
    weight: float | Tensor
    scale: float | Tensor = 1.0

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``lilora_accumulate`` with these operands."""
        return lilora_accumulate(y, x, *self[:5], scale=self.scale, dropout_p=dropout_p)

    def lora(self) -> LoraTerms:
        """The same as one LoRA of rank r + r̃: ([A; Ea A], [B, Eb]) with a gate of w and 1 − w."""
        A, B, Ea, Eb, weight, scale = self
        w = torch.as_tensor(weight, dtype=A.dtype, device=A.device)
        gate = torch.cat([w.expand(B.shape[1]), (1 - w).expand(Eb.shape[1])])
        return LoraTerms(torch.cat([A, Ea @ A]), torch.cat([B, Eb], dim=1), scale, gate=gate)


class Operands(NamedTuple):
    """The operators' operands after y and x, in the order of their schemas."""

    A: Tensor
    B: Tensor
    Ea: Tensor
    Eb: Tensor
    weight: Tensor
    scale: Tensor
    dropout_p: float
    seed: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The operands that can have a gradient, in order."""
        return self[:6]

    @property
    def branch(self) -> Branch:
        """The LoRA of A and B with the same dropout."""
        return Branch(self.A, self.B, 1.0, None, None, self.dropout_p, self.seed, None, None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``a = s w`` and ``b = s (1 − w)``, in fp32 or more."""
        weight, scale = _wide(self.weight), _wide(self.scale)
        return scale * weight, scale * (1.0 - weight)


def lilora_accumulate_ref(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    Ea: Tensor,
    Eb: Tensor,
    weight: float | Tensor,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``lilora_accumulate`` as the formula, in plain torch and differentiated by torch; dropout needs a seed."""
    h = dropout(x.to(A.dtype), dropout_p, seed) @ A.T
    return (y + scale * (weight * (h @ B.T) + (1 - weight) * (h @ Ea.T @ Eb.T))).to(y.dtype)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _wide(number: Tensor) -> Tensor:
    return number.to(torch.promote_types(number.dtype, torch.float32))


def _worth_joining(rows: int, operands: Operands) -> bool:
    """Whether one product with (B, Eb) pays for copying the two into one tensor, which BLAS wants them to be.

    Two products pass over y or dy twice. Measured on a CPU, two of them are faster below some ten times as many rows as
    there are ranks (at 64 rows and 16 + 8 ranks 1.7 times), and slower beyond (at 2048 rows 2.5 times).
    """
    return rows > 10 * (operands.B.shape[1] + operands.Eb.shape[1])


def _add_expanded_(y: Tensor, h: Tensor, operands: Operands) -> None:
    """``y += z (B, Eb)ᵀ`` for matrices y ``[rows, d_out]`` and h ``[rows, r]``."""
    a, b = operands.factors()
    z = [(a * h).to(h.dtype), (b * F.linear(h, operands.Ea)).to(h.dtype)]
    if _worth_joining(h.shape[0], operands):
        _branch.add_product_(y, torch.cat(z, 1), torch.cat([operands.B, operands.Eb], 1).t())
    elif y.dtype == h.dtype:
        y.addmm_(z[0], operands.B.t()).addmm_(z[1], operands.Eb.t())
    else:  # the two are rounded into y once
        y.add_((z[0] @ operands.B.t()).addmm_(z[1], operands.Eb.t()))


def _forward(y: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(*inputs)
    out = y.clone(memory_format=torch.contiguous_format)
    h = _branch.project(x, operands.branch)
    if out.numel():
        _add_expanded_(_branch.rows(out), _branch.rows(h), operands)
    return out, h


def _backward(dy: Tensor, h: Tensor, x: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    *rest, needs = inputs
    operands, branch = Operands(*rest), Operands(*rest).branch
    _, B, Ea, Eb, weight, scale, *_ = operands
    need_x, need_A, need_B, need_Ea, need_Eb, need_weight, need_scale = needs
    a, b = operands.factors()
    g, h = _branch.rows(_branch.in_branch_dtype(dy, branch)), _branch.rows(h)
    dx = dA = dB = dEa = dEb = dweight = dscale = None
    joined = _worth_joining(g.shape[0], operands)

    if need_B or need_Eb:
        z = [(a * h).to(h.dtype), (b * F.linear(h, Ea)).to(h.dtype)]
        if joined and need_B and need_Eb:
            dB, dEb = (part.contiguous() for part in (g.t() @ torch.cat(z, 1)).split([B.shape[1], Eb.shape[1]], 1))
        else:
            dB, dEb = (g.t() @ z[0] if need_B else None), (g.t() @ z[1] if need_Eb else None)

    if need_x or need_A or need_Ea or need_weight or need_scale:
        # Rounded to a half type, p and q would leave the two numbers' gradients less exact than torch's own.
        left, (first, second) = (_wide(g), map(_wide, (B, Eb))) if need_weight or need_scale else (g, (B, Eb))
        if joined:
            p, q = (left @ torch.cat([first, second], 1)).split([B.shape[1], Eb.shape[1]], 1)
        else:
            p, q = left @ first, left @ second
        t = _wide(q) @ _wide(Ea)
        if need_Ea:
            dEa = ((b * q).to(h.dtype).t() @ h).to(Ea.dtype)
        if need_weight or need_scale:
            da, db = ((_wide(h) * part).sum(dtype=torch.float64) for part in (p, t))
            dweight = (_wide(scale) * (da - db)).to(weight) if need_weight else None
            dscale = (_wide(weight) * da + (1.0 - _wide(weight)) * db).to(scale) if need_scale else None
        if need_x or need_A:
            dh = (a * p + b * t).to(h.dtype)
            keep = _branch.mask(branch, dy.shape[:-1], dy.device)
            if need_A and x is not None:
                dropped = drop(_branch.in_branch_dtype(x, branch), keep, operands.dropout_p)
                dA = dh.t() @ _branch.rows(dropped)
            if need_x:
                dx = drop((dh @ operands.A).view(*dy.shape[:-1], operands.A.shape[1]), keep, operands.dropout_p)
                dx = dx.to(dy.dtype if x is None else x.dtype)
    return dx, dA, dB, dEa, dEb, dweight, dscale


def _forward_fake(y: Tensor, x: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), A.new_empty((*x.shape[:-1], A.shape[0]))


def _backward_fake(dy: Tensor, h: Tensor, x: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    *rest, needs = inputs
    operands = Operands(*rest)
    if x is None:
        x = dy.new_empty((*dy.shape[:-1], operands.A.shape[1]))
    return _branch.asked_like((x, *operands.tensors), needs)


def _forward_gpu(y: Tensor, x: Tensor, *inputs: Any) -> Any:
    from mbf.kernels import lilora as kernels

    return kernels.forward(y, x, Operands(*inputs))


def _backward_gpu(dy: Tensor, h: Tensor, x: Tensor | None, *inputs: Any) -> Any:
    from mbf.kernels import lilora as kernels

    *rest, needs = inputs
    return kernels.backward(dy, h, x, Operands(*rest), needs)


_SCHEMA = "Tensor A, Tensor B, Tensor Ea, Tensor Eb, Tensor weight, Tensor scale, float dropout_p, Tensor? seed"
define(f"lilora_accumulate(Tensor y, Tensor x, {_SCHEMA}) -> (Tensor, Tensor)", _forward, _forward_fake, _forward_gpu)
define(
    f"lilora_accumulate_backward(Tensor dy, Tensor h, Tensor? x, {_SCHEMA}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_gpu,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, x, A, B, Ea, Eb, weight, scale, ctx.dropout_p, seed = inputs
    ctx.set_materialize_grads(False)
    # x is kept for A's gradient only, or to tell dx its dtype.
    keep = x if ctx.needs_input_grad[2] or x.dtype != y.dtype else None
    ctx.save_for_backward(output[1], keep, A, B, Ea, Eb, weight, scale, seed)


def _autograd_backward(ctx: Any, dy: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    *operands, seed = ctx.saved_tensors
    found = _backward_operator(dy, *operands, ctx.dropout_p, seed, list(ctx.needs_input_grad[1:8]))
    return (dy, *found, None, None)


_backward_operator = entrance("lilora_accumulate_backward")
_enter = differentiable("lilora_accumulate", _setup_context, _autograd_backward, linear=2)


# -- the face ----------------------------------------------------------------------------------------------------------


def lilora_accumulate(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    Ea: Tensor,
    Eb: Tensor,
    weight: float | Tensor,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Return ``y + s · (w · h Bᵀ + (1 − w) · (h Eaᵀ) Ebᵀ)`` in y's dtype, ``h = drop(x) Aᵀ``: LiLoRA's branch.

    y itself is not changed. The branch computes in the dtype of A, B, Ea and Eb, which may be wider than those of x and
    y, and is rounded into y once. Under ``torch.autocast`` x and the four are in autocast's dtype. Differentiable once
    in every tensor but the seed. Kept for backward are h, the operands and, only if A needs a gradient, x.

    Args:
        y: ``[..., d_out]``, of any floating-point dtype; its leading shape is x's.
        x: ``[..., d_in]``, of any floating-point dtype.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``, of A's dtype; the paper's B₀.
        Ea: ``[r̃, r]``, of A's dtype.
        Eb: ``[d_out, r̃]``, of A's dtype.
        weight: w, a float or a 0-d tensor; the caller takes the sigmoid. Any number will do. A new one of either kind
            recompiles no graph.
        scale: s, likewise.
        dropout_p: probability in [0, 1 − 2⁻¹⁷) that an element of x is dropped.
        seed: of the mask (``dropout_mask``), an int or a 0-d int64 tensor on x's device. Default: ``draw_seed``.

    Raises:
        ValueError: a shape, device or value that does not fit; the message says which and what would.
        TypeError: a dtype that does not.
    """
    try:
        if autocasts(x):
            x, A, B, Ea, Eb = autocast_to(x.device, x, A, B, Ea, Eb)
        prepared = prepare(x, A, B, 1.0, None, None, dropout_p, seed, None, None)
        _check_inner(x, A, B, Ea, Eb)
        check_output(y, x, B)
    except AttributeError as error:
        raise wrong_type(error, y=y, x=x, A=A, B=B, Ea=Ea, Eb=Eb) from None
    weight, scale = _number("weight", weight, A), _number("scale", scale, A)
    operands = Operands(A, B, Ea, Eb, weight, scale, prepared.dropout_p, prepared.seed)
    if reference_only():
        return lilora_accumulate_ref(y, x, **operands._asdict())
    return _enter(y, x, *operands)


def _check_inner(x: Tensor, A: Tensor, B: Tensor, Ea: Tensor, Eb: Tensor) -> None:
    r, d_out = A.shape[0], B.shape[0]
    if Ea.dim() != 2 or Ea.shape[1] != r:
        raise ValueError(f"Ea has shape {list(Ea.shape)}; it must be [r̃, r], [r̃, {r}] with A {list(A.shape)}")
    if Eb.shape != (d_out, Ea.shape[0]):
        raise ValueError(
            f"Eb has shape {list(Eb.shape)}; it must be [d_out, r̃] = [{d_out}, {Ea.shape[0]}] with B {list(B.shape)} "
            f"and Ea {list(Ea.shape)}"
        )
    for name, factor in (("Ea", Ea), ("Eb", Eb)):
        if factor.dtype is not A.dtype:
            raise TypeError(
                f"{name} is {factor.dtype} and A {A.dtype}; A, B, Ea and Eb must have one dtype: convert it"
            )
        if factor.device != x.device:
            raise ValueError(f"{name} is on {factor.device} but x on {x.device}; move it there")


def _number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor: an operator's float would be a constant of its graph, which is compiled anew for every other."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name} is a {value.dtype} tensor of shape {list(value.shape)}; it must be a float or a 0-d "
                "floating-point tensor"
            )
        if value.device != like.device and value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}; it must be on {like.device}, where A is, or on the CPU")
        return value
    if torch.compiler.is_compiling():
        return like.new_ones((), dtype=torch.promote_types(like.dtype, torch.float32)) * value
    return torch.tensor(finite(value, name), dtype=torch.float64, device="cpu")
