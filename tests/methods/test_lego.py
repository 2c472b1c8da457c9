"""LoRA-LEGO: units, clusters and both reweightings against plain loops; gauge, order and rank."""

import pytest
import torch
from peft import PeftModel

import mbf
from mbf.continual import merge_adapters
from mbf.methods import Factors, get
from mbf.methods.lego import balanced, k_means
from tests.continual.tiny import base_model, logits, peft_model, train
from tests.methods.plain import assert_same, deltas, learn, method

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def lora(seed, r=4, d_out=24, d_in=40):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)


def merged(tasks, **options):
    A, B = get("lego")(**options).merge_layer(0, tasks)
    return B @ A


def plain(tasks, K, norm="inf", reweight=True, output=True, balance=True):
    """The module's formula with lists of units, one at a time."""
    units = []
    for A, B in tasks:
        for a, b in zip(A.double(), B.double().mT, strict=True):
            c = (b.norm() / a.norm()).sqrt() * a[a.abs().argmax()].sign() if balance else 1.0
            units.append((c * a, b / c))
    units.sort(key=lambda u: -(u[0].norm() * u[1].norm()).item())
    x = [torch.cat([a / a.norm(), b / b.norm()]) for a, b in units]
    centres = [x[0]]
    while len(centres) < K:
        centres.append(max(x, key=lambda row: min((row - c).norm().item() for c in centres)))
    for _ in range(100):
        cluster = [min(range(K), key=lambda k: (row - centres[k]).norm().item()) for row in x]
        members = [[row for row, c in zip(x, cluster, strict=True) if c == k] for k in range(K)]
        centres = [torch.stack(m).mean(0) if m else c for m, c in zip(members, centres, strict=True)]
    dW = torch.zeros(tasks[0][1].shape[0], tasks[0][0].shape[1], dtype=torch.float64)
    for k in range(K):
        mine = [u for u, c in zip(units, cluster, strict=True) if c == k]
        if not mine:
            continue
        a, b = (torch.stack(half).mean(0) for half in zip(*mine, strict=True))
        if reweight:
            order = torch.inf if norm == "inf" else 2
            length = torch.stack([torch.linalg.vector_norm(torch.cat(u), order) for u in mine]).mean()
            factor = length / torch.linalg.vector_norm(torch.cat([a, b]), order)
            a, b = factor * a, factor * b
        dW += torch.outer(b, a)
    r = len(units) / len(tasks)
    return (dW * ((r / K) ** 0.5 if output else 1.0)).float(), cluster


@pytest.mark.parametrize("K", [1, 3, 4, 7])
@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"norm": "l2"}, {"norm": "l2"}),
        ({"reweight_parameters": False}, {"reweight": False}),
        ({"reweight_output": False}, {"output": False}),
        ({"balance": False}, {"balance": False}),
    ],
    ids=str,
)
def test_the_merge_is_the_formula(options, formula, K):
    tasks = [lora(seed) for seed in range(3)]
    wanted, cluster = plain(tasks, K, **formula)
    assert len(set(cluster)) == K
    torch.testing.assert_close(merged(tasks, clusters=K, **options), wanted, **CLOSE)


def test_every_unit_its_own_cluster_gives_the_sum_over_the_root_of_T():
    tasks = [lora(seed) for seed in range(3)]
    summed = sum(B @ A for A, B in tasks)
    torch.testing.assert_close(merged(tasks, clusters=12), summed / 3**0.5, **CLOSE)
    torch.testing.assert_close(merged(tasks, clusters=50), summed / 3**0.5, **CLOSE)
    twice = [tasks[0], tasks[0]]  # equal units are not one
    torch.testing.assert_close(merged(twice, clusters=8), 2**0.5 * tasks[0][1] @ tasks[0][0], **CLOSE)
    ragged = [lora(0, r=2), lora(1, r=6), lora(2, r=4)]
    torch.testing.assert_close(merged(ragged, clusters=12), sum(B @ A for A, B in ragged) / 3**0.5, **CLOSE)


def test_one_task_at_its_own_rank_is_returned():
    rule = method("lego")
    _, tuned, _ = learn(rule, 1)
    assert_same(deltas(rule.current), deltas(tuned), **CLOSE)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_order_of_ranks_and_tasks_is_nobody_s_business(normalise):
    tasks = [lora(seed) for seed in range(3)]
    first = merged(tasks, normalise=normalise)
    shuffled = []
    for seed in (2, 0, 1):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        shuffled.append((tasks[seed][0][order], tasks[seed][1][:, order]))
    torch.testing.assert_close(merged(shuffled, normalise=normalise), first, rtol=1e-5, atol=1e-6)


def test_the_gauge_of_a_unit_changes_nothing_once_halves_are_balanced():
    tasks = [lora(seed) for seed in range(3)]
    c = torch.tensor([2.0, -0.3, 5.0, -1.0])
    gauged = [(A * c[:, None], B / c) for A, B in tasks]
    for options in ({}, {"normalise": False}, {"norm": "l2"}):
        torch.testing.assert_close(merged(gauged, **options), merged(tasks, **options), **CLOSE)
    apart = merged(gauged, balance=False) - merged(tasks, balance=False)
    assert apart.norm() > 0.1 * merged(tasks, balance=False).norm()


