"""C-LoRA: what the routes compute, through which the factors learn, and what is kept."""

import pytest
import torch

import mbf
from mbf.methods.clora import overlap, routed
from tests.continual.tiny import logits, peft_model, train
from tests.methods.plain import begin, end, method

R, D_IN, D_OUT, S = 4, 11, 7, 0.7


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def in_task(i, **options):
    """Task i has begun, A, B and R random."""
    rule = method("clora", **options)
    for task in range(1, i + 1):
        begin(rule, task)
        with torch.no_grad():
            for layer in rule.layers:
                layer.A.normal_()
                layer.B.normal_()
            for delta in rule.learned["R"]:
                delta.normal_()
        if task < i:
            end(rule, task)
    return rule


def test_i_the_value_is_the_sum_of_both_routes():
    A, B, old, delta, x = draw(R, D_IN), draw(D_OUT, R), draw(R, R), draw(R, R), draw(5, D_IN)
    y = routed(A, B, old, delta, S).accumulate(torch.zeros(5, D_OUT).double(), x)
    torch.testing.assert_close(y, S * x @ (B @ old @ A + B @ delta @ A).T)
    torch.testing.assert_close(y, S * x @ (B @ (old + delta) @ A).T)


def test_ii_the_penalty_vanishes_for_routes_of_their_own():
    axis = torch.zeros(R, R).double()
    first, second, other = axis.clone(), axis.clone(), axis.clone()
    first[0, 0] = second[1, 2] = other[0, 3] = 1
    assert overlap(first, second) == 0 and overlap(first, other) == 1 and overlap(first, first) == 1
    old = torch.linalg.qr(draw(R, R)).Q
    assert overlap(old[:, :2] @ draw(2, R), old[:, 2:] @ draw(2, R)) < 1e-20
    delta = draw(R, R)
    torch.testing.assert_close(overlap(old, delta), delta.square().sum())  # full rank: a pull to zero


def test_iii_gradients_flow_through_the_new_route_alone():
    A, B = draw(R, D_IN).requires_grad_(), draw(D_OUT, R).requires_grad_()
    old, delta, x, dy = draw(R, R), draw(R, R).requires_grad_(), draw(5, D_IN).requires_grad_(), draw(5, D_OUT)
    routed(A, B, old, delta, S).accumulate(torch.zeros(5, D_OUT).double(), x).backward(dy)
    h = x @ A.T
    torch.testing.assert_close(B.grad, S * dy.T @ h @ delta.T)
    torch.testing.assert_close(A.grad, S * delta.T @ B.T @ dy.T @ x)
    torch.testing.assert_close(delta.grad, S * B.T @ dy.T @ h)
    torch.testing.assert_close(x.grad, S * dy @ B @ (old + delta) @ A)  # what is below sees the whole function


def test_the_first_task_starts_as_plain_lora_and_trains_its_route():
    rule = method("clora")
    begin(rule, 1)
    for n, layer in enumerate(rule.layers):
        x, dy = torch.randn(6, layer.A.shape[1]), torch.randn(6, layer.B.shape[0])
        for B in (layer.B.detach().clone(), torch.randn_like(layer.B)):  # zero, as it starts, and later
            layer.B.data.copy_(B)
            plain_A, plain_B = layer.A.detach().clone().requires_grad_(), B.clone().requires_grad_()
            (layer.scale * x @ plain_A.T @ plain_B.T * dy).sum().backward()
            rule.model.zero_grad()
            rule.learned["R"][n].grad = None
            layer(x).backward(dy)
            torch.testing.assert_close(layer.A.grad, plain_A.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.B.grad, plain_B.grad, rtol=1e-4, atol=1e-4)
            wanted = layer.scale * B.T @ dy.T @ x @ layer.A.detach().T
            torch.testing.assert_close(rule.learned["R"][n].grad, wanted, rtol=1e-4, atol=1e-4)


