"""fuse, unfuse and fused: what is swapped, what is reported, and that nothing else of PEFT changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import mbf.peft
from mbf.peft import FusedLinear, FuseReport, fuse, fused, unfuse

from .helpers import TARGETS, base_model, copies, llama, losses, randomise, tokens, took


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, Linear)]


class OwnForward(Linear):
    """Stands in for the LoRA classes over quantised layers, which need packages of their own."""


class Mixed(nn.Module):
    """One layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.embedding = nn.Embedding(8, 8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def mixed(**options: Any) -> PeftModel:
    targets = ["linear", "other", "embedding", "convolution", "attention"]
    model = get_peft_model(Mixed(), LoraConfig(**({"r": 2, "target_modules": targets} | options)))
    model.base_model.model.other.__class__ = OwnForward
    return model


# -- what is swapped and said ------------------------------------------------------------------------------------------


def test_every_linear_of_a_llama() -> None:
    model, ids = llama(), tokens()
    stock = model(input_ids=ids).logits
    report = fuse(model, strict=True)
    assert len(report.fused) == 14 and report.declined == {}
    assert report.fused[0] == "base_model.model.model.layers.0.self_attn.q_proj"
    assert set(kinds(model)) == {FusedLinear}
    assert str(report).splitlines()[0] == "14 of 14 LoRA layers fused"
    with took("fast", 14):
        torch.testing.assert_close(model(input_ids=ids).logits, stock)


def test_other_kinds_are_left_with_a_reason() -> None:
    model = mixed()
    report = fuse(model)
    assert report.fused == ("base_model.model.linear",)
    reasons = {name.removeprefix("base_model.model."): reason for name, reason in report.declined.items()}
    assert reasons.keys() == {"other", "embedding", "convolution", "attention", "attention.base_layer.out_proj"}
    assert "OwnForward" in reasons["other"] and "forward of its own" in reasons["other"]
    assert "lora.layer.Embedding" in reasons["embedding"]
    assert "merges it" in reasons["attention.base_layer.out_proj"]
    assert kinds(model).count(FusedLinear) == 1
    assert "1 of 6 LoRA layers fused" in str(report)


def test_report_groups_layers_by_reason() -> None:
    report = FuseReport(("a",), {**{f"b{n}": "DoRA" for n in range(5)}, "c": "hooks"})
    assert str(report).splitlines() == [
        "1 of 7 LoRA layers fused",
        "  5 left to PEFT: DoRA (b0, b1, b2 and 2 more)",
        "  1 left to PEFT: hooks (c)",
    ]


def test_strict_raises_and_changes_nothing() -> None:
    model = mixed()
    before = kinds(model)
    with pytest.raises(ValueError, match=r"1 of 6[\s\S]*OwnForward[\s\S]*nothing was changed"):
        fuse(model, strict=True)
    assert kinds(model) == before


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_a_layer_none_of_whose_adapters_can_be_fused_is_declined(options: dict[str, Any]) -> None:
    model = llama(**options)
    report = fuse(model)
    assert report.fused == () and len(report.declined) == 14
    assert "'default'" in next(iter(report.declined.values()))
    assert set(kinds(model)) == {Linear}


def test_replaced_forward_is_declined() -> None:
    """accelerate's device hooks bind the class's forward on the instance: a swapped class would not be called."""
    model = llama()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    report = fuse(model)
    assert list(report.declined) == ["base_model.model.model.layers.0.self_attn.q_proj"]
    assert "instance" in str(report)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_a_model_without_lora_is_told_how(model: nn.Module) -> None:
    for call in (fuse, lambda m: fused(m).__enter__()):
        with pytest.raises(ValueError, match="get_peft_model"):
            call(model)


def test_fuse_twice_and_undo() -> None:
    model = llama()
    assert fuse(model) == fuse(model)
    unfuse(model)
    assert set(kinds(model)) == {Linear}
    unfuse(model)


def test_a_later_layer_of_injected_adapters_is_fused_by_a_second_call() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base_model())
    assert len(fuse(model).fused) == 2
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), model, adapter_name="second")
    assert kinds(model).count(Linear) == 2
    assert len(fuse(model).fused) == 4


def test_context_restores_exactly_what_it_swapped() -> None:
    model = llama()
    first = model.base_model.model.model.layers[0]
    fuse(first)
    before = kinds(model)
    assert set(before) == {Linear, FusedLinear}
    with fused(model) as report:
        assert len(report.fused) == 14 and set(kinds(model)) == {FusedLinear}
    assert kinds(model) == before
    with pytest.raises(KeyError), fused(model):
        raise KeyError
    assert kinds(model) == before


