"""``mbf::lora_mlp``: ``down(act(gate(x)) ⊙ up(x))``, three frozen linear layers with their low-rank branches.

With g and u the outputs of gate and up, and dy the gradient of y::

    p = act(g) ⊙ u          y = down(p)
    dp = downᵀ(dy)          du = dp ⊙ act(g)          dg = (dp ⊙ u) ⊙ act′(g)          dx = gateᵀ(dg) + upᵀ(du)

Backward keeps g and u, or makes them again from x and each h by the arithmetic of forward; act(g) and p, which an
eager MLP keeps as well, are always made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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
    wrong_types,
)
from mbf.ops._library import define, reference_only
from mbf.ops._operands import autocast_to, autocasts

Activation = Literal["silu", "gelu_tanh"]
_LAYERS = ("gate", "up", "down")
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward.default),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    ),
}
# The operators take an activation by its place here: a string would be lost memory, 32 bytes a call, as the stable ABI
# of torch (2.10 to 2.13) does not free the one that it hands to C++.
_NAMES = tuple(_ACTIVATIONS)


def _name(activation: int) -> str:
    if not 0 <= activation < len(_NAMES):
        raise ValueError(f"activation is {activation}; it must be 0 for silu or 1 for gelu_tanh")
    return _NAMES[activation]


def lora_mlp_ref(
    x: Tensor, gate: GroupLayer, up: GroupLayer, down: GroupLayer, *, activation: Activation = "silu"
) -> Tensor:
    """``lora_mlp`` as the formula, in plain torch and differentiated by torch; dropout needs seeds."""
    act, _ = _ACTIVATIONS[activation]
    return linear_ref(act(linear_ref(x, gate)) * linear_ref(x, up), down)


# -- the operator and its backward -------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *rest: Any, layer: Any = layer_forward
) -> list[Tensor]:
    *lists, activation, recompute = rest
    gate, up, down = zip(weights, biases, branches(lists), strict=True)
    act, _ = _ACTIVATIONS[_name(activation)]
    g, h_gate = layer(x, *gate)
    u, h_up = layer(x, *up)
    y, h_down = layer(act(g) * u, *down)
    if recompute:
        g, u = x.new_empty(0), x.new_empty(0)
    return [y, g, u, h_gate, h_up, h_down]


def _backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor | None,
    u: Tensor | None,
    hs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    *rest: Any,
    layer: Any = layer_forward,
    layers: Any = layers_backward,
) -> list[Tensor]:
    *lists, activation, needs = rest
    of_layers = branches(lists)
    act, act_backward = _ACTIVATIONS[_name(activation)]
    if g is None or u is None:
        (g, _), (u, _) = map(layer, (x, x), weights, biases, of_layers, hs)
    of_down = needs[1 + 2 * GRADIENTS :]
    below = any(needs[: 1 + 2 * GRADIENTS])
    a = act(g)
    dp, *down = layers([dy], hs[2:], a * u, weights[2:], of_layers[2:], [below, *of_down])
    above: list[Tensor | None] = [None] * (1 + 2 * GRADIENTS)
    if dp is not None:
        dg_du = [act_backward(dp * u, g), dp * a]
        above = layers(dg_du, hs[:2], x, weights[:2], of_layers[:2], needs[: 1 + 2 * GRADIENTS])
    return list(_branch.packed(dy, [*above, *down]))


def _forward_fake(x: Tensor, weights: list[Tensor], biases: Any, A: list[Tensor], *rest: Any) -> list[Tensor]:
    lead, recompute = x.shape[:-1], rest[-1]
    g, u, y = (x.new_empty((*lead, weight.shape[0])) for weight in weights)
    if recompute:
        g, u = x.new_empty(0), x.new_empty(0)
    return [y, g, u, *(a.new_empty((*lead, a.shape[0])) for a in A)]


def _backward_fake(dy: Tensor, x: Tensor, g: Any, u: Any, hs: Any, weights: Any, biases: Any, *rest: Any) -> Any:
    *lists, _, needs = rest
    of_layers = [tensor for branch in branches(lists) for tensor in branch.tensors]
    return list(_branch.packed_fake(dy, [x, *of_layers], needs))


def _forward_gpu(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *rest: Any) -> Any:
    from mbf.kernels import lora_mlp as kernels

    *lists, activation, recompute = rest
    return kernels.forward(x, weights, biases, branches(lists), _name(activation), recompute)


def _backward_gpu(dy: Tensor, x: Tensor, g: Any, u: Any, hs: Any, weights: Any, biases: Any, *rest: Any) -> Any:
    from mbf.kernels import lora_mlp as kernels

    *lists, activation, needs = rest
    found = kernels.backward(dy, x, g, u, hs, weights, biases, branches(lists), _name(activation), needs)
    return found if found is NotImplemented else list(_branch.packed(dy, found))


define(
    f"lora_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, {SCHEMA}, int activation, bool recompute) -> Tensor[]",
    _forward,
    _forward_fake,
    _forward_gpu,
    with_cuda(partial(_forward, layer=composed_forward)),
)
define(
    "lora_mlp_backward(Tensor dy, Tensor x, Tensor? g, Tensor? u, Tensor[] hs, Tensor[] weights, Tensor?[] biases, "
    f"{SCHEMA}, int activation, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
    _backward_gpu,
    with_cuda(partial(_backward, layer=composed_forward, layers=composed_backward)),
)
_forward_operator = entrance("lora_mlp")
_backward_operator = entrance("lora_mlp_backward")


class LoraMlp(torch.autograd.Function):
    """The operator's autograd formula. The operands are given twice: autograd sees tensors, but not lists of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, given: Operands, activation: int, recompute: bool, *differentiable: Tensor | None
    ) -> Tensor:
        recompute = recompute or not any(ctx.needs_input_grad)
        y, g, u, *hs = _below_autograd(x, given, activation, recompute)
        ctx.activation = activation
        save(ctx, given, x, None if recompute else g, None if recompute else u, *hs)
        return y

    @staticmethod
    @once(linear=0)
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        need_x, _, _, _, *of_branches = ctx.needs_input_grad
        needs = [need_x, *of_branches]
        given, (x, g, u, *hs) = saved(ctx)
        operator = _backward if vectorised([dy]) else _backward_operator
        gradients = operator(dy, x, g, u, hs, *given[:2], *given.branch, ctx.activation, needs)
        dx, *rest = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return (dx, None, None, None, *rest)


