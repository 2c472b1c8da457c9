"""LoRAC-IPC: the weights of old LoRAs, orthonormal rows across tasks, importance, and layers that are frozen."""

import pytest
import torch

import mbf
from mbf.methods.lorac_ipc import off_identity, off_orthonormal
from tests.continual.tiny import logits, peft_model, train
from tests.methods.plain import PlainLayer, begin, data, end, learn, method


def in_task(i, **options):
    """Task i has begun; every LoRA and ω so far is random."""
    rule = method("lorac_ipc", **options)
    for task in range(1, i + 1):
        begin(rule, task)
        with torch.no_grad():
            for layer in rule.layers:
                layer.A.normal_()
                layer.B.normal_()
            for omega in rule.learned.get("omega", []):
                omega.add_(torch.rand_like(omega))
        if task < i:
            end(rule, task)
    return rule


def parts(rule, n, r=4):
    return list(zip(rule.merged.A[n].split(r), rule.state["B"][n].split(r, 1), strict=True))


def test_the_function_is_that_of_the_formula_and_the_hand_over_keeps_it():
    rule = in_task(3)
    inside = []
    for n, layer in enumerate(rule.layers):
        omega = rule.learned["omega"][n].detach()
        assert omega.shape == (2,) and (omega != 1).any()
        old = sum(w * B @ A for w, (A, B) in zip(omega, parts(rule, n), strict=True))
        wanted = layer.scale * (old + layer.B @ layer.A).detach()
        torch.testing.assert_close(layer.delta(), wanted, rtol=1e-4, atol=1e-4)
        inside.append(layer.delta())
    end(rule, 3)
    for layer, before in zip(rule.layers, inside, strict=True):
        torch.testing.assert_close(layer.delta(), before, rtol=1e-4, atol=1e-4)


def test_i_the_penalty_is_zero_for_orthonormal_rows_alone():
    Q = torch.linalg.qr(torch.randn(30, 12).double()).Q.T
    assert off_orthonormal(Q[:8], Q[8:]) < 1e-12
    assert off_orthonormal(Q[:8], 1.1 * Q[8:]) == pytest.approx(4**0.5 * 0.21)  # rows too long
    leaning = 0.6 * Q[0] + 0.8 * Q[11]
    assert off_orthonormal(Q[:8], leaning[None]) == pytest.approx(2**0.5 * 0.6)  # one old row met, seen twice
    A = torch.randn(4, 30).double().requires_grad_()
    rows = torch.cat([Q[:8], A])
    wanted = torch.autograd.grad((rows @ rows.T - torch.eye(12)).square().sum().sqrt(), A)[0]
    for rest in (None, off_identity(Q[:8]).norm()):
        torch.testing.assert_close(torch.autograd.grad(off_orthonormal(Q[:8], A, rest), A)[0], wanted)
    rows = torch.eye(3).requires_grad_()  # zero to the last bit
    off_orthonormal(torch.zeros(0, 3), rows).backward()
    assert torch.equal(rows.grad, torch.zeros(3, 3))


def off(rows):
    """‖Q Qᵀ − I‖_F of the rows together."""
    return (rows @ rows.T - torch.eye(len(rows))).square().sum().sqrt()


@pytest.mark.parametrize("i", [1, 3])
def test_the_loss_sums_it_over_layers_and_old_rows(i):
    rule = in_task(i, penalty=0.7)
    old = rule.merged.A if i > 1 else [layer.A[:0] for layer in rule.layers]
    wanted = 0.7 * sum(off(torch.cat([rows.detach(), layer.A])) for rows, layer in zip(old, rule.layers, strict=True))
    torch.testing.assert_close(rule.loss_extra(), wanted)
    factors = [layer.A for layer in rule.layers]
    found, wanted = (torch.autograd.grad(loss, factors) for loss in (rule.loss_extra(), wanted))
    torch.testing.assert_close(found, wanted)
    assert in_task(i, penalty=0).loss_extra() is None


