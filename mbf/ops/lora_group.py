"""``mbf::lora_group``: frozen linear layers that read the same x, each with its low-rank branch, as q, k and v do.

Every layer computes what ``lora_linear`` computes, with a mask of its own. They share x, which is read once, and dx,
which is summed over the layers as it is made instead of being n tensors that autograd adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mbf.ops import _branch
from mbf.ops._autograd import once
from mbf.ops._composed import GRADIENTS, composed_backward, composed_forward
from mbf.ops._gpu import entrance, with_cuda
from mbf.ops._layers import (
    SCHEMA,
    GroupLayer,
    Operands,
    apply,
    as_layers,
    autocast_layer,
    branches,
    check_frozen,
    checked,
    layer_forward,
    layers_backward,
    linear,
    linear_ref,
    operands,
    save,
    saved,
    vectorised,
    wrong_layer,
    wrong_types,
)
from mbf.ops._library import define, reference_only
from mbf.ops._operands import autocast_to, autocasts


def lora_group_ref(x: Tensor, layers: Sequence[GroupLayer]) -> tuple[Tensor, ...]:
    """``lora_group`` as the formula, in plain torch and differentiated by torch; dropout needs a seed."""
    return tuple(linear_ref(x, layer) for layer in layers)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *lists: Any, layer: Any = layer_forward
) -> list[Tensor]:
    results = [
        layer(x, weight, bias, branch) for weight, bias, branch in zip(weights, biases, branches(lists), strict=True)
    ]
    return [y for y, _ in results] + [h for _, h in results]


def _backward(
    dys: Sequence[Tensor | None],
    hs: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    *lists_and_needs: Any,
    layers: Any = layers_backward,
) -> list[Tensor]:
    *lists, needs = lists_and_needs
    return list(_branch.packed(hs[0], layers(dys, hs, x, weights, branches(lists), needs)))


def _forward_fake(x: Tensor, weights: list[Tensor], biases: Any, A: list[Tensor], *_: Any) -> list[Tensor]:
    lead = x.shape[:-1]
    return [x.new_empty((*lead, w.shape[0])) for w in weights] + [a.new_empty((*lead, a.shape[0])) for a in A]


def _backward_fake(
    dys: list[Tensor | None], hs: list[Tensor], x: Tensor | None, weights: list[Tensor], *lists_and_needs: Any
) -> list[Tensor]:
    *lists, needs = lists_and_needs
    like_x = weights[0].new_empty((*hs[0].shape[:-1], weights[0].shape[1]))
    wanted: list[Tensor | None] = [like_x if any(dy is not None for dy in dys) else None]
    for dy, branch in zip(dys, branches(lists), strict=True):
        wanted += [None] * GRADIENTS if dy is None else branch.tensors
    return list(_branch.packed_fake(hs[0], wanted, needs))


def _forward_gpu(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *lists: Any) -> Any:
    from mbf.kernels import lora_group as kernels

    found = kernels.forward(x, weights, biases, branches(lists))
    return found if found is NotImplemented else [*found[0], *found[1]]


def _backward_gpu(
    dys: list[Tensor | None], hs: list[Tensor], x: Tensor | None, weights: list[Tensor], *lists_and_needs: Any
) -> Any:
    from mbf.kernels import lora_group as kernels

    *lists, needs = lists_and_needs
    found = kernels.backward(dys, hs, x, weights, branches(lists), needs)
    return found if found is NotImplemented else list(_branch.packed(hs[0], found))


define(
    f"lora_group(Tensor x, Tensor[] weights, Tensor?[] biases, {SCHEMA}) -> Tensor[]",
    _forward,
    _forward_fake,
    _forward_gpu,
    with_cuda(partial(_forward, layer=composed_forward)),
)
define(
    f"lora_group_backward(Tensor?[] dys, Tensor[] hs, Tensor? x, Tensor[] weights, {SCHEMA}, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
    _backward_gpu,
    with_cuda(partial(_backward, layers=composed_backward)),
)
_forward_operator = entrance("lora_group")
_backward_operator = entrance("lora_group_backward", 1)


class LoraGroup(torch.autograd.Function):
    """The operator's autograd formula. The operands are given twice: autograd sees tensors, but not lists of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Operands, *differentiable: Tensor | None) -> tuple[Tensor, ...]:
        n = len(given.weights)
        results = _below_autograd(x, given)
        # x is kept for the gradients of A only.
        save(ctx, given, x if any(ctx.needs_input_grad[2::GRADIENTS]) else None, *results[n:])
        return tuple(results[:n])

    @staticmethod
    @once(linear=1)
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, _, *of_branches = ctx.needs_input_grad
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        given, (x, *hs) = saved(ctx)
        used = [dy is not None for dy in dys for _ in range(GRADIENTS)]
        needs = [need_x, *(need and use for need, use in zip(of_branches, used, strict=True))]
        operator = _backward if vectorised(dys) else _backward_operator
        gradients = operator(dys, hs, x, given.weights, *given.branch, needs)
        dx, *rest = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return (dx, None, *rest)


def _below_autograd(x: Tensor, given: Operands) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_operator(x, *given[:2], *given.branch)


# -- the face ----------------------------------------------------------------------------------------------------------


def lora_group(x: Tensor, layers: Sequence[GroupLayer]) -> tuple[Tensor, ...]:
    """Frozen linear layers with low-rank branches on one input: ``lora_linear`` of each, as one operator.

    Differentiable once in x and in the tensors of the terms; weights and biases are frozen. Kept for backward are x
    (only if some A needs a gradient), each ``drop(x) Aᵀ`` and the operands. Seeds are drawn in the order of the layers.
    In a graph of torch.compile or torch.export there is one ``lora_linear`` a layer instead.

    Args:
        x: ``[..., d_in]``, of any strides, 1-D and empty ones included.
        layers: one or more; each may have a d_out, rank, dtype of A and B, and dropout of its own.

    Returns:
        The layers' outputs, each ``[..., d_out]`` in x's dtype.

    Raises:
        ValueError: no layer, a weight or bias that requires a gradient, or a shape, device or value that does not fit;
            the message says in which layer, and what would.
        TypeError: a dtype that does not.
    """
    if not layers:
        raise ValueError("layers is empty; pass one GroupLayer or more")
    try:
        names = [f"layers[{n}]" for n in range(len(layers))]
        for name, layer in zip(names, layers, strict=True):
            check_frozen(name, layer)
    except (AttributeError, TypeError) as error:
        raise wrong_layer(error, "layers", layers) from None
    if torch.compiler.is_compiling():
        return tuple(linear(x, layer) for layer in layers)
    try:
        if autocasts(x):
            (x,) = autocast_to(x.device, x)
            layers = [autocast_layer(x.device, layer) for layer in layers]
        given = operands(
            ((layer.weight, layer.bias) for layer in layers),
            [checked(name, x, layer) for name, layer in zip(names, layers, strict=True)],
        )
    except AttributeError as error:
        raise wrong_types(error, names, layers, x=x) from None
    if reference_only():
        return lora_group_ref(x, as_layers(given))
    if torch.is_grad_enabled():
        return apply(LoraGroup, x, given, *given.differentiable)
    return tuple(_below_autograd(x, given)[: len(layers)])
