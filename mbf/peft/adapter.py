"""One adapter as the list of its layers: read and write A and B, and replace what a layer computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mbf.ops import BranchTerms
from mbf.peft.base_weight import dense_weight
from mbf.peft.config import alpha_at_rank, find_home
from mbf.peft.eligibility import adapter_reason, layer_reason
from mbf.peft.fuse import NOT_PEFT
from mbf.peft.linear import FusedForward, Route
from mbf.peft.quantised import fused_class
from mbf.peft.sharded import is_sharded, whole, write_shard


class AdapterLayer:
    """``adapter`` in one LoRA layer: ``A [r, d_in]``, ``B [d_out, r]`` and s of ``y = x Wᵀ + s (x Aᵀ) Bᵀ``.

    Attributes:
        name: the layer's name in the model that the adapter was added to, as in PEFT's patterns.
        adapter: the adapter's name.
        module: the PEFT layer.
    """

    def __init__(self, name: str, adapter: str, module: LoraLayer) -> None:
        self.name = name
        self.adapter = adapter
        self.module: Any = module

    def __repr__(self) -> str:
        return f"AdapterLayer({self.name!r}, adapter={self.adapter!r}, r={self.A.shape[0]}, scale={self.scale:g})"

    @property
    def A(self) -> nn.Parameter:
        """The live parameter ``lora_A[adapter].weight [r, d_in]``."""
        return self.module.lora_A[self.adapter].weight

    @property
    def B(self) -> nn.Parameter:
        """The live parameter ``lora_B[adapter].weight [d_out, r]``."""
        return self.module.lora_B[self.adapter].weight

    @property
    def scale(self) -> float:
        """s, as the layer applies it now."""
        return float(self.module.scaling[self.adapter])

    @property
    def sharded(self) -> bool:
        """Whether A and B are kept in parts, one a process (FSDP2)."""
        return is_sharded(self.A) or is_sharded(self.B)

    def weight(self) -> Tensor:
        """W as it is, ``[d_out, d_in]`` in fp32 and without autograd; a quantised one is dequantised. A copy.

        Raises:
            TypeError: the base layer has no such weight.
        """
        base, transposed = self.module.get_base_layer(), bool(getattr(self.module, "fan_in_fan_out", False))
        return dense_weight(base, self.name, transposed=transposed)

    def values(self) -> tuple[Tensor, Tensor]:
        """(A, B) without autograd: the parameters' own memory or, where they are sharded, gathered from all processes,
        which must all call this."""
        return whole(self.A), whole(self.B)

    @torch.no_grad()
    def write(self, A: Tensor, B: Tensor) -> None:
        """Set A and B, cast to the parameters' dtype and device.

        With the rank that the layer has, values are copied into the parameters. With another rank the parameters are
        replaced (an optimiser that holds the old ones must be made anew), and the layer's ``r`` and ``lora_alpha``
        change so that s stays; call ``sync_config`` once all layers are written.

        Sharded parameters (FSDP2) take their part of the values, which every process must give; their rank is fixed.

        Args:
            A: [r, d_in], any r ≥ 1.
            B: [d_out, r].

        Raises:
            ValueError: the shapes do not fit the layer or one another, or would change the rank of sharded parameters;
                nothing is changed.
        """
        d_in, d_out, r = self.A.shape[1], self.B.shape[0], A.shape[0]
        if A.shape != (r, d_in) or B.shape != (d_out, r) or r == 0:
            raise ValueError(
                f"layer {self.name}: got A {list(A.shape)} and B {list(B.shape)}; they must be [r, {d_in}] and "
                f"[{d_out}, r] with one r ≥ 1"
            )
        if self.sharded:
            if r != self.A.shape[0]:
                raise ValueError(
                    f"layer {self.name} is sharded by FSDP2 at rank {self.A.shape[0]}, which cannot become {r}; "
                    "change the rank before fully_shard, or train with DDP"
                )
            write_shard(self.A, A)
            write_shard(self.B, B)
            return
        if r == self.A.shape[0]:
            self.A.copy_(A)
            self.B.copy_(B)
            return
        module, adapter = self.module, self.adapter
        alpha = alpha_at_rank(module, adapter, r)
        module.lora_A[adapter].weight = _like(self.A, A)
        module.lora_B[adapter].weight = _like(self.B, B)
        module.lora_A[adapter].out_features = module.lora_B[adapter].in_features = r
        module.r[adapter], module.lora_alpha[adapter] = r, alpha

    def route(self, terms: Callable[[AdapterLayer], BranchTerms] | None, *, own_operator: bool = False) -> None:
        """Have every forward compute with ``terms(layer)`` in place of the adapter's (A, B, s); None undoes it.

        Terms of another operator than ``lora_linear`` come with ``own_operator=True``; the base layer runs as it is,
        and they are added to its output.

        Works on fused and stock layers alike; the adapter's dropout applies. The adapter must be active to count, and
        disabled or merged adapters are PEFT's affair as ever.

        Raises:
            ValueError: the fused forward cannot compute this layer; the message says why.
        """
        module = self.module
        routes: dict[str, Route] = module.__dict__.get("_routes", {})
        if terms is None:
            if routes.pop(self.adapter, None) is not None and not routes:
                del module.__dict__["_routes"]
                if module._borrowed:
                    module.release()
            return
        fused = fused_class(type(module))
        reason = layer_reason(module, fused)
        if reason is None:
            reason = adapter_reason(module, self.adapter, resting=True)
        if reason is not None:
            raise ValueError(
                f"layer {self.name} cannot compute with replaced terms: {reason}; "
                "use a plain LoRA (no variant, no bias) on linear layers"
            )
        if not isinstance(module, FusedForward):
            module.__class__ = fused
            module._borrowed = True
        module.__dict__["_routes"] = {**routes, self.adapter: Route(terms, self, own_operator)}


def adapter_layers(model: nn.Module, adapter: str) -> list[AdapterLayer]:
    """Every layer of ``model`` that has ``adapter``, in the natural order of their names (2 before 10).

    Args:
        model: a PeftModel, a model with injected adapters, or a module that contains one.
        adapter: the adapter's name.

    Raises:
        ValueError: the model has no LoRA layer, or not this adapter, or the adapter trains something else than A and B
            of linear layers (DoRA and other variants, lora_bias, embeddings, convolutions, expert parameters,
            modules_to_save, base biases), which A and B alone would not carry from task to task.
    """
    home = find_home(model, adapter)
    root = model if home is None else home.root
    found = modules_with(root, adapter)
    for name, module in found.items():
        if (reason := _unsupported(module, adapter)) is not None:
            raise ValueError(f"adapter {adapter!r} of layer {name} {reason}")
    for name, extra in root.named_modules():
        if isinstance(extra, AuxiliaryTrainingWrapper) and adapter in extra._adapters:
            raise ValueError(
                f"adapter {adapter!r} also trains {name} (modules_to_save or trainable tokens), which is no LoRA; "
                "leave it out of the LoraConfig"
            )
    if home is not None and home.config.bias != "none":
        raise ValueError(
            f"adapter {adapter!r} also trains biases of the base model (bias={home.config.bias!r}); "
            "use LoraConfig(bias='none')"
        )
    return [AdapterLayer(name, adapter, found[name]) for name in sorted(found, key=_natural)]


def modules_with(root: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """PEFT's layers below ``root`` that have ``adapter``, by name; a ValueError where there are none."""
    layers = {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(NOT_PEFT)
    found = {name: module for name, module in layers.items() if adapter in module._get_available_adapters()}
    if not found:
        known = sorted(set().union(*(module._get_available_adapters() for module in layers.values())))
        raise ValueError(f"the model has no LoRA adapter {adapter!r}; it has {', '.join(map(repr, known)) or 'none'}")
    return found


def _unsupported(module: LoraLayer, adapter: str) -> str | None:
    if adapter in module.lora_embedding_A:
        return "adapts an embedding; list linear layers only in target_modules"
    if isinstance(module, ParamWrapper):
        return "adapts a parameter (target_parameters); list linear layers in target_modules"
    if not isinstance(module.lora_A[adapter], nn.Linear) or not isinstance(module.lora_B[adapter], nn.Linear):
        return f"is a {type(module.lora_A[adapter]).__name__}; list linear layers only in target_modules"
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        return f"is the LoRA variant {variant}; use a LoraConfig without it (for DoRA: use_dora=False)"
    if module.lora_B[adapter].bias is not None:
        return "has a bias beside A and B; use LoraConfig(lora_bias=False)"
    return None


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    values = values.detach().to(parameter, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", name)]
