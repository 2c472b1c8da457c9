"""``FusedForward`` and ``FusedLinear``: PEFT's LoRA layers with the forward computed by ``mbf.ops``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from mbf.ops import BranchTerms, GroupLayer, LoraTerms, lora_linear
from mbf.peft.eligibility import _watched, call_reason
from mbf.peft.frozen import plain_linear, trains
from mbf.peft.groups import shared_output

calls: Counter[str] = Counter(fast=0, slow=0)
"""Forwards of fused layers in this process, by who computed them: ``fast`` the fused operator, ``slow`` PEFT.
Forwards inside a compiled graph are not counted."""


class Route(NamedTuple):
    """Terms that replace an adapter's own (A, B, s) in every forward: ``terms(layer)``.

    ``own_operator``: they have no ``lora()``, so no operator computes them together with the base product.
    """

    terms: Callable[[Any], BranchTerms]
    layer: Any
    own_operator: bool = False


class FusedForward(nn.Module):
    """Mixed in before one of PEFT's LoRA layers of linear layers: ``base(x) + Σ s (drop(x) Aᵀ) Bᵀ`` by operators.

    ``fuse`` sets the class of a built layer to a class with this one in front of PEFT's and ``unfuse`` sets it back, so
    state-dict keys, ``isinstance`` and saved files are those of PEFT. Nothing is cached: base layer, A, B, scaling and
    dropout are looked up on each call, and any state that the fused forward does not compute as PEFT would is handed to
    PEFT's forward. Several active adapters are fused, each with a dropout mask of its own.

    Copies and pickles carry the class, but not the routes of ``AdapterLayer.route``.

    Attributes:
        peft_class: the class of PEFT that this one is mixed in before.
    """

    peft_class: ClassVar[type[LoraLayer]]

    scaling: dict[str, float | Tensor]
    merged_adapters: list[str]
    _active_adapter: str | list[str]
    _disable_adapters: bool
    _borrowed = False  # a stock layer that is of this class only while it is routed
    # An attribute, and not an entry of __dict__ that may be missing: torch.compile guards what it found only there.
    _routes: Mapping[str, Route] = MappingProxyType({})

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the forward of ``peft_class``: x [..., d_in] to [..., d_out] in the dtype that this gives.

        Raises:
            RuntimeError: an adapter is routed and the call cannot be fused, so the route could not be honoured.
        """
        if not isinstance(self, FusedForward):  # released since somebody, a hook say, took this bound method
            return type(self).forward(self, x, *args, **kwargs)
        active = self._computing()
        routes = self._routes
        routed = bool(routes) and any(adapter in routes for adapter in active)
        if not active or (self._borrowed and not routed):
            return self._stock(x, *args, **kwargs)
        if args or kwargs:
            reason: str | None = f"its forward was given {', '.join(sorted(kwargs)) or 'positional arguments'}"
        else:
            reason = call_reason(self, x, active)
        if reason is None:
            return self._fused(x, active, routes)
        if routed:
            names = ", ".join(route.layer.name for adapter, route in routes.items() if adapter in active)
            raise RuntimeError(
                f"layer {names} computes with replaced terms, which needs the fused forward, but {reason}; call it "
                "as the fused layer takes it"
            )
        return self._stock(x, *args, **kwargs)

    def sole_adapter(self, x: Tensor) -> str | None:
        """The adapter with which a call with x is one ``lora_linear`` of a frozen base, and free to be made elsewhere.

        None for everything else: several adapters or none, hooks on the layer, a base that trains or is no plain linear
        layer, and what PEFT's own forward must compute.
        """
        active = self._computing()
        if len(active) != 1 or _watched(self) or call_reason(self, x, active) is not None:
            return None
        route = self._routes.get(active[0])
        if route.own_operator if route is not None else self._borrowed:
            return None
        base: Any = self._modules["base_layer"]
        return active[0] if plain_linear(base, x) and not trains(base) else None

    def group_layer(self, adapter: str) -> GroupLayer:
        """What that call computes with."""
        base: Any = self._modules["base_layer"]
        terms: Any = self._terms(adapter, self._routes)
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        return GroupLayer(weight, terms.lora(), bias, self._dropout_p(adapter))

    def sources(self, adapter: str) -> tuple[Any, ...]:
        """What ``group_layer`` reads; of replaced terms the route, as the terms may be new tensors in each call."""
        base: Any = self._modules["base_layer"]
        modules: Any = self._modules
        return (
            adapter,
            base._parameters["weight"],
            base._parameters["bias"],
            modules["lora_A"]._modules[adapter]._parameters["weight"],
            modules["lora_B"]._modules[adapter]._parameters["weight"],
            self.scaling[adapter],
            self._dropout_p(adapter),
            self._routes.get(adapter),
        )

    def release(self) -> None:
        """Be PEFT's own layer again: at once or, while an adapter is routed, when the last route ends."""
        if "_routes" in self.__dict__:
            self._borrowed = True
        else:
            self.__dict__.pop("_borrowed", None)
            self.__class__ = self.peft_class  # type: ignore[assignment]

    def _computing(self) -> list[str]:
        """The adapters that add to the base output now; none while disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        installed: Any = self._modules["lora_A"]._modules  # type: ignore[union-attr]
        active = self._active_adapter  # what the property active_adapters wraps twice
        if isinstance(active, str):
            return [active] if active in installed else []
        return [adapter for adapter in active if adapter in installed]

    def _stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A compiled graph would guard on the value of the counter and be compiled again on every call.
        if not torch.compiler.is_compiling():
            calls["slow"] += 1
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor, active: list[str], routes: Mapping[str, Route]) -> Tensor:
        if not torch.compiler.is_compiling():
            calls["fast"] += 1
            if (shared := shared_output(self, x)) is not None:
                return shared
        base: Any = self._modules["base_layer"]
        first, *rest = active
        route = routes.get(first)
        if plain_linear(base, x) and (route is None or not route.own_operator):
            parameters = base._parameters
            terms: Any = self._terms(first, routes)
            A, B, scale, gate, mix, merged_B, merge_weight = terms.lora()
            y = lora_linear(
                x,
                parameters["weight"],
                A,
                B,
                parameters["bias"],
                scale=scale,
                gate=gate,
                mix=mix,
                dropout_p=self._dropout_p(first),
                merged_B=merged_B,
                merge_weight=merge_weight,
            )
        else:
            y, rest = self._base_output(x), active
        for adapter in rest:
            y = self._terms(adapter, routes).accumulate(y, x, self._dropout_p(adapter))
        return y

    def _base_output(self, x: Tensor) -> Tensor:
        """What the base layer, run as it is, gives for x."""
        base: Any = self._modules["base_layer"]
        return base(x)

    def _terms(self, adapter: str, routes: Mapping[str, Route]) -> BranchTerms:
        if adapter in routes:
            route = routes[adapter]
            return route.terms(route.layer)
        modules: Any = self._modules
        return LoraTerms(
            modules["lora_A"]._modules[adapter]._parameters["weight"],
            modules["lora_B"]._modules[adapter]._parameters["weight"],
            self.scaling[adapter],
        )

    def _dropout_p(self, adapter: str) -> float:
        modules: Any = self._modules
        dropout = modules["lora_dropout"]._modules[adapter]
        return dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0

    def _get_name(self) -> str:
        return self.peft_class.__name__  # printed models keep PEFT's lora.Linear

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_routes", None)
        return state


class FusedLinear(FusedForward, Linear):
    """PEFT's ``lora.Linear``: ``y = x Wᵀ + b + Σ s (drop(x) Aᵀ) Bᵀ``, with one adapter by one operator."""

    peft_class = Linear
