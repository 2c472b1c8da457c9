"""Merging adapters that were trained already, one after another, with no model at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mbf.continual.atomic import whole_directory
from mbf.methods import Factors, Layer, get
from mbf.ops import LoraTerms
from mbf.peft import describe_ranks

_PREFIX = "base_model.model."


class _StoredLayer:
    """A layer known by its stored factors alone."""

    def __init__(self, name: str, A: Tensor, B: Tensor, scale: float) -> None:
        self.name = name
        self.scale = scale
        self.write(A, B)

    def write(self, A: Tensor, B: Tensor) -> None:
        self.A = nn.Parameter(A.clone(), requires_grad=False)
        self.B = nn.Parameter(B.clone(), requires_grad=False)

    def route(self, terms: Callable[[Layer], LoraTerms] | None) -> None:
        """Nothing computes here."""


def merge_adapters(
    adapters: Sequence[str | PathLike[str]], out: str | PathLike[str], method: str = "slao", **options: Any
) -> Path:
    """Merge PEFT LoRA adapters in the order given, as if their tasks had been learnt one after another.

    Every adapter is taken as the fine-tuned LoRA (A_ft, B_ft) of its task. For ``slao`` the result is the last A and
    Σ w_i B_i with the weights of its closed form.

    Args:
        adapters: directories that ``save_pretrained`` wrote; at least one.
        out: directory of the merged adapter, which plain PEFT loads. Replaced if it exists.
        method: a method whose merge needs nothing but the trained adapters.
        **options: the method's options.

    Returns:
        ``out``.

    Raises:
        ValueError: an adapter is missing, not a LoRA, or does not fit the first one (layers, shapes, scale); a method
            that cannot merge offline.
    """
    if not adapters:
        raise ValueError("no adapter to merge; give the directories of one or more PEFT adapters")
    rule = get(method)(**options)
    configs = [_config(Path(path)) for path in adapters]
    loaded = [_layers(Path(path), config) for path, config in zip(adapters, configs, strict=True)]
    layers = loaded[0]
    for path, other in zip(adapters[1:], loaded[1:], strict=True):
        _check_fits(Path(adapters[0]), layers, Path(path), other)
    rule.layers, ranks = layers, [layer.A.shape[0] for layer in layers]
    with torch.no_grad():
        for i, task in enumerate(loaded, start=1):
            rule.merged = rule.current.clone()
            rule.write(Factors([layer.A.data for layer in task], [layer.B.data for layer in task]))
            rule.after_task(i, None)
    _write(Path(out), layers, configs[0], [layer.A.shape[0] for layer in layers] != ranks)
    return Path(out)


def _config(path: Path) -> LoraConfig:
    if not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} is not a PEFT adapter: adapter_config.json is missing; pass what save_pretrained wrote"
        )
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} is a {config.peft_type} adapter; only LoRA adapters can be merged")
    for name in ("use_dora", "lora_bias", "modules_to_save"):
        if getattr(config, name, None):
            raise ValueError(f"{path} was trained with {name}, which no merge rule covers; train without it")
    return config


def _layers(path: Path, config: LoraConfig) -> list[_StoredLayer]:
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{path}: adapter_model.safetensors is missing; save the adapter with safe_serialization=True")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); restore it from a copy") from None
    layers = []
    for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
        A, B = tensors.pop(key), tensors.pop(f"{name}.lora_B.weight", None)
        if B is None or A.ndim != 2 or not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(f"{file}: {name} needs a finite lora_A [r, d_in] and lora_B [d_out, r]; train it anew")
        layers.append(_StoredLayer(name, A, B, _scale(config, name, A.shape[0])))
    if tensors or not layers:
        raise ValueError(
            f"{file} holds {next(iter(tensors), 'nothing')}, which is not a linear layer's lora_A or lora_B"
        )
    return layers


def _scale(config: LoraConfig, name: str, r: int) -> float:
    """s of a layer by PEFT's rule: lora_alpha (or its pattern) over r, or over √r for rslora."""
    module = name.removeprefix(_PREFIX)
    alpha_pattern: dict[str, float] = config.alpha_pattern or {}
    key = get_pattern_key(list(alpha_pattern), module)
    alpha = alpha_pattern.get(key, config.lora_alpha)
    return float(alpha) / (r**0.5 if config.use_rslora else r)


def _check_fits(first: Path, layers: list[_StoredLayer], path: Path, other: list[_StoredLayer]) -> None:
    names, found = {layer.name for layer in layers}, {layer.name for layer in other}
    if names != found:
        raise ValueError(
            f"{path} and {first} adapt different layers, e.g. {min(names ^ found)}; train them with one config"
        )
    for a, b in zip(layers, other, strict=True):
        if a.A.shape != b.A.shape or a.B.shape != b.B.shape:
            raise ValueError(
                f"{path}: {b.name} has A {list(b.A.shape)}, B {list(b.B.shape)}; {first} has {list(a.A.shape)}, "
                f"{list(a.B.shape)}; train both with one rank on one model"
            )
        if abs(a.scale - b.scale) > 1e-6 * abs(a.scale):
            raise ValueError(
                f"{path}: {b.name} has scale {b.scale}, {first} {a.scale}; train both with one lora_alpha / r"
            )


def _write(out: Path, layers: list[_StoredLayer], config: LoraConfig, changed: bool) -> None:
    if changed:
        ranks = {layer: layer.A.shape[0] for layer in layers}
        pairs = {
            layer.name.removeprefix(_PREFIX): (r, layer.scale * (r**0.5 if config.use_rslora else r))
            for layer, r in ranks.items()
        }
        for field, value in describe_ranks(pairs).items():
            setattr(config, field, value)
    config.inference_mode = True
    with whole_directory(out) as temporary:
        tensors = {}
        for layer in layers:
            tensors[f"{layer.name}.lora_A.weight"] = layer.A.data.contiguous()
            tensors[f"{layer.name}.lora_B.weight"] = layer.B.data.contiguous()
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
