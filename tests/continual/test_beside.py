"""What stands beside the learner's own, in a directory or in a model, is not lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import mbf
from mbf.continual import CheckpointError, ContinualLora, merge_adapters
from tests.continual.test_bad_files import bits, files
from tests.continual.tiny import base_model, batches, logits, peft_model, train


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good") / "learner"
    model = peft_model()
    learner = ContinualLora(model)
    with learner.task("one", batches(1)):
        train(model, 1, steps=1)
    learner.save(root)
    return root


@pytest.fixture
def spoilt(good: Path, tmp_path: Path) -> Path:
    """A learner of another scale than its adapter says, which shows only when the adapter is in the model."""
    root = Path(shutil.copytree(good, tmp_path / "spoilt"))
    header = json.loads((root / "learner.json").read_text())
    header["layers"] = {name: [*sizes, 7.0] for name, (*sizes, _) in header["layers"].items()}
    (root / "learner.json").write_text(json.dumps(header))
    return root


def injected(targets: list[str], *names: str) -> nn.Module:
    """A model that is no PeftModel, with trained adapters of its own."""
    model: nn.Module = base_model()
    for number, name in enumerate(names):
        torch.manual_seed(number)
        config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        model = inject_adapter_in_model(config, model, adapter_name=name)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], ["o_proj"]])
@pytest.mark.parametrize("names", [(), ("mine",), ("mine", "other")])
def test_a_load_that_fails_leaves_the_adapters_of_a_plain_model(
    names: tuple[str, ...], targets: list[str], spoilt: Path
) -> None:
    model = injected(targets, *names)
    before, said = bits(model), logits(model)
    with pytest.raises(CheckpointError, match=r"has scale 7\.0 there"):
        ContinualLora.load(model, spoilt)
    assert bits(model) == before and list(getattr(model, "peft_config", [])) == list(names)
    assert torch.equal(logits(model), said)


def beside(root: Path) -> dict[str, bytes | None]:
    (root / "README.md").write_text("mine")
    (root / "checkpoint-5").mkdir()
    (root / "checkpoint-5" / "state").write_text("mine")
    return files(root)


def test_what_is_beside_an_adapter_is_not_removed(good: Path, tmp_path: Path) -> None:
    learner = ContinualLora.load(peft_model(), good)
    out = tmp_path / "out"
    peft_model().save_pretrained(str(out))
    before = beside(out)
    for act in (learner.save, learner.export, lambda path: merge_adapters([good], path)):
        with pytest.raises(ValueError, match=r"found checkpoint-5 beside adapter_config\.json, .*move it away, or"):
            act(out)
        assert files(out) == before
    shutil.rmtree(out / "checkpoint-5")
    for act in (lambda path: merge_adapters([good], path), learner.export, learner.save, learner.save):
        act(out)
        assert (out / "README.md").read_text() == "mine"
    assert ContinualLora.load(peft_model(), out).task_index == 1


def test_an_export_does_not_take_the_place_of_a_learner(good: Path, tmp_path: Path) -> None:
    learner = ContinualLora.load(peft_model(), good)
    learner.save(tmp_path / "out")
    before = files(tmp_path)
    for act in (learner.export, lambda path: merge_adapters([good], path)):
        with pytest.raises(ValueError, match=r"found learner\.json beside adapter_config\.json"):
            act(tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["my adapter", "a/b", "..", "a\\b", ""])
def test_a_name_that_no_checkpoint_can_hold(name: str) -> None:
    with pytest.raises(ValueError, match=r"its name has a dot, slash or space, which no checkpoint can hold; give it"):
        ContinualLora(peft_model(), adapter=name)


@pytest.mark.parametrize("max_norm", [-1, 0, float("nan")])
def test_a_limit_is_checked_where_a_learner_is_loaded(max_norm: float, good: Path) -> None:
    model = base_model()
    before = bits(model)
    with pytest.raises(ValueError, match=r"max_norm: found .*, wanted a number above 0, or None for no limit"):
        ContinualLora.load(model, good, max_norm=max_norm)
    assert bits(model) == before


@pytest.mark.parametrize("name", mbf.methods.available())
def test_before_the_first_task_the_result_is_the_base(name: str, tmp_path: Path) -> None:
    model = peft_model()
    ContinualLora(model, name).export(tmp_path / "out")
    plain = peft_model()
    plain.load_adapter(str(tmp_path / "out"), "exported")
    plain.set_adapter("exported")
    assert torch.equal(logits(plain), logits(base_model()))
