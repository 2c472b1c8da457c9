"""Lists of frozen linear layers with low-rank branches: what ``mbf::lora_group`` and ``mbf::lora_mlp`` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mbf.ops import _branch
from mbf.ops._composed import GRADIENTS
from mbf.ops._inputs import wrong_type
from mbf.ops._operands import Branch, autocast_to, prepare
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


def linear(x: Tensor, layer: GroupLayer) -> Tensor:
    """One layer by ``lora_linear``."""
    return lora_linear(
        x, layer.weight, bias=layer.bias, dropout_p=layer.dropout_p, seed=layer.seed, **layer.terms._asdict()
    )


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


def vectorised(dys: Sequence[Tensor | None]) -> bool:
    """Whether backward runs for many gradients at once, as ``is_grads_batched`` has it: no operator of lists can."""
    return any(dy is not None and torch._C._functorch.is_legacy_batchedtensor(dy) for dy in dys)


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply``, but without looking at every input for torch.func's transforms where none is active."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    below: Any = super(torch.autograd.Function, function)
    return below.apply(*inputs)


def as_layers(given: Operands) -> list[GroupLayer]:
    """Undo ``operands``."""
    return [
        GroupLayer(weight, LoraTerms(A, B, scale, gate, mix, merged_B, merge_weight), bias, dropout_p, seed)
        for weight, bias, (A, B, scale, gate, mix, dropout_p, seed, merged_B, merge_weight) in zip(
            given.weights, given.biases, given.branches, strict=True
        )
    ]


# -- layers in plain torch ---------------------------------------------------------------------------------------------


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


# -- checks of a face --------------------------------------------------------------------------------------------------


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
