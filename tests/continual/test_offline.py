"""Merging trained adapters without a model gives what the learner's merge of the same LoRAs gives."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mbf.continual import merge_adapters
from tests.continual.tiny import base_model, logits, peft_model, train


def trained(tmp_path, n, **config):
    paths = []
    for i in range(1, n + 1):
        torch.manual_seed(i)
        model = peft_model(**config)
        train(model, i)
        model.save_pretrained(tmp_path / f"a{i}")
        paths.append(tmp_path / f"a{i}")
    return paths


def tensors(path):
    return load_file(path / "adapter_model.safetensors")


def test_slao_is_its_closed_form(tmp_path):
    paths = trained(tmp_path, 4)
    out = merge_adapters(paths, tmp_path / "out")
    merged, inputs = tensors(out), [tensors(p) for p in paths]
    w = [i**-0.5 * math.prod(1 - j**-0.5 for j in range(i + 1, 5)) for i in range(1, 5)]
    for key, value in merged.items():
        expected = inputs[-1][key] if "lora_A" in key else sum(c * t[key] for c, t in zip(w, inputs, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert set(merged) == set(inputs[0])
    plain = PeftModel.from_pretrained(base_model(), out)
    assert (logits(plain) - logits(base_model())).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 4}}]
)
def test_inclora_is_the_sum_of_the_functions(config, tmp_path):
    paths = trained(tmp_path, 3, **config)
    out = merge_adapters(paths, tmp_path / "out", "inclora")
    summed = sum(delta_weights(p) for p in paths)
    torch.testing.assert_close(delta_weights(out), summed, rtol=1e-5, atol=1e-6)


def delta_weights(path):
    model = PeftModel.from_pretrained(base_model(), path)
    layers = [m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))]
    return torch.cat([m.get_delta_weight("default").flatten() for m in layers])


def test_delta_magmax_needs_no_origin_and_factor_magmax_says_so(tmp_path):
    paths = trained(tmp_path, 2)
    merge_adapters(paths, tmp_path / "out", "magmax", space="delta")
    with pytest.raises(ValueError, match="space='delta'"):
        merge_adapters(paths, tmp_path / "other", "magmax")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", "adapter_config.json is missing"),
        ("other rank", "train both with one rank"),
        ("other alpha", "has scale 4.0"),
        ("other layers", "adapt different layers"),
        ("dora", "trained with use_dora"),
        ("nan", "finite lora_A"),
        ("truncated", "is damaged"),
        ("not lora", "only LoRA adapters"),
    ],
)
def test_adapters_that_do_not_fit_are_named_and_nothing_is_written(spoil, message, tmp_path):
    (good,) = trained(tmp_path, 1)
    bad = tmp_path / "bad"
    configs = {
        "other rank": {"r": 8, "lora_alpha": 16},
        "other alpha": {"lora_alpha": 16},
        "other layers": {"target_modules": ["q_proj"]},
        "dora": {"use_dora": True},
    }
    if spoil != "missing":
        peft_model(**configs.get(spoil, {})).save_pretrained(bad)
    file = bad / "adapter_model.safetensors"
    if spoil == "nan":
        values = load_file(file)
        next(iter(values.values()))[0, 0] = float("nan")
        save_file(values, file)
    if spoil == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    if spoil == "not lora":
        (bad / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=message):
        merge_adapters([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()