def test_context_within_a_fused_model_leaves_it_as_it_was() -> None:
    model, ids = llama(), tokens()
    fuse(model)
    before = [type(module) for module in model.modules()]
    stock = model(input_ids=ids).logits
    for inside in (lambda: None, lambda: unfuse(model)):
        with fused(model, memory="low"):
            inside()
        assert [type(module) for module in model.modules()] == before
        with took("fast", 14):
            torch.testing.assert_close(model(input_ids=ids).logits, stock)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))  # which groups anew
    assert not any(module.__dict__.get("_recompute", False) for module in model.modules())


def test_context_around_a_merge_leaves_no_class_in_the_base() -> None:
    model = llama()
    fuse(model)
    with fused(model):
        base = model.merge_and_unload()
    assert not any("mixin" in vars(type(m)) or type(m).__module__.startswith("mbf") for m in base.modules())


def test_a_merge_that_raises_leaves_the_model_fused() -> None:
    model, ids = llama(), tokens()
    fuse(model)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] = torch.nan
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in model.modules()] == before
    with took("fast", 14):
        model(input_ids=ids)


# -- everything else stays PEFT's --------------------------------------------------------------------------------------


def test_printed_as_peft_prints() -> None:
    model = llama()
    before = repr(model)
    fuse(model)
    assert repr(model) == before and "lora.Linear(" in before


def test_state_dict_and_saved_files(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "stock")
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "fused")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_copies_are_fused_and_independent() -> None:
    model, ids = llama(), tokens()
    fuse(model)
    logits = model(input_ids=ids).logits
    for twin in copies(model):
        assert set(kinds(twin)) == {FusedLinear}
        with took("fast", 14):
            assert torch.equal(twin(input_ids=ids).logits, logits)
        randomise(twin)
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert not torch.allclose(twin(input_ids=ids).logits, logits)


def test_merge_and_unload() -> None:
    model, ids = llama(), tokens()
    logits = model(input_ids=ids).logits
    fuse(model)
    model.merge_adapter()
    with took("slow", 14):
        torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert not kinds(plain)
    torch.testing.assert_close(plain(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_unload_gives_the_base_back() -> None:
    base = base_model()
    ids = tokens()
    logits = base(input_ids=ids).logits
    model = llama()
    fuse(model)
    torch.testing.assert_close(model.unload()(input_ids=ids).logits, logits)


def test_adapters_come_and_go_after_fuse() -> None:
    model, ids = llama(), tokens()
    fuse(model)
    first = model(input_ids=ids).logits
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    randomise(model.base_model.model.model.layers[1])
    model.set_adapter("second")
    twin = copy.deepcopy(model)
    unfuse(twin)
    torch.testing.assert_close(model(input_ids=ids).logits, twin(input_ids=ids).logits)
    model.delete_adapter("second")
    model.set_adapter("default")
    twin.delete_adapter("second")
    twin.set_adapter("default")
    with took("fast", 14):
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, twin(input_ids=ids).logits)
    assert not torch.allclose(logits, first)


def test_weighted_adapter_and_disable_adapter() -> None:
    model, ids = llama(), tokens()
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomise(model)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "sum", combination_type="linear")
    model.set_adapter("sum")
    expected = model(input_ids=ids).logits
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    fuse(model)
    with took("fast", 14):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    with model.disable_adapter(), took("slow", 14):
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_mixed_batch_of_a_model() -> None:
    model, ids = llama(), tokens(3)
    model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS))
    randomise(model)
    model.eval()
    names = ["second", "default", "__base__"]
    expected = model(input_ids=ids, adapter_names=names).logits
    fuse(model)
    with took("slow", 14):
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, expected)


def test_generate() -> None:
    model, ids = llama(), tokens()
    model.eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **settings)
    fuse(model)
    with took("fast"):
        assert torch.equal(model.generate(input_ids=ids, **settings), expected)


def test_hotswap_of_another_rank(tmp_path: Path) -> None:
    other, ids = llama(r=6, lora_alpha=3), tokens()
    other.save_pretrained(tmp_path)
    expected = other(input_ids=ids).logits
    model = llama(r=4)
    fuse(model)
    before = model(input_ids=ids).logits
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    with took("fast", 14):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected)


def test_training_stays_the_same() -> None:
    """Ten steps of AdamW without dropout: the fused model learns what the stock one learns."""
    ids, ends = tokens(4, 9), []
    for swap in (False, True):
        model = llama()
        torch.manual_seed(11)
        randomise(model)
        if swap:
            fuse(model, strict=True)
        ends.append(losses(model, ids))
    assert ends[0][-1] < ends[0][0]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_counters_are_public() -> None:
    assert mbf.peft.calls.keys() == {"fast", "slow"}