def test_ii_weights_of_one_are_inclora():
    rule, plain = method("lorac_ipc"), method("inclora")
    for ours, theirs in zip(rule.layers, plain.layers, strict=True):
        theirs.W = ours.W
        theirs.write(ours.A, ours.B)
    for i in (1, 2, 3):
        torch.manual_seed(i)
        _, tuned, _ = learn(rule, i)
        torch.manual_seed(i)
        learn(plain, i, tuned)
        for ours, theirs in zip(rule.layers, plain.layers, strict=True):
            torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-5, atol=1e-5)


def steps(rule, count, seed=0):
    """Optimiser steps with the importance, towards random outputs."""
    parameters = [p for layer in rule.layers for p in (layer.A, layer.B)]
    own = [p for values in rule.learned.values() for p in values]
    optimizer = torch.optim.SGD([*parameters, *own], lr=1e-5)
    for step in range(count):
        optimizer.zero_grad()
        rule.model(**data(seed + step)[0]).loss.backward()
        with torch.no_grad():
            rule.after_backward()
        optimizer.step()


def test_importance_is_that_of_the_formula():
    rule = in_task(1, beta1=0.7, beta2=0.6, threshold=0.4)
    layer, scores = rule.layers[1], []
    for name in ("A", "B"):
        theta = getattr(layer, name)
        mean, deviation = torch.zeros_like(theta), torch.zeros_like(theta)
        for step in range(3):
            steps(rule, 1, seed=step)
            now = ((theta + 1e-5 * theta.grad) * theta.grad).abs()  # theta as it was before the step
            mean = 0.7 * mean + 0.3 * now
            deviation = 0.6 * deviation + 0.4 * (now - mean).abs()
        place = 2 + (name == "B")
        torch.testing.assert_close(rule.state["mean"][place], mean.detach())
        torch.testing.assert_close(rule.state["deviation"][place], deviation.detach())
        scores.append(float((mean * deviation).mean()))
        rule.init_adapter(1)  # from zero again
    assert not any(one.any() for one in rule.state["mean"]) and min(scores) > 0


def test_a_layer_counts_with_the_mean_of_the_products_over_both_factors():
    """The third layer is ahead by its Ī U, but not by Ī, by U, by one factor or by the sum over its fewer entries."""
    rule = in_task(1, threshold=0.4)  # one of three
    mean, deviation = [], []
    for layer, of_A, of_B, U in zip(rule.layers, (1.2, 0.0, 0.9), (0.0, 1.2, 0.9), (0.25, 4.0, 1.0), strict=True):
        mean += [torch.full_like(layer.A, of_A / U), torch.full_like(layer.B, of_B / U)]
        deviation += [torch.full_like(layer.A, U), torch.full_like(layer.B, U)]
    rule.state = {**rule.state, "mean": mean, "deviation": deviation}
    end(rule, 1)
    assert rule.state["frozen"].tolist() == [0, 0, 1]


def test_iii_a_frozen_layer_computes_the_same_after_later_tasks():
    rule = in_task(1, threshold=0.4)
    steps(rule, 3)
    end(rule, 1)
    (n,) = rule.state["frozen"].nonzero()[:, 0].tolist()
    kept, shape, bits = rule.layers[n].delta(), rule.layers[n].A.shape, rule.current.B[n].clone()
    for i in (2, 3):
        begin(rule, i)
        steps(rule, 3, seed=10 * i)
        trained = [rule.layers[n].A, rule.layers[n].B, rule.learned["omega"][n]]
        assert all(p.grad is not None and not p.grad.any() for p in trained)  # there, as DDP waits for it
        with torch.no_grad():  # whatever an optimiser does all the same
            for p in trained:
                p.normal_()
        torch.testing.assert_close(rule.layers[n].delta(), kept, rtol=1e-5, atol=1e-6)
        others = [layer.delta() for m, layer in enumerate(rule.layers) if m != n]
        end(rule, i)
        assert rule.layers[n].A.shape == shape and torch.equal(rule.current.B[n], bits)
        now = [layer.delta() for m, layer in enumerate(rule.layers) if m != n]
        torch.testing.assert_close(now, others, rtol=1e-4, atol=1e-4)
        assert rule.state["frozen"][n] == 1 and rule.state["frozen"].sum() == i


