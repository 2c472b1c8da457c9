"""``mbf::lora_group``: frozen linear layers that read the same x, each with its low-rank branch, as q, k and v do.

Every layer computes what ``lora_linear`` computes, with a mask of its own. They share x, which is read once, and dx,
which is summed over the layers as it is made instead of being n tensors that autograd adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mbf.ops import _branch
from mbf.ops._composed import GRADIENTS, composed_backward, composed_forward
from mbf.ops._gpu import entrance, with_cuda
from mbf.ops._inputs import wrong_type
from mbf.ops._library import define, reference_only
from mbf.ops._operands import Branch, autocast_to, autocasts, prepare
from mbf.ops.lora_linear import LoraTerms, _check_base, lora_linear, lora_linear_ref

SCHEMA = (
    "Tensor[] A, Tensor[] B, float[] scales, Tensor?[] gates, Tensor?[] mixes, float[] dropout_ps, Tensor?[] seeds, "
    "Tensor?[] merged_Bs, Tensor?[] merge_weights"
)


class GroupLayer(NamedTuple):
    """One frozen linear layer with its branch, in the names of ``lora_linear``.

    Attributes:
        weight: W, ``[d_out, d_in]``; must not require a gradient.
        terms: A, B, scale, gate, mix, merged_B, merge_weight.
        bias: b, ``[d_out]``, or None; must not require a gradient.
        dropout_p: probability in [0, 1 − 2⁻¹⁷) that an element of x is dropped before A.
        seed: of the mask, an int or a 0-d int64 tensor on x's device. Default: ``draw_seed``.
    """

    weight: Tensor
    terms: LoraTerms
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


def linear_ref(x: Tensor, layer: GroupLayer) -> Tensor:
    """One layer by ``lora_linear_ref``."""
    return lora_linear_ref(
        x, layer.weight, bias=layer.bias, dropout_p=layer.dropout_p, seed=layer.seed, **layer.terms._asdict()
    )


def lora_group_ref(x: Tensor, layers: Sequence[GroupLayer]) -> tuple[Tensor, ...]:
    """``lora_group`` as the formula, in plain torch and differentiated by torch; dropout needs a seed."""
    return tuple(linear_ref(x, layer) for layer in layers)


# -- the operators' lists ----------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The arguments of the operators for all layers, each a list with an entry a layer: ``SCHEMA`` after the bases."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    branch: list[list[Any]]

    @property
    def branches(self) -> list[Branch]:
        return branches(self.branch)

    @property
    def differentiable(self) -> list[Tensor | None]:
        """What can have a gradient, layer by layer: ``Branch.tensors`` of each."""
        A, B, _, gates, mixes, _, _, merged_Bs, merge_weights = self.branch
        return [tensor for layer in zip(A, B, gates, mixes, merged_Bs, merge_weights, strict=True) for tensor in layer]


def operands(bases: Iterable[tuple[Tensor, Tensor | None]], of_layers: Iterable[Branch]) -> Operands:
    """Turn a weight, a bias and a branch a layer into lists."""
    weights, biases = zip(*bases, strict=True)
    return Operands(list(weights), list(biases), [list(column) for column in zip(*of_layers, strict=True)])


def branches(lists: Sequence[Sequence[Any]]) -> list[Branch]:
    """Undo the lists of ``SCHEMA``: a branch a layer."""
    return [Branch(*column) for column in zip(*lists, strict=True)]


def save(ctx: Any, given: Operands, *further: Tensor | None) -> None:
    """Save the operands and further tensors for backward."""
    A, B, ctx.scales, gates, mixes, ctx.dropout_ps, seeds, merged_Bs, merge_weights = given.branch
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *given.weights, *given.biases, *A, *B, *gates, *mixes, *seeds, *merged_Bs, *merge_weights, *further
    )


def saved(ctx: Any) -> tuple[Operands, tuple[Any, ...]]:
    """Return the operands and the further tensors given to ``save``."""
    n, tensors = len(ctx.scales), ctx.saved_tensors
    weights, biases, A, B, gates, mixes, seeds, merged_Bs, merge_weights = (
        list(tensors[first : first + n]) for first in range(0, 9 * n, n)
    )
    lists = [A, B, ctx.scales, gates, mixes, ctx.dropout_ps, seeds, merged_Bs, merge_weights]
    return Operands(weights, biases, lists), tensors[9 * n :]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, but where no second derivative is in question without its cost."""
    guarded = once_differentiable(backward)

    def run(ctx: Any, *dys: Tensor | None) -> Any:
        return guarded(ctx, *dys) if torch.is_grad_enabled() else backward(ctx, *dys)

    return run


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply``, but without looking at every input for torch.func's transforms where none is active."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    below: Any = super(torch.autograd.Function, function)
    return below.apply(*inputs)


# -- the operator and its backward -------------------------------------------------------------------------------------


