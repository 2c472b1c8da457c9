"""``mbf::lora_linear``: a frozen linear layer with its low-rank branch, one operator forward and one backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from mbf.ops import _branch
from mbf.ops._autograd import differentiable
from mbf.ops._gpu import by_cuda, entrance
from mbf.ops._inputs import FLOATS, wrong_type
from mbf.ops._library import define, reference_only
from mbf.ops._operands import SCHEMA, Branch, autocast_to, autocasts, prepare
from mbf.ops.lora_accumulate import lora_accumulate, lora_accumulate_ref


class LoraTerms(NamedTuple):
    """What one forward of a layer computes with, in the names of ``lora_linear``."""

    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0
    gate: Tensor | None = None
    mix: Tensor | None = None
    merged_B: Tensor | None = None
    merge_weight: float | Tensor | None = None

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``lora_accumulate`` with these operands."""
        return lora_accumulate(y, x, **self._asdict(), dropout_p=dropout_p)

    def lora(self) -> LoraTerms:
        """Themselves: what ``lora_linear`` takes."""
        return self


def lora_linear_ref(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, **terms: Any
) -> Tensor:
    """``lora_linear`` as the formula, in plain torch and differentiated by torch; dropout needs a seed."""
    return lora_accumulate_ref(F.linear(x, weight, bias), x, A, B, **terms)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Any) -> tuple[Tensor, Tensor]:
    branch = Branch(*operands)
    y = F.linear(x, weight, bias)
    h = _branch.project(x, branch)
    _branch.add_branch_(y, h, branch)
    return y, h


def _backward(dy: Tensor, h: Tensor, x: Tensor | None, weight: Tensor, *operands: Any) -> tuple[Tensor | None, ...]:
    *rest, needs = operands
    branch = Branch(*rest)
    need_x, need_weight, need_bias, *need_branch = needs
    rows, lead = _branch.rows(dy), dy.shape[:-1]
    keep = _branch.mask(branch, lead, dy.device) if need_x or need_branch[0] else None
    dh, gradients = _branch.branch_backward(rows, h, x, keep, branch, [need_x, *need_branch])
    dx = dweight = dbias = None
    if need_x and dh is not None:
        dx = rows @ weight
        _branch.add_input_gradient_(dx, dh, keep, branch)
        dx = dx.view(*lead, weight.shape[1])
    if need_weight and x is not None:
        dweight = rows.t() @ _branch.rows(x)
    if need_bias:
        dbias = rows.sum(0)
    return dx, dweight, dbias, *gradients


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), A.new_empty((*x.shape[:-1], A.shape[0]))


def _backward_fake(
    dy: Tensor, h: Tensor, x: Tensor | None, weight: Tensor, *operands: Any
) -> tuple[Tensor | None, ...]:
    *rest, needs = operands
    like_x, like_bias = dy.new_empty((*dy.shape[:-1], weight.shape[1])), dy.new_empty(weight.shape[0])
    return _branch.asked_like((like_x, weight, like_bias, *Branch(*rest).tensors), needs)


def _forward_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Any) -> Any:
    from mbf.kernels import lora_linear as kernels

    return kernels.forward(x, weight, bias, Branch(*operands))


