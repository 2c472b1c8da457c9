"""SLAO: Algorithm 1, the closed form of the merge, and each of the paper's ablations."""

import math

import pytest
import torch
from pydantic import ValidationError

from mbf.methods.slao import ABLATIONS, SCHEDULES
from tests.methods.plain import assert_same, deltas, learn, method, random_factors

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def orthonormal(A):
    return [torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), **CLOSE) for a in A]


def test_algorithm_1_against_torch_qr():
    rule = method("slao")
    _, ft1, merged1 = learn(rule, 1)
    assert_same(merged1.A, ft1.A)
    assert_same(merged1.B, ft1.B)
    start, ft2, merged2 = learn(rule, 2)
    for A_ft, A in zip(ft1.A, start.A, strict=True):
        Q, R = torch.linalg.qr(A_ft.mT)
        signs = torch.where(R.diagonal() >= 0, 1.0, -1.0)
        torch.testing.assert_close(A, (Q * signs).mT, **CLOSE)
    assert_same(start.B, ft1.B)  # B_ft, not B_merge (equal here; the next task tells them apart)
    assert_same(merged2.A, ft2.A)
    assert_same(merged2.B, [b1 + (b2 - b1) / math.sqrt(2) for b1, b2 in zip(ft1.B, ft2.B, strict=True)], **CLOSE)
    start3, ft3, merged3 = learn(rule, 3)
    assert_same(start3.B, ft2.B)
    assert not torch.equal(start3.B[0], merged2.B[0])
    orthonormal(start3.A)
    assert_same(merged3.B, [m + (b - m) / math.sqrt(3) for m, b in zip(merged2.B, ft3.B, strict=True)], **CLOSE)


def test_the_boundary_is_one_call_and_a_resumed_run_starts_alike():
    """The basis of the next task comes with the merge; without it, as after a resume, it's taken from the state."""
    rule = method("slao")
    learn(rule, 1)
    with torch.autograd.profiler.profile() as profile:
        learn(rule, 2)
    names = [event.name for event in profile.function_events]
    assert names.count("mbf::task_boundary_") == 1 and names.count("mbf::orthonormal_rows") == 1  # of task 1's A
    saved = rule.state_dict()
    with torch.autograd.profiler.profile() as profile:
        rule.init_adapter(3)
    assert "mbf::orthonormal_rows" not in [event.name for event in profile.function_events]
    start = rule.current.clone()
    rule.init_adapter(3)  # begun again: an interrupted task was undone
    assert_same(rule.current.A, start.A)
    rule.load_state_dict(saved)
    rule.init_adapter(3)
    assert_same(rule.current.A, start.A)
    assert_same(rule.current.B, start.B)


def test_closed_form_of_the_merge_over_thirty_tasks():
    rule, T = method("slao"), 30
    B = [learn(rule, i)[1].B for i in range(1, T + 1)]
    w = [i**-0.5 * math.prod(1 - j**-0.5 for j in range(i + 1, T + 1)) for i in range(1, T + 1)]
    assert sum(w) == pytest.approx(1)
    for n, merged in enumerate(rule.current.B):
        expected = sum(w_i * B_i[n].double() for w_i, B_i in zip(w, B, strict=True))
        torch.testing.assert_close(merged.double(), expected, **CLOSE)


def test_equal_B_are_a_fixed_point_and_state_stays_one_lora():
    rule = method("slao")
    _, first, _ = learn(rule, 1)
    size = rule.state_bytes()
    for i in range(2, 8):
        _, _, merged = learn(rule, i, first)
        assert_same(merged.B, first.B)
    assert rule.state_bytes() == size == first.bytes()


@pytest.mark.parametrize("start", ["last_ft", "last_merge", "zero"])
def test_where_the_next_task_starts(start):
    rule = method("slao", start=start, A_start="as_is")
    learn(rule, 1)
    _, ft2, merged2 = learn(rule, 2)
    start3, _, _ = learn(rule, 3)
    if start == "zero":
        assert all(not B.any() for B in start3.B)
        assert not torch.equal(start3.A[0], ft2.A[0])
    else:
        wanted = ft2 if start == "last_ft" else merged2
        assert_same(start3.A, wanted.A)
        assert_same(start3.B, wanted.B)


def test_random_A_at_the_start_keeps_B():
    rule = method("slao", A_start="random")
    _, ft1, _ = learn(rule, 1)
    start, _, _ = learn(rule, 2)
    assert_same(start.B, ft1.B)
    assert (start.A[0] - ft1.A[0]).norm() > 0.5


