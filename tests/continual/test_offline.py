"""Merging trained adapters without a model gives what the learner's merge of the same LoRAs gives, at any rank."""

import json
import math
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mbf import methods
from mbf.continual import ContinualLora, MergeReport, merge_adapters, offline
from mbf.peft import save_adapter, sync_config
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
    report = merge_adapters(paths, tmp_path / "out")
    assert report == MergeReport(tmp_path / "out")
    out = report.path
    merged, inputs = tensors(out), [tensors(p) for p in paths]
    w = [i**-0.5 * math.prod(1 - j**-0.5 for j in range(i + 1, 5)) for i in range(1, 5)]
    for key, value in merged.items():
        expected = inputs[-1][key] if "lora_A" in key else sum(c * t[key] for c, t in zip(w, inputs, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert set(merged) == set(inputs[0])
    plain = PeftModel.from_pretrained(base_model(), out)
    assert (logits(plain) - logits(base_model())).abs().max() > 1e-3


def test_memory_holds_one_adapter_at_a_time_beside_the_first(tmp_path, monkeypatch):
    paths, alive, most = trained(tmp_path, 6), [], 0
    read = offline._layers

    def watched(*of):
        nonlocal most
        layers = read(*of)
        alive.append(weakref.ref(layers[0]))
        most = max(most, sum(layer() is not None for layer in alive))
        return layers

    monkeypatch.setattr(offline, "_layers", watched)
    merge_adapters(paths, tmp_path / "out", "inclora")
    assert len(alive) == 13 and most == 2


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 4}}]
)
def test_inclora_is_the_sum_of_the_functions(config, tmp_path):
    paths = trained(tmp_path, 3, **config)
    out = merge_adapters(paths, tmp_path / "out", "inclora").path
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


OPTIONS = {"magmax": {"space": "delta"}}


def test_a_method_merges_adapters_or_is_refused_before_it_reads_them(tmp_path):
    paths = trained(tmp_path, 2)
    for name in methods.available():
        if methods.get(name).merges_alone:
            merge_adapters(paths, tmp_path / name, name, **OPTIONS.get(name, {}))
            assert (logits(PeftModel.from_pretrained(base_model(), tmp_path / name)) - logits(base_model())).any()
        else:
            with pytest.raises(ValueError, match=rf"method '{name}' .*; methods that need nothing else: .*slao"):
                merge_adapters([tmp_path / "nowhere"], tmp_path / name, name)
    with pytest.raises(ValueError, match="'multitask' learns all tasks at once and merges nothing"):
        merge_adapters(paths, tmp_path / "out", "multitask")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", "adapter_config.json is missing"),
        ("other rank", r"has rank 8, .*a1 has 4\. slao goes from rank to rank with basis='rsvd'.*--rank 4.*'inclora'"),
        ("other widths", "train both on one model"),
        ("scale 0", "has scale 0 and computes nothing"),
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
        "scale 0": {"lora_alpha": 0},
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
    if spoil == "other widths":
        save_file({k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in load_file(file).items()}, file)
    if spoil == "not lora":
        (bad / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=message):
        merge_adapters([bad, good] if spoil == "scale 0" else [good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- scales and ranks --------------------------------------------------------------------------------------------------


def functions(path):
    """s B A of every layer in fp64, by the name in PEFT."""
    model = PeftModel.from_pretrained(base_model(), path)
    layers = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    return {
        n: m.scaling["default"] * m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double()
        for n, m in layers.items()
    }


def learnt(tmp_path, seed, **config):
    torch.manual_seed(seed)
    model = peft_model(**config)
    train(model, seed)
    model.save_pretrained(tmp_path / f"learnt{seed}")
    return tmp_path / f"learnt{seed}"


def assert_sum(path, parts, rtol=1e-5):
    found = functions(path)
    for name, value in found.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts), rtol=rtol, atol=1e-6)