def test_a_frozen_layer_is_out_of_the_penalty():
    rule = in_task(2, threshold=0.4, penalty=1.0)
    end(rule, 2)
    rule.state = {**rule.state, "frozen": torch.tensor([0, 1, 0])}
    begin(rule, 3)
    wanted = [off(torch.cat([rule.merged.A[n], rule.layers[n].A])) for n in (0, 2)]
    torch.testing.assert_close(rule.loss_extra(), sum(wanted))
    rule.route(None)
    rule.write(rule.merged)
    rule.learned = {}
    rule.state = {**rule.state, "frozen": torch.tensor([1, 1, 1])}
    begin(rule, 3)
    assert rule.loss_extra() is None
    rule.after_backward()


def test_iv_old_factors_have_no_gradient_and_omega_that_of_the_direction():
    rule = in_task(3)
    for n, layer in enumerate(rule.layers):
        x, dy = torch.randn(7, layer.A.shape[1]), torch.randn(7, layer.B.shape[0])
        assert not rule.merged.A[n].requires_grad and not rule.state["B"][n].requires_grad
        layer(x).backward(dy)
        dW = dy.T @ x
        wanted = torch.stack([layer.scale * (dW * (B @ A)).sum() for A, B in parts(rule, n)])
        torch.testing.assert_close(rule.learned["omega"][n].grad, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "threshold", "counts"),
    [(20, 0.05, [1, 2]), (29, 0.1, [2, 4]), (100, 0.29, [29, 58]), (20, 0.0, [0, 0]), (20, 1.0, [20, 20])],
)
def test_v_the_share_of_all_layers_is_rounded_down(layers, threshold, counts):
    rule = method("lorac_ipc", threshold=threshold)
    rule.layers = [PlainLayer(f"layer{n}", 6, 9, 2) for n in range(layers)]
    worth = [1.0 + (7 * n) % 5 + n / 100 for n in range(layers)]
    frozen = []
    for i, count in enumerate(counts, 1):
        begin(rule, i)
        with torch.no_grad():
            for value, layer in zip(worth, rule.layers, strict=True):
                layer.A.fill_(1.0)
                layer.A.grad = torch.full_like(layer.A, value)
            rule.after_backward()
        end(rule, i)
        frozen = rule.state["frozen"].nonzero()[:, 0].tolist()
        assert frozen == sorted(sorted(range(layers), key=lambda n: -worth[n])[:count])


def test_a_task_that_was_not_learnt_freezes_nothing():
    rule = method("lorac_ipc", threshold=1.0)
    learn(rule, 1)
    assert rule.state["frozen"].tolist() == [0, 0, 0]
    begin(rule, 2)
    for layer in rule.layers[:2]:
        layer.B.data.normal_()
        layer.B.grad = torch.ones_like(layer.B)
    rule.after_backward()
    end(rule, 2)
    assert rule.state["frozen"].tolist() == [1, 1, 0]


def test_omega_moves_in_its_own_steps():
    rule = in_task(2, omega_scale=0.25)
    for n, omega in enumerate(rule.learned["omega"]):
        omega.data.fill_(3.0)
        torch.testing.assert_close(rule._omega(n).detach(), torch.tensor([1.5]))


def test_more_rows_than_columns_are_warned_of():
    rule = method("lorac_ipc", r=9)
    learn(rule, 1)
    with pytest.warns(UserWarning, match="task 2: 18 rows of layer2 cannot be orthonormal, as d_in is 17"):
        begin(rule, 2)


def test_training_brings_the_rows_of_a_llama_towards_orthonormal():
    found = {}
    for penalty in (0.0, 1.0):
        model = peft_model(r=2)
        learner = mbf.ContinualLora(model, "lorac_ipc", penalty=penalty, threshold=0.2)
        for i in (1, 2):
            with learner.task(f"t{i}"):
                train(model, i, steps=15)
                inside = logits(model)
            torch.testing.assert_close(logits(model), inside, rtol=1e-4, atol=1e-4)
        found[penalty] = sum(float(off_orthonormal(layer.A[:0], layer.A)) for layer in learner.layers)
        assert learner.method.state["frozen"].sum() == 2
        assert sorted(learner.method.state) == ["B", "frozen", "omega"]
    assert found[1.0] < 0.7 * found[0.0]
