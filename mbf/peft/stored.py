"""Reading an adapter in PEFT's own files, with everything checked before anything uses it.

What is checked of parsed content alone (``check_config``, ``check_factors``) touches no disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load
from torch import Tensor

from mbf.peft.patterns import AS_PEFT_MATCHES, steps_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST = 1 << 31
_LONGEST_PATTERN, _LONGEST_NAME, _USUAL_NAME = 1000, 200, 128
# Of matching as PEFT does: the first, of a name of usual length, takes below a second; the second, of all names in
# a file, about a minute.
_MOST_STEPS, _MOST_STEPS_OF_ALL = 100_000_000, 10_000_000_000
# What trains or computes more than A and B of linear layers.
_BEYOND = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


def read_config(directory: Path) -> LoraConfig:
    """The configuration of the adapter in ``directory``.

    Raises:
        ValueError: it is missing, broken, or of no plain LoRA.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is not a PEFT adapter: {CONFIG} is missing; pass what save_pretrained wrote")
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); restore it from a copy") from None
    return check_config(data, path)


def check_config(data: Any, path: Path) -> LoraConfig:
    """What ``adapter_config.json``, at ``path``, says of a plain LoRA.

    Raises:
        ValueError: it is none, a value that decides what the adapter computes is not of its type, or a pattern of
            layers may take long to match.
    """
    if not isinstance(data, dict) or "peft_type" not in data:
        raise ValueError(f"{path}: found no peft_type, wanted the configuration of a PEFT adapter; restore it")
    if data["peft_type"] != "LORA":
        raise ValueError(
            f"{path.parent} is a {data['peft_type']} adapter; only LoRA adapters can be merged or learn on"
        )
    for name in _BEYOND:
        if data.get(name):
            raise ValueError(f"{path.parent} was trained with {name}, which no merge rule covers; train without it")
    wanted = {
        "r": ("a whole number above 0", _is_rank),
        "lora_alpha": ("a number", _is_number),
        "lora_dropout": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
        "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
        "fan_in_fan_out": ("true or false", lambda value: isinstance(value, bool)),
        "rank_pattern": ("ranks by pattern of layers", lambda value: _are_by_pattern(value, _is_rank)),
        "alpha_pattern": ("numbers by pattern of layers", lambda value: _are_by_pattern(value, _is_number)),
        "target_modules": ("names of modules", _are_names),
        "exclude_modules": ("names of modules", _are_names),
        "layers_pattern": ("names of modules", _are_names),
        "bias": ("'none'", lambda value: value == "none"),
    }
    for name, (kind, fits) in wanted.items():
        if name in data and not fits(data[name]):
            raise ValueError(f"{path}: {name} is {_short(data[name])}, wanted {kind}; restore it from a copy")
    for name in AS_PEFT_MATCHES:
        _check_patterns(name, _patterns(name, data.get(name)), path)
    try:
        config = LoraConfig.from_peft_type(**data)
    except Exception as error:  # whatever PEFT trips over in a field that is not looked at here
        raise ValueError(f"{path} is no configuration that PEFT takes ({_first_line(error)}); restore it") from None
    assert isinstance(config, LoraConfig)
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory: those of ``load_file`` stay mapped to a file that others may cut
    off, and 64 bytes of each are never freed (safetensors 0.8).

    Raises:
        ValueError: it is missing, cannot be read, or is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it from a copy")
    try:
        tensors = load(path.read_bytes())
        return {name: tensors.pop(name).clone() for name in list(tensors)}
    except Exception as error:  # of Rust and of torch, by what the header says: their classes are not documented
        raise ValueError(f"{path} is damaged ({_first_line(error)}); restore it from a copy") from None