def layer_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y and h of one layer; h is not made again where it is given."""
    y = F.linear(x, weight, bias)
    if h is None:
        h = _branch.project(x, branch)
    _branch.add_branch_(y, h, branch)
    return y, h


def layers_backward(
    dys: Sequence[Tensor | None],
    hs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    of_layers: Sequence[Branch],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate layers that read the same x.

    Args:
        dys: the gradient of each output ``[..., d_out]``; a layer without one contributes nothing.
        hs: each layer's ``drop(x) Aᵀ``, ``[..., r]``.
        x: ``[..., d_in]``; read only for the gradients of A.
        weights: each layer's W.
        of_layers: each layer's branch.
        needs: which gradients are asked: of x, then ``GRADIENTS`` of each layer.

    Returns:
        The gradients in the order of ``needs``, None where not asked.
    """
    need_x, *of_branches = needs
    dx = None
    found: list[Tensor | None] = []
    lead: Sequence[int] = ()
    for n, (dy, h, weight, branch) in enumerate(zip(dys, hs, weights, of_layers, strict=True)):
        if dy is None:
            found += [None] * GRADIENTS
            continue
        need = of_branches[GRADIENTS * n : GRADIENTS * (n + 1)]
        rows, lead = _branch.rows(dy), dy.shape[:-1]
        keep = _branch.mask(branch, lead, dy.device) if need_x or need[0] else None
        dh, gradients = _branch.branch_backward(rows, h, x, keep, branch, [need_x, *need])
        found += gradients
        if need_x and dh is not None:
            if dx is None:
                dx = rows @ weight
            else:
                _branch.add_product_(dx, rows, weight)
            _branch.add_input_gradient_(dx, dh, keep, branch)
    return [None if dx is None else dx.view(*lead, dx.shape[-1]), *found]


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *lists: Any, layer: Any = layer_forward
) -> list[Tensor]:
    results = [
        layer(x, weight, bias, branch) for weight, bias, branch in zip(weights, biases, branches(lists), strict=True)
    ]
    return [y for y, _ in results] + [h for _, h in results]


def _backward(
    dys: list[Tensor | None],
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
    @once
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, _, *of_branches = ctx.needs_input_grad
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        given, (x, *hs) = saved(ctx)
        used = [dy is not None for dy in dys for _ in range(GRADIENTS)]
        needs = [need_x, *(need and use for need, use in zip(of_branches, used, strict=True))]
        gradients = _backward_operator(dys, hs, x, given.weights, *given.branch, needs)
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


def linear(x: Tensor, layer: GroupLayer) -> Tensor:
    """One layer by ``lora_linear``."""
    return lora_linear(
        x, layer.weight, bias=layer.bias, dropout_p=layer.dropout_p, seed=layer.seed, **layer.terms._asdict()
    )


def autocast_layer(device: torch.device, layer: GroupLayer) -> GroupLayer:
    """The layer with the operands of its products as autocast casts them."""
    terms = layer.terms
    weight, A, B = autocast_to(device, layer.weight, terms.A, terms.B)
    bias, merged_B = autocast_to(device, layer.bias, terms.merged_B)
    return layer._replace(weight=weight, bias=bias, terms=terms._replace(A=A, B=B, merged_B=merged_B))


def check_frozen(name: str, layer: GroupLayer) -> None:
    """Raise ValueError if a gradient of the base would be lost."""
    for part, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {part} requires a gradient, but the base is frozen here; "
                f"call {part}.requires_grad_(False), or lora_linear for this layer"
            )


def wrong_layer(error: Exception, name: str, layers: Any) -> Exception:
    """What to raise where ``check_frozen`` ran into ``error``: which of ``layers`` is no ``GroupLayer``."""
    if not isinstance(layers, (list, tuple)):
        return TypeError(f"{name}: got {type(layers).__name__}; pass a list of GroupLayer")
    for n, layer in enumerate(layers):
        if not isinstance(layer, GroupLayer):
            return TypeError(f"{name}[{n}]: got {type(layer).__name__}; pass a GroupLayer")
    return wrong_types(error, [f"{name}[{n}]" for n in range(len(layers))], layers)


def wrong_types(error: Exception, names: Sequence[str], layers: Sequence[GroupLayer], **tensors: Any) -> Exception:
    """What to raise where a check of these layers ran into ``error``; see ``_inputs.wrong_type``."""
    optional: dict[str, Any] = {}
    for name, layer in zip(names, layers, strict=True):
        if not isinstance(layer.terms, LoraTerms):
            return _wrong_terms(name, layer)
        tensors |= {f"{name}: weight": layer.weight, f"{name}: A": layer.terms.A, f"{name}: B": layer.terms.B}
        optional[f"{name}: bias"] = layer.bias
        optional |= {f"{name}: {part}": getattr(layer.terms, part) for part in ("gate", "mix", "merged_B")}
    return wrong_type(error, optional, **tensors)


def _wrong_terms(name: str, layer: GroupLayer) -> TypeError:
    return TypeError(f"{name}: terms: got {type(layer.terms).__name__}; pass LoraTerms")


def checked(name: str, x: Tensor, layer: GroupLayer) -> Branch:
    """The layer's branch as the operators take it; errors begin with the layer's name."""
    try:
        A, B, scale, gate, mix, merged_B, merge_weight = layer.terms
        branch = prepare(x, A, B, scale, gate, mix, layer.dropout_p, layer.seed, merged_B, merge_weight)
        _check_base(x, layer.weight, layer.bias, B)
    except (TypeError, ValueError) as error:
        if not isinstance(layer.terms, LoraTerms):
            raise _wrong_terms(name, layer) from None
        raise type(error)(f"{name}: {error}") from None
    return branch


def as_layers(given: Operands) -> list[GroupLayer]:
    """Undo ``operands``."""
    return [
        GroupLayer(weight, LoraTerms(A, B, scale, gate, mix, merged_B, merge_weight), bias, dropout_p, seed)
        for weight, bias, (A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight) in zip(
            given.weights, given.biases, given.branches, strict=True
        )
    ]
