"""AM-LoRA-style: attention weights, their scores without forming any output, what trains, and the L1 term."""

import pytest
import torch
from torch.nn import functional as F

import mbf
from mbf.methods.amlora import Attention
from mbf.ops import LoraTerms
from tests.continual.tiny import batch, logits, peft_model, train
from tests.methods.plain import begin, learn, method

D_IN, D_OUT, R, HIDDEN = 40, 24, 4, 7


def attention(K=3, scores="BA", **options):
    generator = torch.Generator().manual_seed(K)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    width = D_OUT if scores == "BA" else R
    return Attention(
        draw(K * R, D_IN), draw(D_OUT, K * R), 0.3, draw(K, HIDDEN, width), draw(K, HIDDEN), scores == "BA", **options
    )


def outputs(terms, x):
    """h_k of every task, formed."""
    K = len(terms.w)
    return [terms.scale * x @ A.T @ B.T for A, B in zip(terms.A.chunk(K), terms.B.chunk(K, 1), strict=True)]


def formula(terms, x):
    """The module's formula, from the outputs themselves."""
    h = outputs(terms, x)
    s = torch.stack([F.silu(h_k @ V.T) @ w for h_k, V, w in zip(h, terms.V, terms.w, strict=True)], -1)
    exp = s.exp()
    total = exp.sum(-1, keepdim=True) + (1.0 if terms.none else 0.0)
    return s, exp / total, sum(h_k * p[..., None] for h_k, p in zip(h, (exp / total).unbind(-1), strict=True))


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_scores_and_mixture_are_those_of_the_outputs(K, none):
    terms, x, y = attention(K, none=none), torch.randn(2, 6, D_IN).double(), torch.randn(2, 6, D_OUT).double()
    s, weights, mixed = formula(terms, x)
    torch.testing.assert_close(terms.scores(x), s)
    torch.testing.assert_close(terms.weights(s), weights)
    torch.testing.assert_close(terms.accumulate(y, x), y + mixed)


def test_scores_of_A_x_leave_B_out():
    terms, x = attention(scores="A"), torch.randn(5, D_IN).double()
    z = [x @ A.T for A in terms.A.chunk(3)]
    s = torch.stack([F.silu(z_k @ V.T) @ w for z_k, V, w in zip(z, terms.V, terms.w, strict=True)], -1)
    torch.testing.assert_close(terms.scores(x), s)


def test_i_one_lora_and_no_zero_one_is_plain_lora():
    terms, x, y = attention(1, none=False), torch.randn(5, D_IN).double(), torch.randn(5, D_OUT).double()
    torch.testing.assert_close(terms.weights(terms.scores(x)), torch.ones(5, 1).double())
    torch.testing.assert_close(terms.accumulate(y, x), LoraTerms(terms.A, terms.B, terms.scale).accumulate(y, x))


def test_ii_another_order_of_the_tasks_orders_the_weights_and_keeps_the_output():
    terms, x, y = attention(3), torch.randn(5, D_IN).double(), torch.randn(5, D_OUT).double()
    order = [2, 0, 1]
    A, B = terms.A.view(3, R, D_IN)[order], terms.B.view(D_OUT, 3, R)[:, order]
    other = terms._replace(A=A.flatten(0, 1), B=B.flatten(1), V=terms.V[order], w=terms.w[order])
    weights = terms.weights(terms.scores(x))
    torch.testing.assert_close(other.weights(other.scores(x)), weights[:, order])
    torch.testing.assert_close(other.accumulate(y, x), terms.accumulate(y, x))
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("none", [True, False])
def test_iii_weights_are_shares(none):
    terms, x = attention(4, none=none), 3 * torch.randn(50, D_IN).double()
    s = terms.scores(x)
    weights = terms.weights(s)
    rest = 1 / (s.exp().sum(-1) + 1) if none else torch.zeros(50).double()
    assert (weights >= 0).all() and weights.max() > 0.5
    torch.testing.assert_close(weights.sum(-1) + rest, torch.ones(50).double())


