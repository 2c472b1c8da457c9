"""Models that transformers loads quantised: fused, trained, checkpointed, learnt task after task, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import mbf
from mbf.peft.linear import FusedForward, FusedLinear

from .helpers import TARGETS, base_model, losses, randomise, tokens, took, trained
from .quantised import ABSENT, base_state, loaded, model

KINDS = ["nf4", "int8", "torchao"]
LAYERS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def close(ours: Any, stock: Any) -> None:
    torch.testing.assert_close(ours, stock, rtol=2e-3, atol=2e-4)


def test_a_training_step(kind: str, folder: Path) -> None:
    adapted, ids = model(kind, folder), tokens()
    stock = trained(adapted, ids)
    report = mbf.fuse(adapted, strict=True)
    assert len(report.fused) == LAYERS and report.shared == {} and report.mlps == ()
    with took("fast", LAYERS):
        ours = trained(adapted, ids)
    assert ours.keys() == stock.keys() and len(ours) == 2 + 2 * LAYERS
    close(ours, stock)
    mbf.unfuse(adapted)
    again = trained(adapted, ids)
    assert all(torch.equal(again[name], stock[name]) for name in stock)
    assert not any(isinstance(module, FusedForward) for module in adapted.modules())


def test_ten_steps_of_adamw_leave_the_base_bit_for_bit(kind: str, folder: Path) -> None:
    found, ids = [], tokens()
    for fuse in (False, True):
        adapted = model(kind, folder)
        trained(adapted, ids)  # a first forward may pack the weights in the format's own way
        before = base_state(adapted)
        if fuse:
            mbf.fuse(adapted, strict=True)
        found.append(losses(adapted, ids))
        after = base_state(adapted)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert found[0][-1] < found[0][0]
    close(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(kind: str, use_reentrant: bool, folder: Path) -> None:
    from peft import prepare_model_for_kbit_training

    adapted, ids = model(kind, folder, lora_dropout=0.3), tokens()
    mbf.fuse(adapted, strict=True)
    plain = trained(adapted, ids)
    prepare_model_for_kbit_training(adapted, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with took("fast", 2 * LAYERS):
        checkpointed = trained(adapted, ids)
    close(checkpointed, plain)


def test_saved_and_loaded_onto_another_quantised_base(kind: str, folder: Path, tmp_path: Path) -> None:
    adapted, ids = model(kind, folder).eval(), tokens()
    keys = set(adapted.state_dict())
    mbf.fuse(adapted, strict=True)
    assert set(adapted.state_dict()) == keys
    adapted.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(loaded(kind, folder), tmp_path).eval()
    with torch.no_grad():
        close(adapted(input_ids=ids).logits, other(input_ids=ids).logits)


def test_merge_and_unload_is_peft_s(kind: str, folder: Path) -> None:
    states = []
    for fuse in (False, True):
        adapted = model(kind, folder)
        if fuse:
            mbf.fuse(adapted, strict=True)
        with pytest.warns(UserWarning) if kind != "torchao" else pytest.MonkeyPatch.context():
            states.append(base_state(adapted.merge_and_unload()))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_two_tasks_of_slao(kind: str, folder: Path) -> None:
    found = []
    for fuse in (False, True):
        adapted = model(kind, folder, target_modules=["q_proj", "v_proj"])
        for module in adapted.modules():  # a fresh adapter, as SLAO starts from
            if isinstance(module, LoraLayer):
                nn.init.zeros_(module.lora_B["default"].weight)
        if fuse:
            mbf.fuse(adapted, strict=True)
        before = base_state(adapted)
        learner = mbf.ContinualLora(adapted, method="slao", fuse=False)
        for seed in (1, 2):
            with learner.task(f"task {seed}"):
                torch.manual_seed(seed)
                losses(adapted, tokens())
                ids = tokens()
                with learner.merged_view():
                    view = adapted(input_ids=ids).logits.detach()
        assert torch.isfinite(view).all() and learner.task_index == 2
        assert all(torch.equal(base_state(adapted)[name], value) for name, value in before.items())
        found.append({name: p.detach() for name, p in adapted.named_parameters() if "lora_" in name} | {"view": view})
    close(found[1], found[0])


def test_a_view_of_the_merge_is_what_the_merge_computes(kind: str, folder: Path) -> None:
    """``merged_view`` replaces the terms of stock layers, too, which are PEFT's again after it."""
    adapted, ids = model(kind, folder, target_modules=["q_proj", "v_proj"]), tokens()
    kinds = [type(module) for module in adapted.modules()]
    learner = mbf.ContinualLora(adapted, method="slao", fuse=False)
    with learner.task("first"):
        losses(adapted, ids)
    learner.begin_task("second")
    losses(adapted, ids)
    with torch.no_grad(), learner.merged_view():
        view = adapted(input_ids=ids).logits
    assert [type(module) for module in adapted.modules()] == kinds
    learner.end_task()
    with torch.no_grad():
        close(adapted(input_ids=ids).logits, view)


# -- some layers quantised, others not ---------------------------------------------------------------------------------


def test_plain_members_of_a_group_are_computed_together_and_quantised_ones_alone(groups: list[int]) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason=ABSENT)
    base: Any = base_model(hidden_size=64, intermediate_size=96)
    base.is_loaded_in_4bit = True
    for block in base.model.layers:
        for parent, name in ((block.self_attn, "v_proj"), (block.mlp, "up_proj")):
            plain = getattr(parent, name)
            packed = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
            packed.load_state_dict(plain.state_dict())
            setattr(parent, name, packed.to("cpu"))
    adapted: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomise(adapted)
    ids = tokens()
    stock = trained(adapted, ids)
    report = mbf.fuse(adapted, strict=True)
    assert set(report.shared.values()) == {("q_proj", "k_proj")} and report.mlps == ()
    with took("fast", LAYERS):
        close(trained(adapted, ids), stock)
    assert groups == [2, 2]


# -- GGUF: transformers makes plain layers of it -----------------------------------------------------------------------


def write_gguf(path: Path, model: Any) -> None:
    """A Llama in 8-bit blocks, as llama.cpp names and orders its tensors."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns pairs of neighbours, transformers halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(target, values.astype(np.float32))
        else:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_out_of_a_gguf_file_is_fused_as_any_other(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original, ids = base_model(hidden_size=64, intermediate_size=96, head_dim=16), tokens()
    write_gguf(tmp_path / "tiny.gguf", original)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    difference = (base(input_ids=ids).logits - original(input_ids=ids).logits).abs().max()
    assert 0 < difference < 0.05, "8 bits are near the original, and not the original"
    adapted: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomise(adapted)
    twin = copy.deepcopy(adapted)
    report = mbf.fuse(twin, strict=True)
    assert len(report.fused) == LAYERS and len(report.mlps) == 2 and len(report.shared) == 2
    assert sum(type(module) is FusedLinear for module in twin.modules()) == LAYERS
    torch.testing.assert_close(trained(twin, ids), trained(adapted, ids), rtol=1e-4, atol=1e-5)