@pytest.mark.parametrize("name", ABLATIONS)
def test_what_is_trained_and_merged(name):
    rule = method("slao", **ABLATIONS[name])
    _, ft1, _ = learn(rule, 1)
    _, ft2, merged = learn(rule, 2)
    assert rule.trains(1) == (True, True)
    assert rule.trains(2) == {"FREB": (True, False), "FREA": (False, True), "FTBA": (True, True)}[name[:4]]
    lam = 1 / math.sqrt(2)
    mixed_A = [a + lam * (b - a) for a, b in zip(ft1.A, ft2.A, strict=True)]
    mixed_B = [a + lam * (b - a) for a, b in zip(ft1.B, ft2.B, strict=True)]
    which = name.split("-M")[1]
    assert_same(merged.A, mixed_A if "A" in which else ft2.A, **CLOSE)
    assert_same(merged.B, mixed_B if "B" in which else ft2.B, **CLOSE)


@pytest.mark.parametrize("schedule", [*SCHEDULES, 0.3, lambda i: 1 / (i + 2)])
def test_schedules(schedule):
    rule = method("slao", schedule=schedule)
    _, ft1, _ = learn(rule, 1)
    _, ft2, merged = learn(rule, 2)
    lam = {"1/sqrt(i)": 2**-0.5, "1/i": 0.5, "1/log(i+1)": 1 / math.log(3), 0.3: 0.3}.get(schedule, 0.25)
    assert rule.merge_weight(2) == pytest.approx(lam)
    assert_same(merged.B, [a + lam * (b - a) for a, b in zip(ft1.B, ft2.B, strict=True)], **CLOSE)


@pytest.mark.parametrize("basis", ["qr", "rsvd"])
def test_preserve_starts_from_the_same_function(basis):
    rule = method("slao", basis=basis, B_start="preserve")
    _, ft1, _ = learn(rule, 1)
    start, _, _ = learn(rule, 2)
    orthonormal(start.A)
    assert_same(deltas(start), deltas(ft1), rtol=1e-4, atol=1e-4)


def test_rsvd_basis_is_the_leading_right_singular_vectors():
    rule = method("slao", basis="rsvd")
    _, ft1, _ = learn(rule, 1)
    start, _, _ = learn(rule, 2)
    for dW, A in zip(deltas(ft1), start.A, strict=True):
        _, _, Vh = torch.linalg.svd(dW.double())
        overlap = torch.linalg.svdvals(Vh[: len(A)] @ A.double().mT)
        torch.testing.assert_close(overlap, torch.ones_like(overlap), **CLOSE)
    assert_same(start.B, ft1.B)


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_a_change_of_rank(rank):
    rule = method("slao", basis="rsvd", B_start="preserve", rank=rank)
    _, ft1, merged1 = learn(rule, 1)
    start, ft2, merged2 = learn(rule, 2)
    assert {A.shape[0] for A in start.A} == {rank} == {B.shape[1] for B in merged2.B}
    orthonormal(start.A)
    for dW, best in zip(deltas(ft1), deltas(start), strict=True):
        tail = torch.linalg.svdvals(dW)[rank:].norm()
        assert (dW - best).norm() <= 1.001 * tail + 1e-4  # the best approximation of that rank
    projected = [B @ (A @ A_i.mT) for A, B, A_i in zip(merged1.A, merged1.B, start.A, strict=True)]
    lam = 1 / math.sqrt(2)
    assert_same(merged2.B, [p + lam * (b - p) for p, b in zip(projected, ft2.B, strict=True)], rtol=1e-4, atol=1e-4)
    learn(rule, 3)


def test_merged_terms_are_the_merge_for_any_weight():
    for merge in ("B", "A", "both"):
        rule = method("slao", merge=merge)
        _, ft1, _ = learn(rule, 1)
        rule.merged = rule.current.clone()
        rule.init_adapter(2)
        rule.write(random_factors(rule))
        for weight in (0.0, 0.37, 1.0, torch.tensor(0.5)):
            terms = rule.merged_terms(rule.layers[1], 1, 2, weight)
            lam = float(weight)
            B = rule.layers[1].B if merge == "A" else terms.merged_B + lam * (terms.B - terms.merged_B)
            expected_A = ft1.A[1] + (
                lam * (rule.layers[1].A - ft1.A[1]) if merge != "B" else rule.layers[1].A - ft1.A[1]
            )
            expected_B = rule.layers[1].B if merge == "A" else ft1.B[1] + lam * (rule.layers[1].B - ft1.B[1])
            assert_same([terms.A, B], [expected_A, expected_B], **CLOSE)
        assert rule.merged_terms(rule.layers[0], 0, 2, None).merge_weight == (
            None if merge == "A" else pytest.approx(2**-0.5)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, "only basis='rsvd'"),
        ({"start": "zero", "B_start": "preserve"}, "needs an A that spans"),
        ({"basis": "rsvd", "A_start": "as_is"}, "does nothing"),
        ({"starts": "zero"}, "Extra inputs"),
        ({"schedule": "1/x"}, "schedule"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        method("slao", **options)
