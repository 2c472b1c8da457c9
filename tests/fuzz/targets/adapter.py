"""``adapter_config.json`` and ``adapter_model.safetensors``, as ``mbf merge`` and ``ContinualLora.load`` read them.

The first byte says which: even, the configuration (``_json.document``); odd, the bytes of the tensors
(``_json.tensors_file``). What is accepted has ranks and scales that can be computed with; what is refused says where.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save

from mbf.peft.stored import CONFIG, WEIGHTS, check_config, check_factors, rank_of, read_tensors, scale_of
from tests.fuzz.targets._files import written
from tests.fuzz.targets._json import document, tensors_file

PATH = Path("/adapter") / CONFIG
LAYER = "base_model.model.model.layers.0.q_proj"
SLOW_NAMES = ("a" * 40, "." * 40)


@cache
def good() -> dict[str, object]:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], rank_pattern={"v": 2}, alpha_pattern={"v": 3})
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def tensors() -> bytes:
    return save({f"{LAYER}.lora_A.weight": torch.ones(2, 4), f"{LAYER}.lora_B.weight": torch.zeros(3, 2)})


def with_pattern(pattern: str) -> bytes:
    return json.dumps({**good(), "rank_pattern": {pattern: 2}, "exclude_modules": pattern}).encode()


def seeds() -> list[bytes]:
    return [
        b"\x00" + json.dumps(good()).encode(),
        *(b"\x00" + with_pattern(pattern) for pattern in ("(a+)+b", "(a|a)*b", ".*.*.*b", r"layers\.\d+\..*", "a{9}?")),
        b"\x80",
        b"\x80abcdef",
        b"\x01\x00" + tensors(),
        b"\x01\x80",
        b"\x01\x80abcdef",
    ]


def one(data: bytes) -> None:
    if not data:
        return
    if data[0] % 2:
        _tensors(data[1:])
    else:
        _config(data)


def _config(data: bytes) -> None:
    try:
        parsed = document(data, good())
    except (ValueError, RecursionError):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of keys that it does not know
            config = check_config(parsed, PATH)
    except ValueError as error:
        assert str(PATH.parent) in str(error)
        return
    r = rank_of(config, LAYER)
    assert isinstance(r, int) and r > 0
    assert math.isfinite(scale_of(config, LAYER, r))
    begun = time.process_time()
    for name in SLOW_NAMES:
        rank_of(config, name)
    assert time.process_time() - begun < 2


def _tensors(data: bytes) -> None:
    file = written(tensors_file(data, tensors()), WEIGHTS)
    try:
        factors = check_factors(read_tensors(file), LoraConfig(r=2, lora_alpha=4), file)
    except ValueError as error:
        assert str(file) in str(error)
        return
    for A, B in factors.values():
        assert A.shape[0] == B.shape[1] == 2 and A.is_floating_point() and A.dtype == B.dtype
        assert torch.isfinite(A).all() and torch.isfinite(B).all()
