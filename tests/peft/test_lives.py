"""What happens to adapters in their lives: added, trained, swapped, weighed, merged, saved and loaded, fused or not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import mbf
from mbf.peft import FusedLinear
from mbf.peft.frozen import FrozenLinear

from .helpers import TARGETS, base_model, copies, llama, losses, randomise, tokens, took, trained


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}." in name}


def of_mbf(model: nn.Module) -> set[str]:
    """The classes of mbf in the model."""
    return {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("mbf")} | {
        type(module).__name__ for module in model.modules() if "mixin" in type(module).__dict__
    }


def stock_and_fused(**options: Any) -> tuple[PeftModel, PeftModel]:
    """The same model twice, the second one fused."""
    stock = llama(**options)
    twin = copy.deepcopy(stock)
    mbf.fuse(twin, strict=True)
    return stock, twin


def alike(twin: nn.Module, stock: nn.Module, calls: int) -> None:
    """A training step of both gives the same loss, logits and gradients, the twin's by ``calls`` fused calls."""
    ids = tokens()
    expected = trained(stock, ids)
    with took("fast", calls):
        torch.testing.assert_close(trained(twin, ids), expected, rtol=1e-4, atol=1e-5)


# -- layers that come and go -------------------------------------------------------------------------------------------


def test_layers_of_a_later_adapter_are_fused_and_grouped() -> None:
    stock, twin = stock_and_fused(target_modules=["q_proj"])
    for model in (stock, twin):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS, use_rslora=True))
        randomise(model)
        model.base_model.set_adapter(["default", "second"])
    assert sum(type(module) is FusedLinear for module in twin.modules()) == 14
    assert of_mbf(twin) >= {"LlamaAttention", "LlamaMLP", "FusedLoraModel"}
    alike(twin, stock, 14)


def test_layers_of_a_loaded_adapter_are_fused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    stock, twin = stock_and_fused(target_modules=["v_proj"])
    for model in (stock, twin):
        model.load_adapter(str(tmp_path), "loaded", is_trainable=True)
        model.set_adapter("loaded")
    alike(twin, stock, 14)


def test_later_layers_keep_to_the_memory_that_was_asked() -> None:
    model = llama(target_modules=["q_proj"])
    mbf.fuse(model, memory="low")
    model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS))
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    assert [mlp.__dict__["_recompute"] for mlp in mlps] == [True, True]


def test_later_layers_that_cannot_be_fused_are_peft_s() -> None:
    model = llama(target_modules=["q_proj"])
    mbf.fuse(model)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True))
    block = model.base_model.model.model.layers[0].self_attn
    assert type(block.q_proj) is FusedLinear and type(block.v_proj) is Linear
    assert len(mbf.fuse(model).declined) == 2


def test_an_unfused_model_stays_unfused() -> None:
    model = llama(target_modules=["q_proj"])
    mbf.fuse(model)
    mbf.unfuse(model)
    assert type(model.base_model) is LoraModel and of_mbf(model) == set()
    model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS))
    assert of_mbf(model) == set()


def test_a_block_undoes_layers_that_came_inside_it() -> None:
    model = llama(target_modules=["q_proj"])
    with mbf.fused(model):
        model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
        assert sum(type(module) is FusedLinear for module in model.modules()) == 4
    assert not any(type(module) is FusedLinear for module in model.modules())
    assert type(model.base_model) is LoraModel


def test_the_tuner_is_printed_copied_and_pickled_as_peft_s() -> None:
    model = llama(target_modules=["q_proj"])
    printed = repr(model)
    mbf.fuse(model)
    assert repr(model) == printed and isinstance(model.base_model, LoraModel)
    for twin in copies(model):
        twin.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
        assert sum(type(module) is FusedLinear for module in twin.modules()) == 4


def test_a_deleted_adapter_leaves_the_other_fused() -> None:
    stock, twin = stock_and_fused()
    for model in (stock, twin):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
        model.set_adapter("second")
        model.delete_adapter("second")
        model.set_adapter("default")
    alike(twin, stock, 14)


@pytest.mark.parametrize(
    "unload", [lambda model: model.merge_and_unload(safe_merge=True), lambda model: model.unload()]
)
def test_an_unloaded_model_is_peft_s_and_has_no_class_of_mbf(unload: Callable[[Any], Any]) -> None:
    stock, twin = stock_and_fused()
    assert of_mbf(twin) >= {"FusedLinear", "LlamaAttention", "LlamaMLP"}
    expected, left = unload(stock), unload(twin)
    assert of_mbf(left) == set()
    assert left.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in left.state_dict().items())


def call_through(module: nn.Module) -> None:
    """As accelerate's hooks do: the bound method is kept and called by a function in its place."""
    kept = module.forward
    module.forward = lambda *args, **kwargs: kept(*args, **kwargs)