def test_iv_the_l1_term_is_on_the_scores_and_has_a_gradient():
    x, y = torch.randn(5, D_IN).double(), torch.randn(5, D_OUT).double()
    found = []
    for l1 in (0.0, 0.7):
        terms = attention(3, l1=l1)
        for t in (terms.A, terms.B, terms.V, terms.w):
            t.requires_grad_()
        terms.accumulate(y, x).square().sum().backward()
        found.append([t.grad for t in (terms.A, terms.B, terms.V, terms.w)])
    terms = attention(3)
    tensors = [t.requires_grad_() for t in (terms.A, terms.B, terms.V, terms.w)]
    wanted = torch.autograd.grad(0.7 * terms.scores(x).abs().mean(), tensors)
    for plain, with_l1, penalty in zip(*found, wanted, strict=True):
        assert penalty.abs().max() > 1e-4
        torch.testing.assert_close(with_l1 - plain, penalty, rtol=1e-6, atol=1e-9)


def test_v_equal_scores_give_the_mean_of_the_loras():
    terms = attention(4, none=False)
    terms = terms._replace(w=torch.zeros_like(terms.w))
    x, y = torch.randn(5, D_IN).double(), torch.randn(5, D_OUT).double()
    torch.testing.assert_close(terms.accumulate(y, x), y + sum(outputs(terms, x)) / 4)


def test_gradients_are_those_of_the_formula():
    x = torch.randn(3, D_IN).double().requires_grad_()
    terms = attention(2)
    tensors = [t.requires_grad_() for t in (terms.A, terms.B, terms.V, terms.w)]
    call = lambda x, *tensors: Attention(*tensors[:2], 0.3, *tensors[2:]).accumulate(x.new_zeros(3, D_OUT), x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *tensors))


def test_dropout_acts_on_the_mixture_and_not_on_the_scores():
    terms, x, y = attention(3), torch.randn(400, D_IN).double(), torch.zeros(400, D_OUT).double()
    torch.manual_seed(0)
    once = terms.accumulate(y, x, 0.5)
    assert not torch.allclose(once, terms.accumulate(y, x, 0.5))
    mean = torch.stack([terms.accumulate(y, x, 0.5) for _ in range(400)]).mean(0)
    wanted = terms.accumulate(y, x)
    assert (mean - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("selector", ["all", "new"])
def test_tasks_train_their_lora_and_the_selector_and_keep_the_old_ones(selector):
    rule = method("amlora", selector=selector)
    learn(rule, 1)
    old, V = rule.current.clone(), rule.state["V"]
    trained = begin(rule, 2)
    shapes = {tuple(p.shape) for p in trained}
    assert (2 if selector == "all" else 1, 64, 24) in shapes and (4, 40) in shapes
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    inside = [layer.delta() for layer in rule.layers]
    rule.route(None)
    rule.after_task(2, None)
    rule.learned = {}
    rule.select(None)
    for layer, A, B, V_1, V_2, before in zip(rule.layers, old.A, old.B, V, rule.state["V"], inside, strict=True):
        assert torch.equal(layer.A[:4], A) and torch.equal(layer.B[:, :4], B)
        assert V_2.shape[0] == 2 and torch.equal(V_2[0], V_1[0]) == (selector == "new")
        torch.testing.assert_close(layer.delta(), before)


def test_the_attention_depends_on_the_input_and_what_ships_is_the_mean(tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, "amlora", l1=0.01)
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
    layer = learner.layers[0]
    terms = learner.method.terms(layer)
    weights = terms.weights(terms.scores(torch.randn(9, layer.A.shape[1])))
    assert weights.shape == (9, 2) and weights.std(0).min() > 0
    shipped = learner.method.shipped()
    torch.testing.assert_close(3 * shipped.B[0], layer.B.detach())
    function = logits(model)
    model.train()
    model(**batch(3)).loss.backward()  # nothing of the last task's L1 is left
    assert torch.equal(logits(model), function)
