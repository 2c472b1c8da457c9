"""Saving and loading a learner: the same future, plain PEFT files, and every kind of damage."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import mbf
from mbf.continual.header import CheckpointError
from tests.continual.tiny import base_model, batches, logits, peft_model, train

METHODS = [name for name in mbf.methods.available() if not mbf.methods.get(name).joint]


def learnt(name="slao", tasks=2, adapter="default"):
    model = peft_model(adapter=adapter)
    learner = mbf.ContinualLora(model, name, adapter)
    for i in range(1, tasks + 1):
        torch.manual_seed(i)
        with learner.task(f"t{i}", batches(i)):
            train(model, i)
    return model, learner


def next_task(model, learner):
    torch.manual_seed(9)
    with learner.task("next", batches(9)):
        train(model, 9)
    return logits(model)


@pytest.mark.parametrize("into", ["base model", "fresh adapter"])
@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_learner_has_the_same_future(name, into, tmp_path):
    model, learner = learnt(name)
    learner.save(tmp_path / "run")
    expected = logits(model)
    other = base_model() if into == "base model" else peft_model()
    twin = mbf.ContinualLora.load(other, tmp_path / "run")
    assert twin.history == learner.history and twin.method.options == learner.method.options
    assert torch.equal(logits(twin.model), expected)
    assert torch.equal(next_task(model, learner), next_task(twin.model, twin))
    a, b = learner.method.current, twin.method.current
    assert all(torch.equal(x, y) for x, y in zip([*a.A, *a.B], [*b.A, *b.B], strict=True))


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_the_directory_is_a_plain_peft_adapter(adapter, tmp_path):
    model, learner = learnt(adapter=adapter)
    learner.save(tmp_path / "run")
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "run")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_what_plain_peft_computes_or_a_warning_names_export(name, tmp_path):
    model, learner = learnt(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.save(tmp_path / "learner")
        learner.save(tmp_path / "learner")
    said = [str(one.message) for one in caught if "learner.export" in str(one.message)]
    assert len(said) == (name in ("amlora", "lilora", "mora", "sapt")) and all(f"'{name}'" in one for one in said)
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "learner")
    assert torch.allclose(logits(plain), logits(model), rtol=1e-4, atol=1e-4) == (not said)


def test_slao_keeps_two_loras_and_a_header_whatever_the_number_of_tasks(tmp_path):
    sizes = []
    model, learner = learnt(tasks=1)
    for i in range(2, 6):
        learner.save(tmp_path / "run")
        tensors = [load_file(tmp_path / "run" / f) for f in ("adapter_model.safetensors", "learner.safetensors")]
        sizes.append([sum(t.numel() for t in file.values()) for file in tensors])
        with learner.task(f"t{i}"):
            train(model, i)
    assert all(size == [sizes[0][0]] * 2 for size in sizes)


def test_injected_adapters_save_and_load(tmp_path):
    model = base_model()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "default")
    learner = mbf.ContinualLora(model)
    with learner.task("one"):
        train(model, 1)
    learner.save(tmp_path / "run")
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "run")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    other = base_model()
    other.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "default")
    mbf.ContinualLora.load(other, tmp_path / "run")
    assert torch.equal(logits(other), logits(model))


def test_a_callable_schedule_is_asked_for(tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, schedule=lambda i: 1 / i)
    with learner.task("one"):
        train(model, 1)
    learner.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="'schedule' was a callable"):
        mbf.ContinualLora.load(base_model(), tmp_path / "run")
    twin = mbf.ContinualLora.load(base_model(), tmp_path / "run", schedule=lambda i: 1 / i)
    assert twin.method.merge_weight(4) == 0.25


def damage(root, how):
    match how:
        case "no header":
            (root / "learner.json").unlink()
        case "truncated header":
            text = (root / "learner.json").read_text()
            (root / "learner.json").write_text(text[: len(text) // 2])
        case "flipped byte":
            data = bytearray((root / "learner.safetensors").read_bytes())
            data[-1] ^= 1
            (root / "learner.safetensors").write_bytes(data)
        case "no adapter":
            (root / "adapter_model.safetensors").unlink()
        case "other method" | "newer version":
            header = json.loads((root / "learner.json").read_text())
            header |= {"method": "nothing"} if how == "other method" else {"version": 99}
            (root / "learner.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no header", "holds no learner"),
        ("truncated header", "is damaged"),
        ("flipped byte", "learner.safetensors is damaged: sha256"),
        ("no adapter", "adapter_model.safetensors is missing"),
        ("other method", "'nothing' is not registered"),
        ("newer version", "has version 99"),
    ],
)
def test_damage_is_named_and_the_model_keeps_its_bits(how, message, tmp_path):
    _, learner = learnt()
    learner.save(tmp_path / "run")
    damage(tmp_path / "run", how)
    model = peft_model()
    before = logits(model)
    with pytest.raises(CheckpointError, match=message):
        mbf.ContinualLora.load(model, tmp_path / "run")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj"]}, "is only in the checkpoint"),
        ({"lora_alpha": 16}, "has scale 2.0 there and 4.0"),
    ],
)
def test_another_adapter_is_refused(config, message, tmp_path):
    _, learner = learnt()
    learner.save(tmp_path / "run")
    model = peft_model(**config)
    before = logits(model)
    with pytest.raises(CheckpointError, match=message):
        mbf.ContinualLora.load(model, tmp_path / "run")
    assert torch.equal(logits(model), before)


def half_model():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(base_model().bfloat16(), config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("into", ["base model", "fresh adapter", "wide adapter"])
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_in_half_precision_goes_on_in_it_or_in_a_wider_one(name, into, tmp_path):
    model = half_model()
    learner = mbf.ContinualLora(model, name)
    for i in (1, 2):
        torch.manual_seed(i)
        with learner.task(f"t{i}", batches(i)):
            train(model, i, lr=2e-3)
    learner.save(tmp_path / "run")
    other = base_model().bfloat16() if into == "base model" else half_model()
    if into == "wide adapter":
        for parameter in other.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    twin = mbf.ContinualLora.load(other, tmp_path / "run")
    wanted = torch.float32 if into == "wide adapter" else torch.bfloat16
    assert {part.dtype for layer in twin.layers for part in (layer.A, layer.B)} == {wanted}
    futures = []
    for one in (learner, twin):
        torch.manual_seed(9)
        with one.task("next", batches(9)):
            train(one.model, 9, lr=2e-3)
        futures.append(logits(one.model))
    if into == "wide adapter":
        assert torch.isfinite(futures[1]).all()
    else:
        assert torch.equal(*futures)