def _backward_gpu(dy: Tensor, h: Tensor, x: Tensor | None, weight: Tensor, *operands: Any) -> Any:
    from mbf.kernels import lora_linear as kernels

    *rest, needs = operands
    return kernels.backward(dy, h, x, weight, Branch(*rest), needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *operands = inputs
    asked = ctx.needs_input_grad
    _branch.save(ctx, output[1], operands, x if asked[1] or asked[3] else None, weight)  # x for dweight and dA only


def _autograd_backward(ctx: Any, dy: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    h, operands, (x, weight) = _branch.saved(ctx)
    return _branch.spread(_backward_operator(dy, h, x, weight, *operands, _branch.needs(ctx, 3)))


define(
    f"lora_linear(Tensor x, Tensor weight, Tensor? bias, {SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_gpu,
    by_cuda("lora_linear"),
)
define(
    f"lora_linear_backward(Tensor dy, Tensor h, Tensor? x, Tensor weight, {SCHEMA}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_gpu,
    by_cuda("lora_linear_backward"),
)
_backward_operator = entrance("lora_linear_backward")
_enter = differentiable("lora_linear", _setup_context, _autograd_backward, linear=1)


# -- the face ----------------------------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    mix: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    merged_B: Tensor | None = None,
    merge_weight: float | Tensor | None = None,
) -> Tensor:
    """A linear layer with its low-rank branch, ``y = x Wᵀ + b + s · z Bᵀ``.

    Here ``h = drop(x) Aᵀ``, then ``h ← h mixᵀ`` and ``z = h ⊙ gate``. With ``merged_B``, B stands for
    ``merged_B + λ (B − merged_B)``: the merge as it would be, differentiable in λ.

    The base product is in x's dtype and so is y; the branch computes in the dtype of A and B, which may be wider, and
    is rounded into y once. Under ``torch.autocast`` both are in autocast's dtype. Differentiable once in every tensor
    but the seed. Kept for backward are x (only if A or weight needs a gradient), ``drop(x) Aᵀ`` and the operands.

    On a CPU with AMX the base product of fp32, from 64 rows on, is made on its bf16 tiles of three bf16 parts a number,
    with an error below that of BLAS. What is infinite comes out as NaN there, and parts of a number below 2⁻¹²⁶ count
    as zero. ``native_status().kernels`` says whether it is so here, and ``ONEDNN_MAX_CPU_ISA=AVX512_CORE`` in the
    environment has BLAS make it.

    Args:
        x: ``[..., d_in]``, of any strides, 1-D and empty ones included.
        weight: W, ``[d_out, d_in]``, of x's dtype.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``, of A's dtype.
        bias: b, ``[d_out]``, of x's dtype.
        scale: s. Pass a 0-d tensor to change it without recompiling, or to learn it.
        gate: any shape that broadcasts to ``[..., r]``: a rank's ``[r]``, a sample's ``[batch, 1, r]``, a token's.
        mix: ``[r, r]``.
        dropout_p: probability in [0, 1 − 2⁻¹⁷) that an element of x is dropped before A; the base sees all of x.
        seed: of the mask (``dropout_mask``), an int or a 0-d int64 tensor on x's device. Default: ``draw_seed``.
        merged_B: like B. Goes with ``merge_weight``.
        merge_weight: λ, a float or a 0-d tensor.

    Returns:
        y, ``[..., d_out]``.

    Raises:
        ValueError: a shape, device or value that does not fit; the message says which and what would.
        TypeError: a dtype that does not.
    """
    try:
        if autocasts(x):
            x, weight, A, B = autocast_to(x.device, x, weight, A, B)
            bias, merged_B = autocast_to(x.device, bias, merged_B)
        branch = prepare(x, A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight)
        _check_base(x, weight, bias, B)
    except AttributeError as error:
        optional = {"bias": bias, "gate": gate, "mix": mix, "merged_B": merged_B}
        raise wrong_type(error, optional, x=x, weight=weight, A=A, B=B) from None
    if reference_only():
        return lora_linear_ref(x, weight, bias=bias, **branch._asdict())
    return _enter(x, weight, bias, *branch)


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor) -> None:
    shape, dtype = weight.shape, weight.dtype
    if len(shape) != 2 or shape[0] != B.shape[0] or shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {list(shape)}; with B {list(B.shape)} and x {list(x.shape)} it must be "
            f"[d_out, d_in] = [{B.shape[0]}, {x.shape[-1]}]"
        )
    if dtype is not x.dtype or dtype not in FLOATS or weight.device != x.device:
        if dtype is x.dtype and dtype not in FLOATS:
            raise TypeError(f"x is {dtype}; it must be fp64, fp32, bf16 or fp16, and weight likewise")
        raise TypeError(
            f"weight is {dtype} on {weight.device} but x {x.dtype} on {x.device}; convert one of them, or "
            "compute under torch.autocast"
        )
    if bias is not None and (bias.shape != shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}; it must be {x.dtype} [{shape[0]}] on {x.device}"
        )