@pytest.mark.parametrize(
    "undo", [lambda model: mbf.unfuse(model) or model, lambda model: model.unload(), lambda m: m.merge_and_unload()]
)
def test_forwards_that_somebody_took_while_they_were_fused(undo: Callable[[Any], Any]) -> None:
    stock, twin = stock_and_fused()
    head = twin.get_base_model().lm_head
    head.__class__ = FrozenLinear  # on every machine
    for block in twin.get_base_model().model.layers:
        for module in (block.self_attn, block.mlp, block.mlp.gate_proj, block.self_attn.o_proj, head):
            call_through(module)
    ids = tokens()
    torch.testing.assert_close(undo(twin)(input_ids=ids).logits, undo(stock)(input_ids=ids).logits)
    assert of_mbf(twin) == set()


# -- training ----------------------------------------------------------------------------------------------------------


def test_two_adapters_trained_in_turn_do_not_touch_one_another() -> None:
    stock, twin = stock_and_fused()
    ids = tokens()
    ends = []
    for model in (stock, twin):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
        start = factors(model, "second")
        found = [losses(model, ids)]
        assert all(torch.equal(value, start[name]) for name, value in factors(model, "second").items())
        first = factors(model)
        model.set_adapter("second")
        found.append(losses(model, ids))
        assert all(torch.equal(value, first[name]) for name, value in factors(model).items())
        assert found[1][-1] < found[1][0]
        ends.append(found)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_continued_adapter_ends_where_peft_s_does(tmp_path: Path) -> None:
    llama(lora_dropout=0.0).save_pretrained(tmp_path / "start")
    ids, ends = tokens(), []
    for fuse in (False, True):
        model = PeftModel.from_pretrained(base_model(), tmp_path / "start", is_trainable=True)
        if fuse:
            mbf.fuse(model, strict=True)
            with took("fast"):
                losses(model, ids)
        else:
            losses(model, ids)
        model.save_pretrained(tmp_path / f"end {fuse}")
        again = PeftModel.from_pretrained(base_model(), tmp_path / f"end {fuse}")
        assert of_mbf(again) == set()
        assert all(torch.equal(value, factors(model)[name]) for name, value in factors(again).items())
        ends.append(again(input_ids=ids).logits)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap_twice_and_train_on(prepared: bool, tmp_path: Path) -> None:
    """Adapters of the same rank or, once the model is prepared, of others."""
    for number, options in enumerate([{"lora_alpha": 3}, {"r": 6 if prepared else 4, "lora_alpha": 5}]):
        torch.manual_seed(20 + number)
        other = llama(**options)
        randomise(other)
        other.save_pretrained(tmp_path / str(number))
    stock, twin = stock_and_fused()
    logits = []
    for number in range(2):
        for model in (stock, twin):
            if prepared and number == 0:
                prepare_model_for_compiled_hotswap(model, target_rank=8)
            hotswap_adapter(model, str(tmp_path / str(number)), adapter_name="default")
            for name, parameter in model.named_parameters():  # which hotswap forgets before PEFT 0.20
                parameter.requires_grad_("lora_" in name)
        alike(twin, stock, 14)
        logits.append(twin(input_ids=torch.arange(7)[None]).logits)
    assert not torch.allclose(*logits)
    ids = tokens()
    torch.testing.assert_close(losses(twin, ids), losses(stock, ids), rtol=1e-4, atol=1e-4)


# -- weighing ----------------------------------------------------------------------------------------------------------

COMBINATIONS = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weighted_adapter_of_a_fused_model(combination: str) -> None:
    stock, twin = stock_and_fused(target_modules=["q_proj", "up_proj"])
    for model in (stock, twin):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
        randomise(model)
        options = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", combination_type=combination, **options)
        model.set_adapter("sum")
    assert factors(twin, "sum").keys() == factors(stock, "sum").keys()
    for name, value in factors(twin, "sum").items():
        assert torch.equal(value, factors(stock, "sum")[name]) and value.abs().max() > 0
    alike(twin, stock, 4)


# -- without mbf -------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["mbf"] = None  # an import of it fails
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM
try:
    import mbf
except ImportError:
    pass
else:
    raise SystemExit("mbf is importable")
torch.set_num_threads(1)
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter").eval()
merged = LlamaForCausalLM.from_pretrained("merged").eval()
whole = torch.load("unloaded.pt", weights_only=False).eval()
ids = torch.load("ids.pt")
with torch.no_grad():
    torch.save([one(input_ids=ids).logits for one in (model, merged, whole)], "logits.pt")
"""


def test_adapter_merged_and_unloaded_model_load_where_mbf_is_not(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    model, ids = llama(), tokens()
    mbf.fuse(model, strict=True)
    losses(model, ids)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad(), took("fast", 14):
        expected = model(input_ids=ids).logits
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.save(merged, tmp_path / "unloaded.pt")
    torch.save(ids, tmp_path / "ids.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