def check_factors(tensors: Mapping[str, Tensor], config: LoraConfig, file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, d_in], B [d_out, r]) by layer, sorted by name, where ``tensors`` are those of an adapter of ``config``.

    Raises:
        ValueError: a tensor is none of lora_A and lora_B, lacks its partner, does not fit it, has another rank than
            the configuration says, is of no floating dtype that torch computes with, or is not finite; or names are
            too long, or too many for the configuration's patterns.
    """
    _check_names([key for key in tensors if key.endswith(".lora_A.weight")], config, file)
    rest, layers = dict(tensors), {}
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
        A, B = rest.pop(key), rest.pop(f"{name}.lora_B.weight", None)
        if B is None or not _fit(A, B):
            found = "no lora_B" if B is None else f"{_kind(A)} and {_kind(B)}"
            raise ValueError(
                f"{file}: {name} needs a finite lora_A [r, d_in] and lora_B [d_out, r] of one floating dtype, found "
                f"{found}; restore it from a copy, or train it anew"
            )
        r = rank_of(config, name)
        if A.shape[0] != r:
            raise ValueError(
                f"{file}: {name} has rank {A.shape[0]}, {CONFIG} says {r}; put the files of one adapter together"
            )
        layers[name] = A, B
    if rest or not layers:
        raise ValueError(
            f"{file} holds {next(iter(rest), 'nothing')}, which is not a linear layer's lora_A or lora_B; only LoRAs "
            "of linear layers can be merged or learn on"
        )
    return layers


def rank_of(config: LoraConfig, name: str) -> int:
    """r of the layer stored under ``name``, by PEFT's rule: the configuration's, or that of the pattern it fits."""
    patterns: dict[str, int] = config.rank_pattern or {}
    rank: int = patterns.get(get_pattern_key(list(patterns), name.removeprefix(PREFIX)), config.r)
    return rank


def scale_of(config: LoraConfig, name: str, r: int) -> float:
    """s of the layer stored under ``name``, by PEFT's rule: lora_alpha (or its pattern's) over r, or √r for rslora."""
    patterns: dict[str, float] = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name.removeprefix(PREFIX)), config.lora_alpha)
    return float(alpha) / (r**0.5 if config.use_rslora else r)


def _fit(A: Tensor, B: Tensor) -> bool:
    return (
        A.ndim == B.ndim == 2
        and A.shape[0] == B.shape[1] > 0
        and A.dtype == B.dtype
        and A.dtype in _DTYPES
        and bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    )


def _kind(tensor: Tensor) -> str:
    finite = "" if tensor.dtype not in _DTYPES or bool(torch.isfinite(tensor).all()) else " with inf or NaN"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{finite}"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def _are_by_pattern(value: Any, fits: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _are_names(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(n, str) for n in value))
    )


def _patterns(name: str, value: Any) -> list[str]:
    """What of field ``name`` is a regular expression: lists of modules are compared as they are, but layers_pattern."""
    if isinstance(value, str):
        return [value]
    return list(value or ()) if name in ("rank_pattern", "alpha_pattern", "layers_pattern") else []


def _check_patterns(name: str, patterns: list[str], path: Path) -> None:
    total = 0.0
    for pattern in patterns:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(
                f"{path}: {name} has {_short(pattern)}, of {len(pattern)} characters, wanted a pattern of at most "
                f"{_LONGEST_PATTERN}; write it as several patterns"
            )
        try:
            re.compile(AS_PEFT_MATCHES[name].format(pattern))
            steps = steps_of(name, pattern, _USUAL_NAME)
        except (re.error, OverflowError, RecursionError):
            raise ValueError(
                f"{path}: {name} has {_short(pattern)}, wanted a regular expression; restore it from a copy"
            ) from None
        total += steps
        if total > _MOST_STEPS:
            found, way = f"{_short(pattern)}, which", "write it with fewer of *, +, ? and |"
            if steps <= _MOST_STEPS:
                found, way = f"{len(patterns)} patterns, which", "write fewer, with fewer of *, +, ? and |"
            raise ValueError(
                f"{path}: {name} has {found} may take {_count(total)} steps to match a name of {_USUAL_NAME} "
                f"characters, wanted at most {_count(_MOST_STEPS)}; {way}"
            )


def _check_names(keys: Iterable[str], config: LoraConfig, file: Path) -> None:
    names = [key.removesuffix(".lora_A.weight").removeprefix(PREFIX) for key in keys]
    longest = max(names, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise ValueError(
            f"{file} holds {_short(longest)}, a name of {len(longest)} characters, wanted at most {_LONGEST_NAME}; "
            "restore it from a copy, or give the layers shorter names"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = _patterns(field, getattr(config, field))
        steps = len(names) * sum(steps_of(field, pattern, len(longest)) for pattern in patterns)
        if steps > _MOST_STEPS_OF_ALL:
            raise ValueError(
                f"{file} holds {len(names)} layers, whose names may take {_count(steps)} steps to match the "
                f"{len(patterns)} patterns of {field} in {CONFIG}, wanted at most {_count(_MOST_STEPS_OF_ALL)}; write "
                "them with fewer of *, +, ? and |"
            )


def _count(steps: float) -> str:
    return "countless" if steps == float("inf") else f"{steps:,.0f}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