def test_balanced_units_are_the_same_function_with_halves_of_one_length():
    A, B = lora(0)
    A[1], B[:, 2] = 0.0, 0.0
    a, b = balanced(A.double(), B.mT.double())
    for unit in range(4):
        torch.testing.assert_close(torch.outer(b[unit], a[unit]), torch.outer(B[:, unit], A[unit]).double())
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
    assert not a[1:3].any() and not b[1:3].any()
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) >= 0).all()


def test_k_means_goes_on_until_nothing_changes():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(40, 2, generator=g, dtype=torch.float64)
    centres = [x[0]]
    while len(centres) < 5:
        centres.append(max(x, key=lambda row: min((row - c).norm().item() for c in centres)))
    rounds = []
    while len(rounds) < 2 or rounds[-1] != rounds[-2]:
        rounds.append([min(range(5), key=lambda k: (row - centres[k]).norm().item()) for row in x])
        members = [[row for row, c in zip(x, rounds[-1], strict=True) if c == k] for k in range(5)]
        centres = [torch.stack(m).mean(0) for m in members]
    assert len(rounds) > 4
    for n in (1, 2, 3):
        assert k_means(x, 5, n).tolist() == rounds[n - 1]
    assert k_means(x, 5, 100).tolist() == rounds[-1] != rounds[0]


def test_units_close_to_one_another_become_one():
    """Three tasks with the same four units up to a little noise and any gauge: one LoRA of the mean norm comes out."""
    A, B = torch.eye(4, 40), torch.linalg.qr(lora(0)[1]).Q
    g = torch.Generator().manual_seed(3)
    tasks = []
    for scale in (1.0, 2.0, 3.0):
        order = torch.randperm(4, generator=g)
        c = torch.randn(4, generator=g)
        noise = 1e-4 * torch.randn(4, 40, generator=g)
        tasks.append(((scale * A + noise)[order] * c[:, None], (scale * B)[:, order] / c))
    torch.testing.assert_close(merged(tasks), 4 * B @ A, rtol=1e-2, atol=1e-3)  # the mean of the lengths is 2
    x = torch.randn(6, 3, generator=g).repeat_interleave(2, 0)
    clusters = k_means(x + 1e-3 * torch.randn(12, 3, generator=g), 6, 100)
    assert (clusters[::2] == clusters[1::2]).all() and len(set(clusters.tolist())) == 6


def test_clusters_that_stay_empty_and_units_without_function_are_zero_ranks():
    A, B = lora(0)
    rule = get("lego")()
    merged_A, merged_B = rule.merge_layer(0, [(A, torch.zeros_like(B)), (A, torch.zeros_like(B))])
    assert merged_A.shape == (4, 40) and merged_B.shape == (24, 4) and not (merged_B @ merged_A).any()
    one = (A[:1].repeat(4, 1), B[:, :1].repeat(1, 4))
    merged_A, merged_B = rule.merge_layer(0, [one, one])
    assert merged_A.shape == (4, 40) and int((merged_A != 0).any(1).sum()) == 1
    torch.testing.assert_close(merged_B @ merged_A, torch.outer(B[:, 0], A[0]), **CLOSE)


@pytest.mark.parametrize(("clusters", "ranks"), [(None, [4, 4, 4]), (2, [2, 2, 2]), (6, [4, 6, 6])])
def test_the_rank_is_K_and_each_task_starts_alone_at_its_own(clusters, ranks):
    rule, found = method("lego", clusters=clusters), []
    assert rule.changes_rank is (clusters is not None)
    for i in range(1, 4):
        start, _, now = learn(rule, i)
        assert {A.shape[0] for A in start.A} == {4} and (i == 1 or not any(B.any() for B in start.B))
        found.append(now.A[0].shape[0])
        assert {A.shape[0] for A in now.A} == {found[-1]}
    assert found == ranks


@pytest.mark.parametrize("options", [{}, {"clusters": 7}], ids=str)
def test_the_view_is_the_merge_that_follows_and_every_lora_is_kept(options):
    model = peft_model()
    learner = mbf.ContinualLora(model, "lego", **options)
    tuned = []
    for i in (1, 2, 3):
        with learner.task(f"t{i}"):
            train(model, i)
            inside = logits(model)
            with learner.merged_view():
                view = logits(model)
            assert torch.equal(logits(model), inside)
            tuned.append(learner.method.current.clone())
        torch.testing.assert_close(logits(model), view, **CLOSE)
        assert i == 1 or (view - inside).abs().max() > 1e-3
    for kept, one in zip(learner.method.tasks(), tuned, strict=True):
        assert_same(kept.A, one.A)
        assert_same(kept.B, one.B)


def test_adapters_of_several_ranks_merge_without_a_model_as_in_the_learner(tmp_path):
    paths, factors = [], []
    for seed, r in enumerate((4, 6, 2)):
        torch.manual_seed(seed)
        model = peft_model(r=r, lora_alpha=2 * r)
        train(model, seed)
        model.save_pretrained(tmp_path / f"a{seed}")
        paths.append(tmp_path / f"a{seed}")
        factors.append(mbf.ContinualLora(model, learnt=False).method.current.clone())
    report = merge_adapters(paths, tmp_path / "out", "lego", norm="l2")
    found = mbf.ContinualLora(PeftModel.from_pretrained(base_model(), report.path), "seqlora", learnt=False)
    rule = get("lego")(norm="l2")
    rule.layers = found.layers
    wanted: Factors = rule.merge(factors)
    assert [A.shape[0] for A in wanted.A] == [4] * 6
    assert_same(deltas(found.method.current), deltas(wanted), **CLOSE)
