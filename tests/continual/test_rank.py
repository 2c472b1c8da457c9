"""New ranks from old: a continual run that goes on at another rank (SLAO with basis="rsvd", B_start="preserve")."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import mbf
from mbf.continual import ContinualLora
from tests.continual.tiny import base_model, logits, peft_model, train

OPTIONS = {"basis": "rsvd", "B_start": "preserve"}


def products(layers):
    return [layer.scale * layer.B.detach().double() @ layer.A.detach().double() for layer in layers]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [2, 7])
def test_a_run_goes_on_at_another_rank(rank, fused, tmp_path):
    model = peft_model(4)
    if fused:
        mbf.fuse(model)
    learner = ContinualLora(model, **OPTIONS, rank=rank)
    with learner.task("first"):
        train(model, 1)
    assert {layer.A.shape[0] for layer in learner.layers} == {4}
    last, scales, before = products(learner.layers), [layer.scale for layer in learner.layers], logits(model)

    learner.begin_task("second")
    assert {(layer.A.shape[0], layer.B.shape[1]) for layer in learner.layers} == {(rank, rank)}
    assert [layer.scale for layer in learner.layers] == scales
    for product, start, layer in zip(last, products(learner.layers), learner.layers, strict=True):
        torch.testing.assert_close(layer.A @ layer.A.mT, torch.eye(rank), rtol=0, atol=1e-5)
        tail = torch.linalg.svdvals(product)[rank:].norm()
        assert (product - start).norm() <= tail * (1 + 1e-4) + 1e-6  # nothing of that rank is nearer
    if rank > 4:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    start = [(layer.A.detach().clone(), layer.B.detach().clone()) for layer in learner.layers]
    train(model, 2)
    assert all(
        (layer.A != A).any(1).all() and (layer.B != B).any(0).all()  # every row and column, new ones too, is trained
        for layer, (A, B) in zip(learner.layers, start, strict=True)
    )
    learner.end_task()
    with learner.task("third"):
        train(model, 3)

    learner.save(tmp_path / "learner")
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "learner")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    resumed = ContinualLora.load(base_model(), tmp_path / "learner")
    for learner_ in (learner, resumed):
        torch.manual_seed(5)
        with learner_.task("fourth"):
            train(learner_.model, 4)
    torch.testing.assert_close(logits(resumed.model), logits(model), rtol=1e-3, atol=1e-4)


def test_an_abandoned_task_puts_the_old_rank_back():
    model = peft_model(4)
    learner = ContinualLora(model, **OPTIONS, rank=6)
    with learner.task("first"):
        train(model, 1)
    before = logits(model)
    with pytest.raises(RuntimeError, match="enough"), learner.task("second"):
        train(model, 2)
        assert {layer.A.shape[0] for layer in learner.layers} == {6}
        raise RuntimeError("enough")
    assert {layer.A.shape[0] for layer in learner.layers} == {4}
    assert model.peft_config["default"].r == 4
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize(("name", "options"), [("inclora", {}), ("slao", {**OPTIONS, "rank": 2}), ("knots", {})])
def test_no_rank_changes_where_peft_takes_a_part_of_that_rank_out_of_W(name, options, how):
    model = peft_model(4, init_lora_weights=how)
    with pytest.raises(ValueError, match=rf"init_lora_weights='{how}'.*method '{name}' changes the rank.*init_pissa_"):
        ContinualLora(model, name, learnt=False, **options)
    assert not mbf.peft.is_fused(model)


def test_where_the_rank_stays_peft_takes_the_same_part_out_of_W_again(tmp_path):
    model = peft_model(4, init_lora_weights="pissa")
    learner = ContinualLora(model, learnt=False)
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
    learner.save(tmp_path / "learner")
    learner.export(tmp_path / "exported")
    for path in ("learner", "exported"):
        plain = PeftModel.from_pretrained(base_model(), tmp_path / path)
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    split = peft_model(4, init_lora_weights="pissa")
    mora = ContinualLora(split, "mora", learnt=False)
    with mora.task("one"):
        train(split, 1)
    before = logits(split)
    with pytest.raises(ValueError, match="what 'mora' exports has another"):
        mora.export(tmp_path / "mora")
    assert torch.equal(logits(split), before) and not (tmp_path / "mora").exists()


def test_a_start_by_init_pissa_goes_on_at_any_rank(tmp_path):
    model = peft_model(4)
    mbf.init_pissa_(model)
    learner = ContinualLora(model, "inclora", learnt=False)
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
    found = logits(model)
    learner.save(tmp_path / "learner")
    plain = PeftModel.from_pretrained(model.unload(), tmp_path / "learner")
    torch.testing.assert_close(logits(plain), found, rtol=1e-4, atol=1e-4)
