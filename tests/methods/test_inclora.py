"""IncLoRA and O-LoRA: the concatenation identity, frozen history, and the penalty."""

import torch

from mbf.methods import Factors
from tests.methods.plain import assert_same, deltas, learn, method

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_what_is_shipped_is_the_sum_of_all_loras():
    rule = method("inclora")
    tuned = [learn(rule, i)[1] for i in (1, 2, 3)]
    assert {A.shape[0] for A in rule.current.A} == {12}
    for n, dW in enumerate(deltas(rule.current)):
        torch.testing.assert_close(dW, sum(deltas(ft)[n] for ft in tuned), **CLOSE)
    assert_same([A[:4] for A in rule.current.A], tuned[0].A)
    assert_same([B[:, 8:] for B in rule.current.B], tuned[2].B)
    assert rule.state == {}


def test_a_new_task_starts_as_the_old_function_and_trains_only_new_factors():
    rule = method("inclora")
    _, _, merged = learn(rule, 1)
    rule.merged = rule.current.clone()
    rule.init_adapter(2)
    layer = rule.layers[2]
    assert layer.A.shape[0] == 4 and not layer.B.any()
    terms = layer.terms(layer)
    torch.testing.assert_close(terms.B @ terms.A, deltas(merged)[2], **CLOSE)
    (terms.B @ terms.A).square().sum().backward()
    assert layer.B.grad.norm() > 0
    assert not rule.merged.A[2].requires_grad


def start_task_2(l1=0.5, l2=0.0):
    rule = method("olora", l1=l1, l2=l2)
    _, ft1, _ = learn(rule, 1)
    rule.merged = rule.current.clone()
    rule.init_adapter(2)
    return rule, ft1


def test_penalty_is_the_papers_and_its_gradient_is_analytic():
    rule, ft1 = start_task_2()
    penalty = rule.loss_extra()
    expected = 0.5 * sum((old @ layer.A.mT).abs().sum() for old, layer in zip(ft1.A, rule.layers, strict=True))
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    for old, layer in zip(ft1.A, rule.layers, strict=True):
        torch.testing.assert_close(layer.A.grad, 0.5 * torch.sign(old @ layer.A.mT).mT @ old, **CLOSE)
        assert layer.B.grad is None
    for layer in rule.layers:
        layer.A.data.mul_(2)
    torch.testing.assert_close(rule.loss_extra(), 2 * penalty)


def test_penalty_vanishes_exactly_on_orthogonal_rows():
    rule, ft1 = start_task_2()
    with torch.no_grad():
        for old, layer in zip(ft1.A, rule.layers, strict=True):
            Q = torch.linalg.qr(old.mT).Q
            layer.A -= layer.A @ Q @ Q.mT
    assert rule.loss_extra() < 1e-3
    assert rule.layers[0].A.norm() > 0.5


def test_no_penalty_in_task_1_and_l2_counts_current_factors():
    assert method("olora").loss_extra() is None
    rule, _ = start_task_2(l1=0, l2=0.1)
    expected = 0.1 * sum(layer.A.norm() + layer.B.norm() for layer in rule.layers)
    torch.testing.assert_close(rule.loss_extra(), expected)


def test_three_tasks_keep_the_first_ranks_apart():
    rule = method("olora")
    first = learn(rule, 1)[1]
    second = learn(rule, 2)[1]
    rule.merged = rule.current.clone()
    rule.init_adapter(3)
    old = Factors([torch.cat(pair) for pair in zip(first.A, second.A, strict=True)], [])
    assert_same(rule.merged.A, old.A)
    assert rule.layers[0].A.shape[0] == 4
