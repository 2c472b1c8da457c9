"""``orthogonalize_``: orthonormal rows of A in every layer of an adapter at once; and what every initialiser checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from mbf.ops import orthonormal_rows
from mbf.peft.adapter import AdapterLayer, modules_with
from mbf.peft.config import find_home
from mbf.peft.eligibility import _DTYPES, PLAIN


@torch.no_grad()
def orthogonalize_(model: nn.Module, adapter: str = "default", *, B: Literal["preserve", "carry"] = "preserve") -> None:
    """Make the rows of A orthonormal in every layer of ``adapter``, in place: ``A Aᵀ = I`` (SLAO's start of a task).

    ``A = L Q`` with L ``[r, r]`` lower triangular and ``L_jj > 0`` (``mbf.ops.orthonormal_rows``, one call for all
    layers); A becomes Q and B becomes ``B L``, so that B A, and with it what the model computes, is the same. ``B L``
    is the best fit to B A on Q as it is stored, computed in fp64 and rounded once; where B is zero it stays zero.

    For every LoRA whose layers are linear, whatever the base layer is (quantised ones, too): A and B alone change, and
    of them the adapter's function knows the product only. That holds for rslora, ``lora_bias``, dropout, DoRA (its
    norm is that of W + s B A) and aLoRA; the other variants of PEFT compute more than that product and are refused.
    The parameters stay the same objects, frozen or not, so an optimiser goes on, but its moments are of the old basis:
    better call this before it is built.

    Args:
        model: a PeftModel, a model with injected adapters, or a module that contains one; fused or not.
        adapter: the adapter's name. Its A ``[r, d_in]``, r ≤ d_in, and B ``[d_out, r]`` are in fp64, fp32, bf16 or
            fp16.
        B: ``"preserve"``, or ``"carry"``: B as it is, so that the function changes unless B is zero (SLAO's
            ``B_start``).

    Raises:
        ValueError: no such adapter; a layer that is not linear, or a variant as above; A or B not finite, shared by
            layers so that no B fits them all, sharded or without values; r > d_in; an adapter that is merged into W;
            ``B L`` beyond what B's dtype holds. The layer is named, and nothing is changed then.
    """
    if B not in ("preserve", "carry"):
        raise ValueError(f"B is {B!r}; it must be 'preserve' (the same B A) or 'carry' (B as it is)")
    layers = product_layers(model, adapter, {"DoraLinearVariant", "ALoraLinearVariant"})
    for layer in layers:
        r, d_in = layer.A.shape
        if r > d_in:
            raise ValueError(f"layer {layer.name}: A has {r} rows of length {d_in}; only r ≤ d_in can be orthonormal")
    if B == "preserve":
        _check_separate_B(layers)
    Q = orthonormal_rows([layer.A for layer in layers])
    values: list[tuple[Tensor, Tensor]] = [(layer.A, q) for layer, q in zip(layers, Q, strict=True)]
    if B == "preserve":
        folded = [_fold(layer.A, layer.B, q) for layer, q in zip(layers, Q, strict=True)]
        if bad := first_not_finite(layers, folded):
            raise ValueError(
                f"layer {bad}: B L, which keeps B A as it is, holds NaN or infinity and does not fit its dtype; "
                "cast A and B to fp32"
            )
        values += [(layer.B, new) for layer, new in zip(layers, folded, strict=True)]
    _write(values)
    if B == "carry":
        _forget_products(layers)


def _fold(A: Tensor, B: Tensor, Q: Tensor) -> Tensor:
    """``B L`` in B's dtype, L the best of ``A ≈ L Q``: ``A Qᵀ`` but for the rounding of Q."""
    A, Q = A.double(), Q.double()
    L = torch.linalg.solve(Q @ Q.mT, A @ Q.mT, left=False)
    return (B.double() @ L).to(B.dtype)


def _check_separate_B(layers: Sequence[AdapterLayer]) -> None:
    """Layers may share A, or A and B; a B that is shared alone would need another L for each."""
    first: dict[int, AdapterLayer] = {}
    for layer in layers:
        other = first.setdefault(layer.B.data_ptr(), layer)
        if other.A.data_ptr() != layer.A.data_ptr():
            raise ValueError(
                f"layers {other.name} and {layer.name} share B and not A, so no B keeps both their products; "
                "use B='carry', or give each a B of its own"
            )


def _write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its tensor; interrupted, all are as they were."""
    before = [(into, into.clone()) for into, _ in values]
    try:
        for into, value in values:
            into.copy_(value)
    except BaseException:
        for into, value in before:
            into.copy_(value)
        raise


def _forget_products(layers: Sequence[AdapterLayer]) -> None:
    """Have DoRA compute anew what PEFT may keep of a product in eval mode (``ENABLE_DORA_CACHING``)."""
    for layer in layers:
        magnitudes = layer.module.lora_magnitude_vector
        if layer.adapter in magnitudes and hasattr(magnitudes[layer.adapter], "_cache_clear"):
            magnitudes[layer.adapter]._cache_clear()


# -- for every initialiser --------------------------------------------------------------------------------------------


def product_layers(model: nn.Module, adapter: str, variants: set[str]) -> list[AdapterLayer]:
    """Every layer of ``adapter``, each a linear one that computes with W, s and B A alone; or a ValueError."""
    home = find_home(model, adapter)
    layers = []
    for name, module in modules_with(model if home is None else home.root, adapter).items():
        if (reason := _more_than_a_product(module, adapter, variants)) is not None:
            raise ValueError(f"adapter {adapter!r} of layer {name} {reason}")
        if module.merged_adapters:
            raise ValueError(
                f"adapter {module.merged_adapters[0]!r} is merged into W of layer {name}; call model.unmerge_adapter()"
            )
        layers.append(AdapterLayer(name, adapter, module))
    for layer in layers:
        for factor, parameter in (("A", layer.A), ("B", layer.B)):
            if type(parameter) not in PLAIN or parameter.dtype not in _DTYPES or parameter.is_meta:
                raise ValueError(
                    f"layer {layer.name}: {factor} is a {type(parameter).__name__} of {parameter.dtype} on "
                    f"{parameter.device}; load the adapter whole, in fp32, bf16 or fp16"
                )
    for factor, parameters in (("A", [layer.A for layer in layers]), ("B", [layer.B for layer in layers])):
        if bad := first_not_finite(layers, parameters):
            raise ValueError(
                f"layer {bad}: {factor} holds NaN or infinity and is no start for anything; train the adapter anew"
            )
    return layers


def _more_than_a_product(module: Any, adapter: str, variants: set[str]) -> str | None:
    linear = all(
        adapter in factor and isinstance(factor[adapter], nn.Linear) for factor in (module.lora_A, module.lora_B)
    )
    if not linear or isinstance(module, ParamWrapper):
        return "is no linear layer; list linear layers only in target_modules"
    variant = type(module.lora_variant[adapter]).__name__ if adapter in module.lora_variant else None
    if variant is not None and variant not in variants:
        return f"is the LoRA variant {variant}, which computes with more than W and B A; use a LoraConfig without it"
    return None


def first_not_finite(layers: Sequence[AdapterLayer], tensors: Sequence[Tensor]) -> str | None:
    """The name of the first layer whose tensor holds NaN or infinity."""
    for layer, tensor in zip(layers, tensors, strict=True):
        if not torch.stack(tensor.aminmax()).isfinite().all():
            return layer.name
    return None
