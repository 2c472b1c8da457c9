"""LiLoRA: the nested LoRA and its shares, the cosine term by Grams, tasks kept apart, and what needs no label."""

import pytest
import torch
from torch.nn import functional as F

import mbf
from mbf.methods.lilora import cosine
from mbf.ops import LiloraTerms
from tests.continual.tiny import batch, logits, peft_model, train
from tests.methods.plain import begin, end, method

R, INNER, D_IN, D_OUT, S = 4, 3, 11, 7, 0.7


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def factors():
    return draw(R, D_IN), draw(D_OUT, R), draw(INNER, R), draw(D_OUT, INNER)


def branch(terms, x, joined=False):
    return (terms.lora() if joined else terms).accumulate(torch.zeros(len(x), D_OUT, dtype=x.dtype), x)


def in_task(i, **options):
    rule = method("lilora", **options)
    for task in range(1, i + 1):
        begin(rule, task)
        with torch.no_grad():
            for layer in rule.layers:
                layer.A.normal_()
                layer.B.normal_()
            for values in rule.learned.values():
                for value in values:
                    value.normal_()
        if task < i:
            end(rule, task)
    return rule


def dense(layer, Ea, Eb, a):
    share = a.sigmoid()
    return (layer.scale * (share * layer.B + (1 - share) * Eb @ Ea) @ layer.A).detach()


@pytest.mark.parametrize("joined", [False, True])
def test_i_a_share_of_one_is_plain_lora_and_none_the_inner_one(joined):
    (A, B, Ea, Eb), x = factors(), draw(5, D_IN)

    def found(share):
        return branch(LiloraTerms(A, B, Ea, Eb, torch.tensor(share, dtype=torch.float64), S), x, joined)

    torch.testing.assert_close(found(1.0), S * x @ (B @ A).T)
    torch.testing.assert_close(found(0.0), S * x @ (Eb @ Ea @ A).T)
    torch.testing.assert_close(found(0.3), S * x @ ((0.3 * B + 0.7 * Eb @ Ea) @ A).T)


@pytest.mark.parametrize("joined", [False, True])
def test_gradients_are_those_of_the_formula(joined):
    tensors = [t.requires_grad_() for t in (*factors(), draw())]
    x = draw(3, D_IN).requires_grad_()

    def call(x, A, B, Ea, Eb, a):
        return branch(LiloraTerms(A, B, Ea, Eb, a.sigmoid(), S), x, joined)

    assert torch.autograd.gradcheck(call, (x, *tensors))


def test_ii_the_first_task_starts_from_the_base():
    rule = method("lilora")
    begin(rule, 1)
    assert all(not layer.delta().any() for layer in rule.layers)
    assert all(bool(Ea.any()) for Ea in rule.learned["Ea"]) and len({float(a) for a in rule.learned["a"]}) == 3


def test_iii_the_term_vanishes_where_b0_stays_or_the_task_s_product_points_the_same_way():
    rule = in_task(2)
    assert rule.loss_extra() > 0
    for layer, B in zip(rule.layers, rule.merged.B, strict=True):
        layer.B.data.copy_(B)
    assert rule.loss_extra() == 0
    for n, layer in enumerate(rule.layers):
        layer.B.data.add_(1)
        rule.learned["Ea"][n].data.copy_(rule.state["Ea1"][n])
        rule.learned["Eb"][n].data.copy_(2 * rule.state["Eb1"][n])
    assert abs(rule.loss_extra()) < 1e-3
    assert in_task(1).loss_extra() is None and in_task(2, b0_mode="frozen").loss_extra() is None


def test_the_term_is_that_of_the_formula():
    rule = in_task(3, cosine=0.4)
    wanted = 0.0
    for n, layer in enumerate(rule.layers):
        new, old = (
            Eb @ Ea
            for Eb, Ea in ((rule.learned["Eb"][n], rule.learned["Ea"][n]), (rule.state["Eb2"][n], rule.state["Ea2"][n]))
        )
        like = F.cosine_similarity(new.flatten(), old.flatten(), dim=0)
        wanted += 0.4 * (1 - like) * (layer.B - rule.merged.B[n]).square().sum()
    torch.testing.assert_close(rule.loss_extra(), wanted, rtol=1e-4, atol=1e-4)


