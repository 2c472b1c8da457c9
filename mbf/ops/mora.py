"""``mbf::mora_accumulate``: MoRA's branch, a square matrix between a compression and a decompression.

MoRA ("High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130, section 4) spends the parameters of A
and B on one M ``[q, q]``. The conventions are those of the authors' code, kongds/MoRA, mora_type 1 and 6 in
``peft-mora/src/peft/tuners/lora/layer.py``: ``q = ⌊√((d_out + d_in) r) + ½⌋``, where the paper rounds down. With
x̃ = drop(x) continued cyclically, x̃_k = drop(x)_{k mod d_in}, to n = ⌈d_in / q⌉ chunks x̃₀ … x̃ₙ₋₁ of q numbers::

    kind 1, "sharing":   v = M Σᵢ x̃ᵢ                                  y_o += s v_{o mod q}
    kind 6, "rotation":  v = (M R₀ x̃₀, M R₁ x̃₁, …, M Rₙ₋₁ x̃ₙ₋₁)       y_o += s v_{o mod nq}

Rᵢ turns the pair (j, j + q/2) of a chunk, j < q/2, by the angle i θⱼ, θⱼ = 10000^(−2j/q): the halves (a, b) of a chunk
become (a cos − b sin, b cos + a sin). As v is cut off at d_out, chunks i ≥ ⌈d_out / q⌉ have no part in kind 6: of x the
numbers that they alone hold are not read. Gradients, with gᵢ the sum of dy over the places that chunk i of v went to::

    dM = s Σ gᵢ (Rᵢ x̃ᵢ)ᵀ        dx̃ᵢ = s Rᵢᵀ Mᵀ gᵢ        dx = drop(the sum of dx̃ over the places that x went to)

Kind 1 is the same with one chunk, Σ x̃ᵢ, R = I, and its dx̃ for every chunk. The branch computes in M's dtype. Backward
keeps x and M; drop(x) and its turns are made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mbf.ops import _branch
from mbf.ops._autograd import differentiable
from mbf.ops._gpu import entrance
from mbf.ops._inputs import check_floating, finite, whole, wrong_type
from mbf.ops._library import define, reference_only
from mbf.ops._operands import autocast_to, autocasts
from mbf.ops.philox import check_p, draw_seed, drop, keep_mask, keep_scale, seed_tensor, threshold

SHARING, ROTATION = KINDS = (1, 6)
BASE = 10000.0  # of the angles


class MoraTerms(NamedTuple):
    """What one forward of a layer computes with, in the names of ``mora_accumulate``."""

    M: Tensor
    kind: int = ROTATION
    scale: float | Tensor = 1.0

    def accumulate(self, y: Tensor, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``mora_accumulate`` with these operands."""
        return mora_accumulate(y, x, self.M, kind=self.kind, scale=self.scale, dropout_p=dropout_p)


def mora_size(d_out: int, d_in: int, r: int, kind: int = ROTATION) -> int:
    """q of an M with the parameters of a LoRA of rank r, ``⌊√((d_out + d_in) r) + ½⌋``.

    For kind 6 it is rounded down to an even number, of at least 2 (ours).

    Raises:
        ValueError: a kind that there isn't, or a negative size.
        TypeError: a size that is no int.
    """
    _check_kind(kind)
    for name, size in (("d_out", d_out), ("d_in", d_in), ("r", r)):
        whole(size, name)
    q = math.floor(math.sqrt((d_out + d_in) * r) + 0.5)
    return max(2, q - q % 2) if kind == ROTATION else q