def test_another_scale_is_taken_into_B(tmp_path):
    one, other = learnt(tmp_path, 1, lora_alpha=8), learnt(tmp_path, 2, lora_alpha=24)
    assert_sum(merge_adapters([one, other], tmp_path / "sum", "inclora").path, [functions(one), functions(other)])
    merged = tensors(merge_adapters([one, other], tmp_path / "slao", schedule=0.5).path)
    first, second = tensors(one), tensors(other)
    for key, value in merged.items():
        expected = second[key] if "lora_A" in key else 0.5 * first[key] + 0.5 * 3 * second[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_methods_that_sum_or_choose_take_any_rank(tmp_path):
    paths = [learnt(tmp_path, 1, r=4), learnt(tmp_path, 2, r=6), learnt(tmp_path, 3, r=2, rank_pattern={"v_proj": 5})]
    parts = [functions(path) for path in paths]
    assert_sum(merge_adapters(paths, tmp_path / "inclora", "inclora").path, parts)
    assert_sum(merge_adapters(paths, tmp_path / "seqlora", "seqlora").path, parts[-1:])
    delta = functions(merge_adapters(paths[:2], tmp_path / "magmax", "magmax", space="delta", scaling=1.0).path)
    for name, value in delta.items():
        largest = torch.where(parts[1][name].abs() >= parts[0][name].abs(), parts[1][name], parts[0][name])
        U, S, Vh = torch.linalg.svd(largest)
        assert (value - U[:, :6] * S[:6] @ Vh[:6]).norm() < 0.02 * S.norm()


@pytest.mark.parametrize("ranks", [(4, 6, 6), (4, 2, 2), (4, 6, 3)], ids=str)
def test_slao_goes_from_rank_to_rank_as_the_learner_does(ranks, tmp_path):
    """The fine-tuned LoRA of every task of a run that changes its rank, merged offline: the run's own merged LoRA."""
    options = {"basis": "rsvd", "B_start": "preserve"}
    torch.manual_seed(0)
    model = peft_model(ranks[0])
    learner, paths = ContinualLora(model, **options), []
    for i, rank in enumerate(ranks, start=1):
        learner.method.options = type(learner.method.options)(**options, rank=rank)
        with learner.task(f"task {i}"):
            train(model, i)
            paths.append(tmp_path / f"ft{i}")
            sync_config(model, "default")
            save_adapter(model, "default", paths[-1])
    learner.save(tmp_path / "learner")
    before = torch.get_rng_state()
    out = merge_adapters(paths, tmp_path / "out", **options).path
    assert torch.equal(torch.get_rng_state(), before)
    assert {t.shape[0] for k, t in tensors(out).items() if "lora_A" in k} == {ranks[-1]}
    assert_sum(out, [functions(tmp_path / "learner")], rtol=1e-4)
    last = functions(paths[-1])
    assert all((last[n] - f).norm() > 0.05 * f.norm() for n, f in functions(out).items())  # not the last one alone
    again = tensors(merge_adapters(paths, tmp_path / "again", **options).path)
    assert all(torch.equal(t, again[k]) for k, t in tensors(out).items())


def test_slao_refuses_one_adapter_of_several_ranks_in_words(tmp_path):
    paths = [learnt(tmp_path, 1), learnt(tmp_path, 2, rank_pattern={"v_proj": 2})]
    with pytest.raises(ValueError, match=r"one rank for all layers of an adapter.*--rank 2"):
        merge_adapters(paths, tmp_path / "out", basis="rsvd", B_start="preserve")
    assert not (tmp_path / "out").exists()


def test_the_way_that_the_message_shows(tmp_path):
    paths = [learnt(tmp_path, 1, r=6), learnt(tmp_path, 2, r=4)]
    paths = [merge_adapters([path], tmp_path / f"at4-{n}", rank=4).path for n, path in enumerate(paths)]
    merged, inputs = tensors(merge_adapters(paths, tmp_path / "out", schedule=0.5).path), [tensors(p) for p in paths]
    scale = 2.0 / (8 / 6)  # alpha / r of the second over that of the first, which re-compression keeps
    for key, value in merged.items():
        expected = inputs[1][key] if "lora_A" in key else 0.5 * inputs[0][key] + 0.5 * scale * inputs[1][key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


# -- re-compression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 4}}], ids=str
)
def test_the_best_approximation_of_the_rank(config, tmp_path):
    paths = trained(tmp_path, 3, **config)
    whole = functions(merge_adapters(paths, tmp_path / "whole", "inclora").path)
    report = merge_adapters(paths, tmp_path / "out", "inclora", rank=5)
    found, by_name = functions(report.path), {layer.name: layer for layer in report.compressed}
    assert {f"base_model.model.{name}" for name in by_name} == set(whole)
    for name, value in found.items():
        U, S, Vh = torch.linalg.svd(whole[name])
        torch.testing.assert_close(value, U[:, :5] * S[:5] @ Vh[:5], rtol=1e-4, atol=1e-6)
        layer = by_name[name.removeprefix("base_model.model.")]
        assert (layer.before, layer.after) == (6 if config.get("rank_pattern") and "v_proj" in name else 12, 5)
        assert layer.norm == pytest.approx(S.norm().item(), rel=1e-5)
        assert layer.lost == pytest.approx(S[5:].norm().item(), rel=1e-4, abs=1e-6)
        assert layer.kept == pytest.approx((value.norm() / whole[name].norm()).item(), rel=1e-5)
        assert 0.5 < layer.kept < 0.9999
    total = torch.cat([f.flatten() for f in whole.values()]).norm()
    assert report.kept == pytest.approx((torch.cat([f.flatten() for f in found.values()]).norm() / total).item())
    config = json.loads((report.path / "adapter_config.json").read_text())
    assert config["r"] == 5 and not config["rank_pattern"]


def test_factors_are_balanced_in_the_stored_dtype(tmp_path):
    (path,) = trained(tmp_path, 1)
    file = path / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    exact, found = functions(path), tensors(merge_adapters([path], tmp_path / "out", rank=2).path)
    for key, A in found.items():
        if "lora_A" in key:
            B = found[key.replace("lora_A", "lora_B")]
            assert A.dtype is B.dtype is torch.bfloat16 and A.shape[0] == B.shape[1] == 2
            torch.testing.assert_close(A.float().norm(dim=1), B.float().norm(dim=0), rtol=2e-2, atol=0)
            U, S, Vh = torch.linalg.svd(exact[key.removesuffix(".lora_A.weight")])
            best = U[:, :2] * S[:2] @ Vh[:2]
            assert (2.0 * B.double() @ A.double() - best).norm() < 1e-2 * best.norm()  # the scale is still 8 / 4


def test_layers_at_the_rank_or_below_are_left_alone(tmp_path):
    (path,) = trained(tmp_path, 1, rank_pattern={"v_proj": 2, "down_proj": 3})
    report = merge_adapters([path], tmp_path / "out", rank=3)
    assert [layer.name.rpartition(".")[2] for layer in report.compressed] == ["q_proj", "q_proj"]
    before, after = tensors(path), tensors(report.path)
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key]) is ("q_proj" not in key)
    found, exact = functions(report.path), functions(path)  # as PEFT reads the new configuration
    assert all(torch.equal(value, exact[name]) is ("q_proj" not in name) for name, value in found.items())
    untouched = merge_adapters([path], tmp_path / "other", rank=4)
    assert untouched.compressed == () and untouched.kept == 1
    assert all(torch.equal(value, before[key]) for key, value in tensors(untouched.path).items())


