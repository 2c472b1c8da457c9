"""CoDyRA: the weights of the ranks, their proximal steps, and what is dropped."""

import pytest
import torch

import mbf
from mbf.methods.codyra import soft
from tests.continual.tiny import batches, logits, peft_model, train
from tests.methods.plain import begin, data, end, learn, method


def started(i=1, **options):
    """In task i, A, B and g random."""
    rule = method("codyra", steps=10, **options)
    for task in range(1, i):
        learn(rule, task)
    begin(rule, i)
    with torch.no_grad():
        for layer, g in zip(rule.layers, rule.learned["g"], strict=True):
            layer.B.normal_()
            g.normal_()
    return rule


def dense(layer, g):
    return layer.B @ torch.diag(g) @ layer.A


@pytest.mark.parametrize("i", [1, 2])
def test_i_weights_of_one_are_plain_lora_without_alpha(i):
    rule = started(i)
    for layer, g in zip(rule.layers, rule.learned["g"], strict=True):
        g.data.fill_(1.0)
        n = rule.index(layer)
        before = 0 if i == 1 else layer.scale * rule.merged.B[n] @ rule.merged.A[n]
        torch.testing.assert_close(layer.delta(), before + (layer.B @ layer.A).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_dW_is_B_diag_g_A_and_alpha_scales_it_only_if_asked(scaled):
    rule = started(scaled=scaled)
    for layer, g in zip(rule.layers, rule.learned["g"], strict=True):
        s = layer.scale if scaled else 1.0
        torch.testing.assert_close(layer.delta(), (s * dense(layer, g)).detach(), rtol=1e-4, atol=1e-5)


def test_ii_the_soft_threshold_is_the_proximal_operator_of_L1():
    g, kappa = torch.randn(200).double(), 0.3
    z = torch.linspace(-5, 5, 200_001).double()
    best = torch.stack([z[(0.5 * (z - one) ** 2 + kappa * z.abs()).argmin()] for one in g])
    torch.testing.assert_close(soft(g, kappa), best, rtol=0, atol=6e-5)
    assert 0 < int((soft(g, kappa) == 0).sum()) < 200


@pytest.mark.parametrize("hard_cut", [False, True])
def test_a_step_shrinks_and_cuts(hard_cut):
    rule = started(kappa_max=0.1, dense_share=0.0, levels=1, hard_cut=hard_cut)
    values = torch.tensor([0.05, -0.15, 0.25, -1.0])
    for g in rule.learned["g"]:
        g.data.copy_(values)
    rule.after_step(1)
    wanted = torch.tensor([0.0, 0.0 if hard_cut else -0.05, 0.15, -0.9])
    for g in rule.learned["g"]:
        torch.testing.assert_close(g.detach(), wanted)


def test_kappa_grows_in_levels_over_the_second_half_and_stays():
    rule = method("codyra", steps=100, kappa_max=0.5, levels=5)
    rule.before_task(1, None)
    assert [rule.kappa(step) for step in (1, 50)] == [0, 0]
    assert [rule.kappa(step) for step in (51, 60, 61, 100, 400)] == pytest.approx([0.1, 0.1, 0.2, 0.5, 0.5])


@pytest.mark.parametrize("i", [1, 2])
def test_iii_dropping_zero_ranks_leaves_the_function(i):
    rule = started(i)
    for n, g in enumerate(rule.learned["g"]):
        g.data[:n] = 0  # none of layer 0, one of layer 1, two of layer 2
    inside = [layer.delta() for layer in rule.layers]
    old = [0 if i == 1 else A.shape[0] for A in rule.merged.A]
    end(rule, i)
    for n, (layer, before) in enumerate(zip(rule.layers, inside, strict=True)):
        assert layer.A.shape[0] == min(old[n] + 4 - n, *layer.W.shape)
        torch.testing.assert_close(layer.delta(), before, rtol=1e-4, atol=1e-4)
    begin(rule, i + 1)
    assert [layer.A.shape[0] for layer in rule.layers] == [4, 4, 4]  # the next task's LoRA is whole again


@pytest.mark.parametrize("i", [1, 2])
def test_iv_a_huge_kappa_leaves_the_model_as_it_was(i):
    rule = started(i, kappa_max=1e6, dense_share=0.0)
    before = [
        0 * layer.W if i == 1 else layer.scale * B @ A
        for layer, A, B in zip(rule.layers, rule.merged.A, rule.merged.B, strict=True)
    ]
    rule.after_step(10)
    assert all(not g.any() for g in rule.learned["g"])
    end(rule, i)
    for layer, wanted in zip(rule.layers, before, strict=True):
        torch.testing.assert_close(layer.delta(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("i", [1, 2])
def test_v_the_gradient_of_g_is_the_diagonal_of_h_and_Bt_dy(i):
    rule = started(i)
    layer, g = rule.layers[0], rule.learned["g"][0]
    x, dy = torch.randn(9, layer.A.shape[1]), torch.randn(9, layer.B.shape[0])
    layer(x).backward(dy)
    h = x @ layer.A.T
    torch.testing.assert_close(g.grad, torch.diagonal(h.T @ (dy @ layer.B)).detach(), rtol=1e-4, atol=1e-4)
    for found, wanted in ((layer.A.grad, (dy @ (layer.B * g)).T @ x), (layer.B.grad, dy.T @ (h * g))):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)


def test_the_steps_of_a_task_are_its_batches():
    rule = method("codyra", epochs=3)
    rule.before_task(1, data(1, batches=7))
    assert rule.state["steps"] == 21
    with pytest.raises(ValueError, match=r"found no steps, and as data a list_iterator, which has no length; call"):
        rule.before_task(1, iter(data(1)))
    with pytest.raises(ValueError, match=r"found no steps, and as data none; call task\(name, steps=...\), or pass a"):
        rule.before_task(1, None)


@pytest.mark.parametrize(("option", "wanted"), [(None, 5), (3, 3)])
def test_the_steps_of_a_task_are_those_that_it_is_told(option, wanted):
    learner = mbf.ContinualLora(peft_model(), "codyra", steps=option, epochs=7)
    with learner.task("a", batches(1), steps=5):
        assert learner.method.state["steps"] == wanted
        train(learner.model, 1, steps=2)
    with learner.task("b", batches(2)):
        assert learner.method.state["steps"] == (option or 7 * len(batches(2)))
        train(learner.model, 2, steps=2)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_steps_that_are_none_are_refused_before_anything_changes(steps, error):
    learner = mbf.ContinualLora(peft_model(), "codyra")
    with pytest.raises(error, match=rf"steps: found {steps}.*wanted the number of optimiser steps of the task"):
        learner.begin_task("a", batches(1), steps)
    assert not learner.in_task


def test_training_prunes_and_the_adapter_holds_what_is_left():
    model = peft_model(r=8)
    learner = mbf.ContinualLora(model, "codyra", steps=8, kappa_max=0.2)
    for i in (1, 2):
        with learner.task(f"t{i}", batches(i)):
            train(model, i, steps=8)
            inside = logits(model)
        torch.testing.assert_close(logits(model), inside, rtol=1e-4, atol=1e-4)
    ranks = [layer.A.shape[0] for layer in learner.layers]
    assert all(1 <= r < 16 for r in ranks) and len(set(ranks)) > 1
    assert "steps" not in learner.method.state