def mora_accumulate_ref(
    y: Tensor,
    x: Tensor,
    M: Tensor,
    *,
    kind: int = ROTATION,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``mora_accumulate`` as the formula, in plain torch and differentiated by torch; dropout needs a seed."""
    keep = keep_mask(x.shape, dropout_p, seed, x.device)
    u = compressed(drop(x.to(M.dtype), keep, dropout_p), M.shape[0], y.shape[-1], kind)
    return (y + scale * cycled((u @ M.T).flatten(-2), y.shape[-1])).to(y.dtype)


# -- compression and decompression -------------------------------------------------------------------------------------


def chunks(d_in: int, q: int, d_out: int, kind: int) -> int:
    """How many chunks M is applied to."""
    return 1 if kind == SHARING else max(1, min(-(-d_in // q), -(-d_out // q)))


def cycled(values: Tensor, size: int) -> Tensor:
    """The last axis continued cyclically to ``size``, or cut off there; zeros where it is empty."""
    width = values.shape[-1]
    if size <= width:
        return values[..., :size]
    if width == 0:
        return F.pad(values, (0, size))
    return torch.cat([*[values] * (size // width), values[..., : size % width]], -1)


def folded(values: Tensor, size: int) -> Tensor:
    """The adjoint of ``cycled``: what stands ``size`` apart in the last axis is summed."""
    width = values.shape[-1]
    if width <= size or size == 0:
        return F.pad(values, (0, size - width))
    return F.pad(values, (0, -width % size)).unflatten(-1, (-1, size)).sum(-2)


def angles(count: int, q: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of i θⱼ, ``[count, q/2]``, made in fp64."""
    theta = BASE ** (torch.arange(0, q, 2, dtype=torch.float64, device=device) / -q)
    angle = torch.outer(torch.arange(count, dtype=torch.float64, device=device), theta)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(u: Tensor, back: bool = False) -> Tensor:
    """``Rᵢ uᵢ``, or ``Rᵢᵀ uᵢ``, of chunks ``[..., i, q]``."""
    count, q = u.shape[-2:]
    cos, sin = angles(count, q, u.device, u.dtype)
    if back:
        sin = -sin
    a, b = u.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def compressed(x: Tensor, q: int, d_out: int, kind: int) -> Tensor:
    """What M is applied to: ``[..., chunks, q]``."""
    if kind == SHARING:
        return cycled(x, -(-max(x.shape[-1], 1) // q) * q).unflatten(-1, (-1, q)).sum(-2, keepdim=True)
    count = chunks(x.shape[-1], q, d_out, kind)
    return turned(cycled(x, count * q).unflatten(-1, (count, q)))


def spread_back(du: Tensor, d_in: int, kind: int) -> Tensor:
    """The adjoint of ``compressed``, ``[..., d_in]``."""
    if kind == SHARING:
        return cycled_back(du.squeeze(-2), d_in)
    return folded(turned(du, back=True).flatten(-2), d_in)


def cycled_back(du: Tensor, d_in: int) -> Tensor:
    """For kind 1: du for every chunk, and what the padding took for the numbers that it repeats."""
    q = du.shape[-1]
    return folded(cycled(du, -(-max(d_in, 1) // q) * q), d_in)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _forward(y: Tensor, x: Tensor, M: Tensor, kind: int, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    out = mora_accumulate_ref(y, x, M, kind=kind, scale=scale, dropout_p=dropout_p, seed=seed)
    return out.contiguous()


def _backward(
    dy: Tensor,
    x: Tensor | None,
    M: Tensor,
    d_in: int,
    kind: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    q, d_out = M.shape[0], dy.shape[-1]
    count = chunks(d_in, q, d_out, kind)
    keep = keep_mask((*dy.shape[:-1], d_in), dropout_p, seed, dy.device)
    g = folded(dy.to(M.dtype), count * q).unflatten(-1, (count, q))
    dx = dM = None
    if needs[0]:
        du = _branch.scaled_product(_branch.rows(g), M, scale).view(g.shape)
        dx = drop(spread_back(du, d_in, kind), keep, dropout_p).to(dy.dtype if x is None else x.dtype)
    if needs[1] and x is not None:
        u = compressed(drop(x.to(M.dtype), keep, dropout_p), q, d_out, kind)
        dM = _branch.scaled_product(_branch.rows(g).t(), _branch.rows(u), scale)
    return dx, dM


def _forward_fake(y: Tensor, x: Tensor, M: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _backward_fake(dy: Tensor, x: Tensor | None, M: Tensor, d_in: int, *operands: Any) -> tuple[Tensor | None, ...]:
    like_x = dy.new_empty((*dy.shape[:-1], d_in), dtype=dy.dtype if x is None else x.dtype)
    return _branch.asked_like((like_x, M), operands[-1])


class _Square(NamedTuple):
    """What the kernels on a GPU take beside the activations."""

    M: Tensor
    rotates: bool
    scale: float
    dropout_p: float
    seed: Tensor | None

    @property
    def least(self) -> int:
        return threshold(self.dropout_p)

    @property
    def keep_scale(self) -> float:
        return keep_scale(self.dropout_p)


_cached_angles = lru_cache(maxsize=64)(angles)


def _on_gpu(M: Tensor, d_in: int, d_out: int, kind: int, *rest: Any) -> tuple[_Square, Tensor, Tensor]:
    """The terms and the angles' cos and sin, kept between calls but not in a graph; of kind 1 M stands for them."""
    from mbf.kernels._launch import eager

    terms = _Square(M, kind == ROTATION, *rest)
    if not terms.rotates:
        return terms, M, M
    q = M.shape[0]
    lasting = eager() and not (M.is_cuda and torch.cuda.is_current_stream_capturing())
    make = _cached_angles if lasting else angles
    dtype = torch.promote_types(M.dtype, torch.float32)
    return terms, *make(chunks(d_in, q, d_out, kind), q, M.device, dtype)


def _forward_gpu(y: Tensor, x: Tensor, M: Tensor, *operands: Any) -> Any:
    from mbf.kernels import mora as kernels

    return kernels.forward(y, x, *_on_gpu(M, x.shape[-1], y.shape[-1], *operands))


def _backward_gpu(dy: Tensor, x: Tensor | None, M: Tensor, d_in: int, *operands: Any) -> Any:
    from mbf.kernels import mora as kernels

    *rest, needs = operands
    terms, cos, sin = _on_gpu(M, d_in, dy.shape[-1], *rest)
    return kernels.backward(dy, x, terms, d_in, cos, sin, needs)


_OPERANDS = "int kind, float scale, float dropout_p, Tensor? seed"
define(f"mora_accumulate(Tensor y, Tensor x, Tensor M, {_OPERANDS}) -> Tensor", _forward, _forward_fake, _forward_gpu)
define(
    f"mora_accumulate_backward(Tensor dy, Tensor? x, Tensor M, SymInt d_in, {_OPERANDS}, bool[] needs) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_gpu,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, x, M, ctx.kind, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.d_in = x.shape[-1]
    ctx.set_materialize_grads(False)
    # x is kept for M's gradient only, or to tell dx its dtype.
    keep = x if ctx.needs_input_grad[2] or x.dtype != y.dtype else None
    ctx.save_for_backward(keep, M, seed)


def _autograd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, M, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:3])
    dx, dM = _backward_operator(dy, x, M, ctx.d_in, ctx.kind, ctx.scale, ctx.dropout_p, seed, needs)
    return dy, dx, dM, None, None, None, None


_backward_operator = entrance("mora_accumulate_backward")
_enter = differentiable("mora_accumulate", _setup_context, _autograd_backward, linear=2)


# -- the face ----------------------------------------------------------------------------------------------------------


def mora_accumulate(
    y: Tensor,
    x: Tensor,
    M: Tensor,
    *,
    kind: int = ROTATION,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Return ``y + s · decompress(M compress(drop(x)))`` in y's dtype: MoRA's branch on a finished base output.

    x is continued cyclically to a multiple of q and cut into chunks of q. With ``kind=1`` M is applied to the sum of
    the chunks and the result repeated to d_out. With ``kind=6`` chunk i is turned by the angles
    ``i · 10000^(−2j/q)`` (pairs are j and j + q/2), M is applied to every chunk, and the results side by side are cut
    off at d_out, or repeated cyclically to it; chunks beyond d_out are not read.

    y itself is not changed. The branch computes in M's dtype, which may be wider than x's and y's, and is rounded into
    y once. Under ``torch.autocast`` x and M are in autocast's dtype. Differentiable once in y, x and M, and in a
    tensor scale. Kept for backward are M and, only if M needs a gradient, x.

    Args:
        y: ``[..., d_out]``, of any floating-point dtype; its leading shape is x's.
        x: ``[..., d_in]``, of any floating-point dtype.
        M: ``[q, q]``, of any q; even for kind 6. ``mora_size`` gives that of a LoRA's budget.
        kind: 1 ("sharing", for large budgets) or 6 ("rotation", for small ones).
        scale: s. A 0-d tensor, which is multiplied into M, changes it without recompiling, or learns it.
        dropout_p: probability in [0, 1 − 2⁻¹⁷) that an element of x is dropped.
        seed: of the mask (``dropout_mask``), an int or a 0-d int64 tensor on x's device. Default: ``draw_seed``.

    Raises:
        ValueError: a shape, device or value that does not fit; the message says which and what would.
        TypeError: a dtype that does not.
    """
    try:
        if autocasts(x):
            x, M = autocast_to(x.device, x, M)
        _check(y, x, M, kind)
    except AttributeError as error:
        raise wrong_type(error, y=y, x=x, M=M) from None
    if torch.compiler.is_compiling() and not isinstance(scale, Tensor):
        # An operator's float is a constant of its graph; see ``_operands.prepare``.
        scale = M.new_ones((), dtype=torch.promote_types(M.dtype, torch.float32)) * scale
    if isinstance(scale, Tensor):
        if scale.dim() != 0:
            raise ValueError(f"scale has shape {list(scale.shape)}; it must be a float or a 0-d tensor")
        if not scale.dtype.is_floating_point:
            raise TypeError(f"scale is a {scale.dtype} tensor; it must be floating-point")
        M, scale = (M * scale).to(M.dtype), 1.0
    elif scale.__class__ is not float or scale - scale != 0.0:  # as NaN and infinity do
        scale = finite(scale, "scale")
    if dropout_p == 0.0:
        seed = None
    else:
        check_p(dropout_p)
        seed = draw_seed(x.device) if seed is None else seed_tensor(seed, x.device)
        if seed.device != x.device:
            raise ValueError(f"seed is on {seed.device} but x on {x.device}; move it there, or pass an int")
    if reference_only():
        return mora_accumulate_ref(y, x, M, kind=kind, scale=scale, dropout_p=dropout_p, seed=seed)
    return _enter(y, x, M, kind, scale, float(dropout_p), seed)


def _check_kind(kind: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 1 (sharing) or 6 (rotation)")


def _check(y: Tensor, x: Tensor, M: Tensor, kind: int) -> None:
    _check_kind(kind)
    shape = M.shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"M has shape {list(shape)}; it must be square, [q, q] with q of at least 1")
    if kind == ROTATION and shape[0] % 2:
        raise ValueError(
            f"M has shape {list(shape)}; q must be even for kind 6, which turns pairs of numbers: take "
            f"mora_size(d_out, d_in, r, kind=6), or kind=1"
        )
    if x.dim() < 1 or y.dim() < 1 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y has shape {list(y.shape)} and x {list(x.shape)}; they must be [..., d_out] and [..., d_in], alike but "
            "for the last axis"
        )
    for name, value in (("y", y), ("x", x), ("M", M)):
        check_floating(value, name)
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device} but x on {x.device}; move them to one device")