def test_iv_the_cosine_of_grams_is_that_of_the_products():
    X, Y, other_X, other_Y = draw(D_OUT, INNER), draw(INNER, R), draw(D_OUT, 5), draw(5, R)
    wanted = F.cosine_similarity((X @ Y).flatten(), (other_X @ other_Y).flatten(), dim=0)
    torch.testing.assert_close(cosine(X, Y, other_X, other_Y), wanted)
    zero = cosine(torch.zeros_like(X).requires_grad_(), Y, other_X, other_Y)
    assert zero == 0  # and the gradient of √ at 0 stays out of the loss


@pytest.mark.parametrize("i", [1, 3])
def test_v_the_merged_weight_is_the_forward(i):
    rule = in_task(i)
    for n, layer in enumerate(rule.layers):
        Ea, Eb, a = (rule.learned[name][n] for name in ("Ea", "Eb", "a"))
        torch.testing.assert_close(layer.delta(), dense(layer, Ea, Eb, a), rtol=1e-4, atol=1e-3)
    inside = [layer.delta() for layer in rule.layers]
    end(rule, i)
    shipped = rule.shipped()
    for n, layer in enumerate(rule.layers):
        torch.testing.assert_close(layer.delta(), inside[n], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.scale * shipped.B[n] @ shipped.A[n], inside[n], rtol=1e-4, atol=1e-3)


def test_naming_a_task_restores_its_own_parts_exactly():
    model = peft_model()
    learner = mbf.ContinualLora(model, "lilora")
    kept = []
    for i in (1, 2, 3):
        with learner.task(f"t{i}"):
            train(model, i)
            own = {name: [p.detach().clone() for p in values] for name, values in learner.method.learned.items()}
        kept.append(own)
    for i, own in enumerate(kept, 1):
        learner.select_task(f"t{i}")
        for n, layer in enumerate(learner.layers):
            terms = learner.method.terms(layer)
            assert torch.equal(terms.Eb, own["Eb"][n]) and torch.equal(terms.Ea, own["Ea"][n])
            assert torch.equal(terms.weight, own["a"][n].sigmoid()) and terms.A is layer.A and terms.B is layer.B
    outputs = []
    for name in ("t1", "t2", "t3", None):
        learner.select_task(name)
        outputs.append(logits(model))
    assert torch.equal(outputs[2], outputs[3]) and (outputs[0] - outputs[2]).abs().max() > 1e-4


def test_without_a_label_the_mean_is_that_of_all_tasks():
    rule = in_task(2, agnostic="mean", inner=3)
    end(rule, 2)
    for n, layer in enumerate(rule.layers):
        parts = [dense(layer, *rule._of(task, n)) for task in (1, 2)]
        torch.testing.assert_close(layer.delta(), sum(parts) / 2, rtol=1e-4, atol=1e-3)
        assert rule.shipped().A[n].shape[0] == 4 + 2 * 3


@pytest.mark.parametrize("mode", ["paper", "frozen"])
def test_b0_trains_on_or_is_frozen_after_the_first_task(mode):
    model = peft_model()
    learner = mbf.ContinualLora(model, "lilora", b0_mode=mode)
    with learner.task("t1"):
        train(model, 1)
    B = [layer.B.detach().clone() for layer in learner.layers]
    A = [layer.A.detach().clone() for layer in learner.layers]
    with learner.task("t2"):
        train(model, 2)
    assert all(torch.equal(a, layer.B) == (mode == "frozen") for a, layer in zip(B, learner.layers, strict=True))
    assert not any(torch.equal(a, layer.A) for a, layer in zip(A, learner.layers, strict=True))
    model.eval()
    assert torch.isfinite(model(**batch(1)).loss)


@pytest.mark.parametrize("agnostic", ["last", "mean"])
def test_the_view_is_what_the_task_becomes_or_is_refused(agnostic):
    model = peft_model()
    learner = mbf.ContinualLora(model, "lilora", agnostic=agnostic)
    for i in (1, 2):
        learner.begin_task(f"t{i}")
        train(model, i)
        if agnostic == "mean" and i == 2:
            with pytest.raises(ValueError, match="'lilora' with agnostic='mean' computes with the mean over all"):
                learner.merged_view().__enter__()
            return
        with learner.merged_view():
            seen = logits(model)
        learner.end_task()
        torch.testing.assert_close(logits(model), seen, rtol=1e-4, atol=1e-5)