def test_iv_no_new_route_no_gradient():
    rule = in_task(2)
    for n, layer in enumerate(rule.layers):
        rule.learned["R"][n].data.zero_()
        layer(torch.randn(6, layer.A.shape[1])).square().sum().backward()
        assert not layer.A.grad.any() and not layer.B.grad.any()
        assert rule.learned["R"][n].grad.abs().max() > 0


def test_v_blocks_of_one_scalar_are_a_weighted_sum_of_loras():
    A, B, x, weights = draw(6, D_IN), draw(D_OUT, 6), draw(5, D_IN), [0.3, -1.2, 2.0]
    R_old = torch.block_diag(*(w * torch.eye(2).double() for w in weights))
    y = routed(A, B, R_old, torch.zeros(6, 6).double(), S).accumulate(torch.zeros(5, D_OUT).double(), x)
    parts = zip(weights, A.split(2), B.split(2, 1), strict=True)
    torch.testing.assert_close(y, S * sum(w * x @ a.T @ b.T for w, a, b in parts))


@pytest.mark.parametrize("i", [1, 2, 3])
def test_the_layers_compute_it_and_the_adapter_holds_it(i):
    rule = in_task(i)
    inside = []
    for n, layer in enumerate(rule.layers):
        total = rule.learned["R"][n] + (rule.state["R"][n] if i > 1 else 0)
        wanted = (layer.scale * layer.B @ total @ layer.A).detach()
        torch.testing.assert_close(layer.delta(), wanted, rtol=1e-4, atol=1e-4)
        inside.append((layer.delta(), total.detach()))
    B = [layer.B.detach().clone() for layer in rule.layers]
    end(rule, i)
    for n, (layer, (before, total)) in enumerate(zip(rule.layers, inside, strict=True)):
        torch.testing.assert_close(layer.delta(), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rule.state["R"][n], total)
        assert torch.equal(rule.state["B"][n], B[n])


def test_the_next_task_starts_from_the_function_but_for_a_small_new_route():
    rule = in_task(2, delta_std=1e-6)
    end(rule, 2)
    before = [layer.delta() for layer in rule.layers]
    begin(rule, 3)
    for n, layer in enumerate(rule.layers):
        torch.testing.assert_close(layer.delta(), before[n], rtol=1e-3, atol=1e-3)
        assert 0 < rule.learned["R"][n].abs().max() < 1e-5


def test_the_penalty_is_of_later_tasks():
    rule = in_task(1)
    assert rule.loss_extra() is None
    rule = in_task(3, penalty=0.3)
    wanted = 0.3 * sum(overlap(old, delta) for old, delta in zip(rule.state["R"], rule.learned["R"], strict=True))
    torch.testing.assert_close(rule.loss_extra(), wanted)


@pytest.mark.parametrize(("freeze", "trained"), [("none", (1, 1)), ("A", (0, 1)), ("B", (1, 0)), ("both", (0, 0))])
def test_factors_may_be_kept_after_the_first_task(freeze, trained):
    model = peft_model()
    learner = mbf.ContinualLora(model, "clora", freeze=freeze)
    with learner.task("t1"):
        train(model, 1)
    A, B = [layer.A.detach().clone() for layer in learner.layers], learner.method.state["B"]
    before = logits(model)
    with learner.task("t2"):
        train(model, 2)
        inside = logits(model)
    torch.testing.assert_close(logits(model), inside, rtol=1e-4, atol=1e-4)
    assert (inside - before).abs().max() > 1e-3
    moved = [not torch.equal(layer.A, old) for layer, old in zip(learner.layers, A, strict=True)]
    moved_B = [not torch.equal(a, b) for a, b in zip(B, learner.method.state["B"], strict=True)]
    assert (all(moved), all(moved_B)) == tuple(map(bool, trained)) and (any(moved), any(moved_B)) == (
        all(moved),
        all(moved_B),
    )
