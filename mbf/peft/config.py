"""The adapter's ``LoraConfig`` follows the ranks of its layers, so that what is saved loads to the same function."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import nn

_RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_INITIAL = "_mbf_initial"


class Home(NamedTuple):
    """The module from which PEFT counts the names of an adapter's layers, and the adapter's configuration."""

    root: nn.Module
    config: LoraConfig


def check_module(model: nn.Module) -> None:
    """Raise TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; pass a PeftModel or another torch.nn.Module")


def find_home(model: nn.Module, adapter: str) -> Home | None:
    """Where ``adapter`` was injected: inside a PeftModel, a LoraModel, or a model given to inject_adapter_in_model.

    None for layers that no configuration describes. TypeError where the two are no module and no name.
    """
    check_module(model)
    if not isinstance(adapter, str):
        raise TypeError(f"adapter: got {type(adapter).__name__}; pass the adapter's name")
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, dict) or adapter not in configs:
            continue
        if isinstance(module, BaseTuner):
            return Home(module.model, configs[adapter])
        if not isinstance(getattr(module, "base_model", None), BaseTuner):
            return Home(module, configs[adapter])
    return None


def alpha_at_rank(layer: LoraLayer, adapter: str, rank: int) -> float:
    """The alpha that gives ``rank`` the s which the layer's configured (r, alpha) gives: s = alpha/r, or alpha/√r for
    rslora."""
    ratio = rank / layer.r[adapter]
    alpha = layer.lora_alpha[adapter] * (math.sqrt(ratio) if layer.use_rslora.get(adapter, False) else ratio)
    # Going to a rank and back must end at the alpha it started from, which √ misses by a rounding.
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def sync_config(model: nn.Module, adapter: str) -> None:
    """Make ``peft_config[adapter]`` describe the layers as they are, after ``AdapterLayer.write`` changed ranks.

    ``r`` and ``lora_alpha`` become the most frequent pair; layers that differ are named in ``rank_pattern`` and
    ``alpha_pattern``. A configuration that fits already is left alone, and the one that the adapter came with is put
    back as soon as it fits again. s of every layer as PEFT computes it on loading is s as configured now.
    """
    home = find_home(model, adapter)
    if home is None:
        return
    config = home.config
    pairs = {
        name: _pair(layer, adapter)
        for name, layer in home.root.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }
    current = {key: copy.copy(getattr(config, key)) for key in _RANK_FIELDS}
    initial = config.__dict__.setdefault(_INITIAL, current)
    for fields in (current, initial, describe_ranks(pairs)):
        if all(_fits(fields, name, pair) for name, pair in pairs.items()):
            break
    for key, value in fields.items():
        setattr(config, key, copy.copy(value))


def _pair(layer: LoraLayer, adapter: str) -> tuple[int, float]:
    # The weight decides: A and B padded for hot-swapping have more rows than r says, and are saved as they are.
    weights: Any = layer.lora_A[adapter]
    rank = weights.weight.shape[0]
    return rank, alpha_at_rank(layer, adapter, rank)


def _fits(fields: dict[str, Any], name: str, pair: tuple[int, float]) -> bool:
    """Whether PEFT reads ``pair`` for the layer ``name`` from ``fields``."""
    ranks: dict[str, int] = fields["rank_pattern"] or {}
    alphas: dict[str, float] = fields["alpha_pattern"] or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), fields["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), name), fields["lora_alpha"])
    return rank == pair[0] and math.isclose(alpha, pair[1], rel_tol=1e-12)


def describe_ranks(pairs: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """The fields of a LoraConfig (r, lora_alpha and their patterns) that give every named layer its (rank, alpha).

    Raises:
        ValueError: there is no layer.
    """
    if not pairs:
        raise ValueError("pairs: is empty; give the (rank, alpha) of one layer or more")
    (r, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    # PEFT matches patterns against the end of a name; the caret makes a pattern the whole name.
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": pair[0] for name, pair in pairs.items() if pair[0] != r},
        "alpha_pattern": {f"^{re.escape(name)}": pair[1] for name, pair in pairs.items() if pair[1] != alpha},
    }