def test_a_rank_beyond_a_narrow_layer_and_an_untrained_one(tmp_path):
    model = PeftModel(nn.Sequential(nn.Linear(7, 2), nn.Linear(2, 9)), LoraConfig(r=6, target_modules=["0", "1"]))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path / "narrow")
    narrow, untrained = merge_adapters([tmp_path / "narrow"], tmp_path / "out", rank=4).compressed
    assert (narrow.before, narrow.after, narrow.lost, narrow.kept) == (6, 2, 0, 1)
    assert (untrained.before, untrained.norm, untrained.kept) == (6, 0, 1)
    before, after = tensors(tmp_path / "narrow"), tensors(tmp_path / "out")
    for n in (0, 1):
        A, B = (f"base_model.model.{n}.lora_{factor}.weight" for factor in "AB")
        torch.testing.assert_close(after[B] @ after[A], before[B] @ before[A], rtol=1e-5, atol=1e-5)


def test_a_rank_below_one_is_refused(tmp_path):
    paths = trained(tmp_path, 1)
    with pytest.raises(ValueError, match="rank is 0"):
        merge_adapters(paths, tmp_path / "out", rank=0)
    assert not (tmp_path / "out").exists()


def test_adapters_that_took_a_part_out_of_W_are_merged_only_where_it_counts_once(tmp_path):
    paths = trained(tmp_path, 2, init_lora_weights="pissa")
    base, tuned = logits(base_model()), [logits(PeftModel.from_pretrained(base_model(), path)) for path in paths]
    most = max((one - base).norm() for one in tuned)
    for name in ("slao", "seqlora"):
        out = merge_adapters(paths, tmp_path / name, name).path
        assert (logits(PeftModel.from_pretrained(base_model(), out)) - base).norm() < 1.5 * most
    plain = learnt(tmp_path, 3)
    for adapters, options in (
        (paths, {"method": "inclora"}),
        (paths, {"method": "knots"}),
        (paths[:1], {"rank": 2}),
        ([paths[0], plain], {}),
        ([plain, paths[0]], {}),
    ):
        with pytest.raises(ValueError, match=r"a1 was made with init_lora_weights='pissa'.*only slao and seqlora"):
            merge_adapters(adapters, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