def _below_autograd(x: Tensor, given: Operands, activation: int, recompute: bool) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_operator(x, *given[:2], *given.branch, activation, recompute)


# -- the face ----------------------------------------------------------------------------------------------------------


def lora_mlp(
    x: Tensor,
    gate: GroupLayer,
    up: GroupLayer,
    down: GroupLayer,
    *,
    activation: Activation = "silu",
    recompute: bool = False,
) -> Tensor:
    """A gated MLP of frozen linear layers with low-rank branches, ``y = down(act(gate(x)) ⊙ up(x))``.

    Each layer is ``lora_linear``. Differentiable once in x and in the tensors of the terms; weights and biases are
    frozen. Kept for backward are x, each layer's ``drop(·) Aᵀ``, the operands and, unless ``recompute``, the outputs of
    gate and up. Seeds are drawn in the order gate, up, down. In a graph of torch.compile or torch.export there are
    three ``lora_linear`` instead, and what is kept is the compiler's choice.

    Args:
        x: ``[..., d_in]``, of any strides, 1-D and empty ones included.
        gate: weight ``[d_ff, d_in]``.
        up: weight ``[d_ff, d_in]``.
        down: weight ``[d_out, d_ff]``; its dropout is of ``act(gate(x)) ⊙ up(x)``.
        activation: ``"silu"`` or ``"gelu_tanh"``, GELU by its tanh approximation.
        recompute: make the outputs of gate and up again in backward, bit for bit, instead of keeping them: two tensors
            ``[..., d_ff]`` less for two more products.

    Returns:
        y, ``[..., d_out]`` in x's dtype.

    Raises:
        ValueError: an unknown activation, a weight or bias that requires a gradient, or a shape, device or value that
            does not fit; the message says in which layer, and what would.
        TypeError: a dtype that does not.
    """
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(map(repr, _ACTIVATIONS))}")
    layers: Sequence[GroupLayer] = (gate, up, down)
    try:
        for name, layer in zip(_LAYERS, layers, strict=True):
            check_frozen(name, layer)
    except AttributeError as error:
        raise _wrong_layer(error, layers) from None
    if torch.compiler.is_compiling():
        act, _ = _ACTIVATIONS[activation]
        return linear(act(linear(x, gate)) * linear(x, up), down)
    try:
        if autocasts(x):
            (x,) = autocast_to(x.device, x)
            layers = [autocast_layer(x.device, layer) for layer in layers]
        given = _operands(x, layers)
    except AttributeError as error:
        raise wrong_types(error, _LAYERS, layers, x=x) from None
    if reference_only():
        return lora_mlp_ref(x, *as_layers(given), activation=activation)
    if torch.is_grad_enabled():
        return apply(LoraMlp, x, given, _NAMES.index(activation), recompute, *given.differentiable)
    return _below_autograd(x, given, _NAMES.index(activation), True)[0]


def _wrong_layer(error: AttributeError, layers: Sequence[Any]) -> Exception:
    for name, layer in zip(_LAYERS, layers, strict=True):
        if not isinstance(layer, GroupLayer):
            return TypeError(f"{name}: got {type(layer).__name__}; pass a GroupLayer")
    return wrong_types(error, _LAYERS, layers)


def _operands(x: Tensor, layers: Sequence[GroupLayer]) -> Operands:
    gate, up, down = layers
    of_gate, of_up = checked("gate", x, gate), checked("up", x, up)
    if gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"up: weight has shape {list(up.weight.shape)} but gate's {list(gate.weight.shape)}; "
            "both must be [d_ff, d_in]"
        )
    # p, of which only shape, dtype and device count here.
    p = x.new_empty(()).expand(*x.shape[:-1], gate.weight.shape[0])
    return operands(((layer.weight, layer.bias) for layer in layers), [of_gate, of_up, checked("down", p, down)])
