"""``init_pissa_``: the leading singular triples of every base weight as the start of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mbf.ops import rsvd
from mbf.peft.adapter import AdapterLayer
from mbf.peft.eligibility import PLAIN, plain_weight
from mbf.peft.initialise import first_not_finite, product_layers

_AT_A_TIME = 1 << 28  # bytes of weights in fp32 that are decomposed in one call


class _Target(NamedTuple):
    layer: AdapterLayer
    W: Tensor
    """The base weight itself as ``[d_out, d_in]``, a view where it is stored as ``[d_in, d_out]``."""


@torch.no_grad()
def init_pissa_(
    model: nn.Module,
    adapter: str = "default",
    *,
    n_iter: int = 4,
    oversample: int = 8,
    exact: bool = False,
    generator: torch.Generator | None = None,
    force: bool = False,
) -> None:
    """Start ``adapter`` from the leading singular triples of W in every layer, in place (PiSSA, Meng et al. 2024,
    arXiv 2404.02948).

    With ``W ≈ U S Vh``, r triples, and the layer's scale s: ``A = √(S/s) Vh``, ``B = U √(S/s)`` and
    ``W ← W − s B A``, as PEFT's ``init_lora_weights="pissa"`` has it. The triples of all layers come from batched
    randomised SVD (``mbf.ops.rsvd``) in fp32, a bounded number of weights at a time. A and B keep their dtype, and W
    gives up what they hold after rounding, so the model computes what it computed before, to the rounding of W. All
    parameters stay the same objects; DoRA's magnitude needs no change, as W + s B A is what it was.

    The base weights change, so the adapter alone is not enough, and a plain ``save_pretrained`` without them loads to a
    wrong model. After training, either

    * convert it to a LoRA of rank 2r on the original W: ``model.save_pretrained("start")`` right after this call,
      and at the end ``model.save_pretrained("out", path_initial_model_for_weight_conversion="start")``
      (PEFT refuses it for rslora with rank or alpha patterns, and loses DoRA's magnitude); or
    * keep the base weights beside the adapter: ``model.save_pretrained("adapter")`` and then
      ``model.unload().save_pretrained("base")``; or
    * ship ``model.merge_and_unload()``.

    ``disable_adapter()`` gives the base without its leading part, not the original. ``ContinualLora(model,
    learnt=False)`` counts such a start as no task; without it, B ≠ 0 counts as task 1.

    Args:
        model: a PeftModel, a model with injected adapters, or a module that contains one; fused or not.
        adapter: the adapter's name; it must be the only one.
        n_iter: power iterations of the randomised SVD, see ``mbf.ops.rsvd``.
        oversample: rows that its sketch has beyond r.
        exact: take a full SVD of each W instead, as PEFT's "pissa" does, which is much slower.
        generator: source of the sketches' seeds, on the weights' device; default: torch's own.
        force: begin anew with an adapter whose B is not zero: what it has learnt becomes part of W first, W + s B A is
            decomposed. A later conversion to a LoRA is relative to that.

    Raises:
        TypeError: a base weight is quantised, sharded or otherwise no ordinary matrix in fp64, fp32, bf16 or fp16.
        ValueError: no such adapter; one that has learnt already (B ≠ 0); other adapters in the model, whose W would
            change; a layer that is not linear, has a ``lora_bias`` or is a variant other than DoRA; a weight that is
            shared with another module; W or the results not finite; r > min(d_in, d_out); s ≤ 0; an adapter that is
            merged into W, disabled or not active. The layer is named, and nothing is changed then. Interrupted while it
            writes, A and B are put back as they were, and W to within its rounding.
    """
    layers = product_layers(model, adapter, {"DoraLinearVariant"})
    targets = [_Target(layer, _weight(layer)) for layer in layers]
    _check_alone(model, adapter)
    if not force:
        _check_untrained(layers)
    _check_untied(model, targets)
    factors: list[tuple[Tensor, Tensor]] = [(layer.A, layer.B) for layer in layers]
    for here in _chunks(targets):
        weights = [_whole(targets[n]) if force else targets[n].W.to(_wide(targets[n].W)) for n in here]
        if bad := first_not_finite([layers[n] for n in here], weights):
            raise ValueError(f"layer {bad}: W holds NaN or infinity and has no singular values; load the model anew")
        r = layers[here[0]].A.shape[0]
        triples: Iterable[tuple[Tensor, Tensor, Tensor]] = (
            _svd(weights, r) if exact else rsvd(weights, r, n_iter=n_iter, oversample=oversample, generator=generator)
        )
        for n, W, (U, S, Vh) in zip(here, weights, triples, strict=True):
            layer = layers[n]
            root = (S / layer.scale).sqrt()
            A, B = (root[:, None] * Vh).to(layer.A.dtype), (U * root).to(layer.B.dtype)
            residual = _less(W, layer.scale, A, B).to(targets[n].W.dtype)
            for name, tensor in (("A", A), ("B", B), ("W", residual)):
                if first_not_finite([layer], [tensor]):
                    raise ValueError(
                        f"layer {layer.name}: the new {name} holds NaN or infinity and does not fit its dtype; "
                        "load the model in bf16 or fp32"
                    )
            factors[n] = A.to(layer.A.device), B.to(layer.B.device)
    _exchange(targets, factors, force)


def _weight(layer: AdapterLayer) -> Tensor:
    """W ``[d_out, d_in]`` itself, or an error that says why PiSSA cannot take it apart."""
    module = layer.module
    if module.lora_B[layer.adapter].bias is not None:
        raise ValueError(f"layer {layer.name} has a bias beside A and B; use LoraConfig(lora_bias=False) with PiSSA")
    base = module.get_base_layer()
    weight = plain_weight(base)
    if weight is None or weight.dim() != 2 or weight.is_meta:
        found = getattr(base, "weight", None)
        kind = f"{type(found).__name__} {getattr(found, 'dtype', '')} {list(getattr(found, 'shape', ()))}"
        raise TypeError(
            f"layer {layer.name}: the weight of its {type(base).__name__} is {kind}; PiSSA needs a matrix in fp32, "
            "bf16 or fp16. Initialise the model before it is quantised or sharded, save the adapter and "
            "model.unload(), and quantise that base"
        )
    if not isinstance(module, Linear) or isinstance(module.base_layer, BaseTunerLayer):
        raise ValueError(
            f"layer {layer.name} is a {type(module).__module__}.{type(module).__qualname__} on "
            f"{type(module.base_layer).__name__}, which computes more than x Wᵀ; leave it out of target_modules"
        )
    if module.disable_adapters or layer.adapter not in module.active_adapters:
        raise ValueError(
            f"layer {layer.name}: adapter {layer.adapter!r} is not active, so W alone computes and would lose "
            f"its part; call model.set_adapter({layer.adapter!r}) and enable the adapters"
        )
    W = weight.detach()
    W = W.T if module.fan_in_fan_out else W
    r = layer.A.shape[0]
    if r > min(W.shape):
        raise ValueError(f"layer {layer.name}: r is {r}; W {list(W.shape)} has {min(W.shape)} singular triples")
    if not layer.scale > 0:
        raise ValueError(f"layer {layer.name}: its scale is {layer.scale}; s B A is a part of W for s > 0 only")
    return W


def _check_untrained(layers: Sequence[AdapterLayer]) -> None:
    trained = torch.stack([layer.B.count_nonzero().cpu() for layer in layers])
    if trained.any():
        layer = layers[int(trained.nonzero()[0])]
        raise ValueError(
            f"layer {layer.name}: B is not zero, so adapter {layer.adapter!r} has learnt something or was started by "
            "another initialiser; use a fresh adapter, or force=True to make it part of W and begin anew"
        )


def _check_alone(model: nn.Module, adapter: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (others := sorted(module._get_available_adapters() - {adapter})):
            raise ValueError(
                f"layer {name} has adapter {others[0]!r} beside {adapter!r}; PiSSA changes W, and so what the other "
                f"computes: model.delete_adapter({others[0]!r}) first"
            )


class _Span(NamedTuple):
    """The bytes of a tensor in memory."""

    device: str
    start: int
    end: int
    owner: str
    target: bool


def _check_untied(model: nn.Module, targets: Sequence[_Target]) -> None:
    """Raise ValueError if a weight that is to change lies in memory that something else of the model reads."""
    spans = [_span(W, f"layer {layer.name}", True) for layer, W in targets]
    bases = {id(layer.module.get_base_layer()) for layer, _ in targets}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) not in PLAIN or (key == "weight" and id(module) in bases):
                continue
            if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
                spans.append(_span(tensor, f"{name}.{key}", False))
    open_spans: list[_Span] = []
    for span in sorted(spans):
        open_spans = [other for other in open_spans if other.device == span.device and other.end > span.start]
        for other in open_spans:
            if span.target or other.target:
                one, two = (other, span) if other.target else (span, other)
                raise ValueError(
                    f"{one.owner}: its W is shared with {two.owner}, which PiSSA would change, too; leave it out of "
                    "target_modules, or give each a weight of its own"
                )
        open_spans.append(span)


def _span(tensor: Tensor, owner: str, target: bool) -> _Span:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Span(str(tensor.device), start, start + (last + 1) * tensor.element_size(), owner, target)


def _chunks(targets: Sequence[_Target]) -> Iterator[list[int]]:
    """Indices of targets that are one call: of one shape, rank, dtype and device, and together not too large."""
    groups: dict[Any, list[int]] = {}
    for n, (layer, W) in enumerate(targets):
        groups.setdefault((W.shape, layer.A.shape[0], W.dtype, W.device), []).append(n)
    for group in groups.values():
        W = targets[group[0]].W
        count = max(1, _AT_A_TIME // (W.numel() * _wide(W).itemsize))
        yield from (group[n : n + count] for n in range(0, len(group), count))


def _svd(weights: Sequence[Tensor], r: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for W in weights:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        yield U[:, :r], S[:r], Vh[:r]


def _wide(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


def _less(W: Tensor, scale: float, A: Tensor, B: Tensor) -> Tensor:
    """``W − s B A`` in fp32 or wider."""
    wide = _wide(W)
    return torch.addmm(W.to(wide), B.to(W.device, wide), A.to(W.device, wide), alpha=-scale)


def _whole(target: _Target) -> Tensor:
    """``W + s B A`` in fp32 or wider."""
    layer, W = target
    return _less(W, -layer.scale, layer.A, layer.B)


def _exchange(targets: Sequence[_Target], factors: Sequence[tuple[Tensor, Tensor]], force: bool) -> None:
    """Write every (W, A, B); what is interrupted is undone. A second copy of all W would be the price of undoing W to
    the last bit."""
    before = [(layer.A.clone(), layer.B.clone(), W._version) for layer, W in targets]
    try:
        for target, (A, B) in zip(targets, factors, strict=True):
            layer, W = target
            W.copy_(_less(_whole(target) if force else W, layer.scale, A, B))
            layer.A.copy_(A)
            layer.B.copy_(B)
    except BaseException:
        for target, (A, B), (old_A, old_B, version) in zip(targets, factors, before, strict=True):
            layer, W = target
            if W._version != version:
                whole = _less(W, -layer.scale, A, B)
                W.copy_(_less(whole, layer.scale, old_A, old_B) if force else whole)
            layer.A.copy_(old_A)
            layer.B.copy_(old_B)
        raise
