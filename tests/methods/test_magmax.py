"""MagMax: streaming equals batch, the winner's sign, and the low-rank form."""

import pytest
import torch

from mbf.methods.magmax import max_magnitude
from tests.methods.plain import assert_same, deltas, learn, method

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def batch_max(taus):
    stacked = torch.stack(taus)
    return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]


def test_streaming_equals_batch_over_factors():
    rule = method("magmax")
    origin = rule.current.clone()
    tuned = [learn(rule, i)[1] for i in range(1, 6)]
    for factor in ("A", "B"):
        for n, merged in enumerate(getattr(rule.current, factor)):
            zero = getattr(origin, factor)[n]
            tau = batch_max([getattr(ft, factor)[n] - zero for ft in tuned])
            torch.testing.assert_close(merged, zero + 0.5 * tau, **CLOSE)
            assert ((merged - zero).abs() >= 0.5 * (getattr(tuned[0], factor)[n] - zero).abs() - 1e-6).all()


def test_first_task_is_scaled_and_the_next_starts_from_the_last_finetuned():
    rule = method("magmax", scaling=0.8)
    origin = rule.current.clone()
    _, ft1, merged = learn(rule, 1)
    assert_same(merged.B, [0.8 * B for B in ft1.B], **CLOSE)
    assert_same(merged.A, [a + 0.8 * (b - a) for a, b in zip(origin.A, ft1.A, strict=True)], **CLOSE)
    start, _, _ = learn(rule, 2)
    assert_same(start.A, ft1.A)
    assert_same(start.B, ft1.B)


def test_ties_go_to_the_later_task():
    assert max_magnitude(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 1.0])).tolist() == [-1.0, -2.0]


def test_delta_ships_the_best_approximation_of_the_dense_maximum():
    rule = method("magmax", space="delta", scaling=1.0)
    dense = [deltas(learn(rule, i)[1]) for i in range(1, 4)]
    for n, merged in enumerate(deltas(rule.current)):
        best = batch_max([d[n] for d in dense])
        assert torch.equal(rule.state["delta"][n], best)
        optimal = torch.linalg.svdvals(best)[4:].norm()
        assert (merged - best).norm() <= 1.05 * optimal


def test_state_survives_its_own_dictionary():
    rule = method("magmax")
    learn(rule, 1)
    learn(rule, 2)
    twin = method("magmax")
    twin.load_state_dict(rule.state_dict())
    assert set(twin.state) == {"origin", "ft", "tau"}
    for key, value in rule.state.items():
        assert_same(twin.state[key].A, value.A)
        assert_same(twin.state[key].B, value.B)


def test_an_adapter_trained_elsewhere_has_no_origin():
    rule = method("magmax")
    rule.merged = rule.current.clone()
    with pytest.raises(ValueError, match="space='delta'"):
        rule.after_task(1, None)
