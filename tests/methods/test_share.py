"""Share: reconstruction and its error, the basis, phase 3 alone, the forward with a mix, labels and the mean."""

import itertools

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import mbf
from mbf.continual import merge_adapters
from mbf.methods.share import basis, columns, explaining, shared
from tests.continual.tiny import base_model, batch, logits, peft_model, train
from tests.methods.plain import assert_same, begin, deltas, end, learn, method, random_factors

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"variance": 1.0}


def pairs(T=3, p=4, d_out=24, d_in=40, seed=0):
    """(B_t, A_tᵀ) of T tasks."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(d_out, p, generator=g), torch.randn(d_in, p, generator=g)) for _ in range(T)]


def functions(rule):
    """dW of every layer for each task, by its label."""
    tasks = range(1, 1 + len(rule.state["coeff_beta"][0]))
    found = []
    for task in tasks:
        rule.select(task)
        found.append([layer.delta() for layer in rule.layers])
    rule.select(None)
    return found


@pytest.mark.parametrize("centre", [False, True])
def test_a_whole_basis_rebuilds_every_lora(centre):
    loras = pairs()
    one = shared(loras, 1, 1.0, centre=centre)
    assert one.beta.shape == (24, 12) and one.coeff_beta.shape == (3, 12, 4)
    for t, wanted in enumerate(loras):
        assert_same(list(one.lora(t)), list(wanted), **CLOSE)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_what_a_narrow_basis_loses_is_the_tail_of_the_singular_values(k):
    loras = pairs()
    one = shared(loras, 1, 1.0, k)
    for side in (0, 1):
        stack = torch.cat([lora[side] for lora in loras], dim=1)
        rebuilt = torch.cat([one.lora(t)[side] for t in range(3)], dim=1)
        tail = torch.linalg.svdvals(stack)[k:].norm()
        torch.testing.assert_close((stack - rebuilt).norm(), tail, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_the_basis_is_orthonormal(k, centre):
    stack = torch.cat([B for B, _ in pairs()], dim=1)
    found = basis(stack, k, centre)
    torch.testing.assert_close(found.mT @ found, torch.eye(k, dtype=found.dtype), rtol=0, atol=1e-10)
    if not centre:
        U = torch.linalg.svd(stack).U[:, :k].double()
        torch.testing.assert_close((found.mT @ U).abs(), torch.eye(k).double(), rtol=0, atol=1e-4)


def test_a_centred_basis_has_the_mean_first_and_then_what_varies_most_beside_it():
    mean, one, two = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(2))).Q.unbind(1)
    # around the mean the columns vary most along it, and beside it along ``two``
    varies = torch.outer(3 * mean + 0.5 * one, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    stack = 3 * mean[:, None] + varies + torch.outer(two, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    found = basis(stack, 2, True).float()
    torch.testing.assert_close((found.mT @ torch.stack([mean, two], dim=1)).abs(), torch.eye(2), rtol=0, atol=1e-5)
    # of the variance 36 parts are along the mean, 4 along two, 1 along one; of the squares 72, 4 and 1
    assert [explaining(stack, share, True) for share in (0.87, 0.89, 0.97, 0.98)] == [1, 2, 2, 3]
    assert explaining(stack, 0.92, False) == 1


def test_k_is_the_least_that_explains_the_share():
    stack = torch.linalg.qr(torch.randn(9, 4)).Q * torch.tensor([2.0, 1.0, 1.0, 0.5])  # squares 4, 1, 1, 0.25
    shares = {0.6: 1, 0.64: 1, 0.65: 2, 0.79: 2, 0.81: 3, 0.97: 4, 1.0: 4}
    assert {share: explaining(stack, share, False) for share in shares} == shares
    assert explaining(torch.zeros(9, 4), 0.6, False) == 1


@pytest.mark.parametrize("centre", [False, True])
def test_phase_3_without_a_new_task_changes_nothing(centre):
    one = shared(pairs(), 1, 0.6, centre=centre)
    assert 1 < one.beta.shape[1] < 12
    again = shared([one.lora(t) for t in range(3)], one.beta.shape[1], 0.6, centre=centre)
    assert again.beta.shape == one.beta.shape
    for t in range(3):
        assert_same(list(again.lora(t)), list(one.lora(t)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.beta @ again.beta.mT, one.beta @ one.beta.mT, rtol=0, atol=1e-5)


def test_a_lora_enters_balanced_and_cut_to_p_as_its_best_approximation():
    A, B = torch.randn(6, 40), torch.randn(24, 6)
    U, S, Vh = torch.linalg.svd(B @ A)
    for p in (6, 2):
        B_p, A_p = columns(A, B, p, True)
        torch.testing.assert_close(B_p @ A_p.mT, U[:, :p] * S[:p] @ Vh[:p], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(B_p.norm(dim=0), A_p.norm(dim=0), rtol=1e-4, atol=0)
    raw = columns(A, B, 6, False)
    assert torch.equal(raw[0], B) and torch.equal(raw[1], A.mT)
    assert columns(A, B, 2, False)[0].shape == (24, 2)


# -- as a method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [EXACT, {"variance": 1.0, "balance": False}, {"variance": 1.0, "centre": True}], ids=str
)
def test_loras_taken_in_one_after_another_are_each_rebuilt(options):
    """With the whole basis and p = r; LoRAs that were trained elsewhere, as ``mbf merge`` takes them."""
    rule, dense = method("share", **options), []
    for i in range(1, 4):
        rule.write(random_factors(rule)) if i == 1 else rule.write(lora_like(rule, i))
        dense.append(deltas(rule.current))
        rule.after_task(i, None)
    for found, wanted in zip(functions(rule), dense, strict=True):
        assert_same(found, [2.0 * d for d in wanted], rtol=1e-3, atol=1e-3)
    assert_same(
        [layer.delta() for layer in rule.layers],
        [2.0 / 3 * sum(d) for d in zip(*dense, strict=True)],
        rtol=1e-3,
        atol=1e-3,
    )


def lora_like(rule, seed, r=4):
    g = torch.Generator().manual_seed(seed)
    kept = rule.current
    kept.A = [torch.randn(r, A.shape[1], generator=g) for A in kept.A]
    kept.B = [torch.randn(B.shape[0], r, generator=g) for B in kept.B]
    return kept


@pytest.mark.parametrize("columns", [None, 1, 2])
def test_a_task_computes_with_its_own_coefficients_in_one_mix(columns):
    rule = method("share", columns=columns, variance=0.8)
    for i in range(1, 4):
        learn(rule, i)
    p = columns or 4
    for n, layer in enumerate(rule.layers):
        beta, alpha, e_beta, e_alpha = (rule.state[k][n] for k in ("beta", "alpha", "coeff_beta", "coeff_alpha"))
        assert e_beta.shape == e_alpha.shape == (3, beta.shape[1], p) and beta.shape[1] == alpha.shape[1]
        for task in (1, 2, 3):
            rule.select(task)
            dense = 2.0 * (beta @ e_beta[task - 1]) @ (alpha @ e_alpha[task - 1]).mT
            torch.testing.assert_close(layer.delta(), dense, **CLOSE)
            terms = layer.terms(layer)
            assert terms.A.shape[0] == beta.shape[1] and terms.mix.shape == (beta.shape[1],) * 2
        rule.select(None)
        assert layer.terms is None
        mean = sum((beta @ e_beta[t]) @ (alpha @ e_alpha[t]).mT for t in range(3)) / 3
        torch.testing.assert_close(layer.delta(), 2.0 * mean, **CLOSE)


def test_the_last_coefficients_may_stand_for_all():
    rule = method("share", coeff="last")
    for i in (1, 2, 3):
        learn(rule, i)
    unlabelled = [layer.delta() for layer in rule.layers]
    assert_same(unlabelled, functions(rule)[-1], **CLOSE)


def test_phase_2_trains_temporary_vectors_and_their_coefficients_alone():
    rule = method("share", **EXACT, sigma=0.5)
    learn(rule, 1)
    one = [rule._shared(n) for n in range(3)]
    assert [o.beta.shape[1] for o in one] == [4, 4, 4]
    torch.manual_seed(7)
    trained = begin(rule, 2)
    assert rule.trains(2) == (False, False) and rule.trains(1) == (True, True)
    assert {tuple(p.shape) for p in trained} == {(24, 1), (40, 1), (33, 1), (17, 1), (1, 4)}
    assert not any(p is q for p in trained for layer in rule.layers for q in (layer.A, layer.B))
    for n, layer in enumerate(rule.layers):
        beta, alpha, e_beta, e_alpha = rule._temporary(n)
        assert torch.equal(beta, one[n].beta[:, :1]) and torch.equal(alpha, one[n].alpha[:, :1])
        torch.testing.assert_close(layer.delta(), 2.0 * (beta @ e_beta) @ (alpha @ e_alpha).mT.detach(), **CLOSE)
        layer(torch.randn(5, layer.A.shape[1])).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in (beta, alpha, e_beta, e_alpha))
    drawn = torch.cat([p.flatten() for name in ("coeff_beta", "coeff_alpha") for p in rule.learned[name]])
    assert 0.3 < drawn.std() < 0.7
    before = [deltas_of(one[n], 0) for n in range(3)]
    new = [rule._temporary(n) for n in range(3)]
    wanted = [((b @ eb) @ (a @ ea).mT).detach() for b, a, eb, ea in new]
    end(rule, 2)
    assert rule.learned == {}
    first, second = functions(rule)
    assert_same(second, [2.0 * w for w in wanted], **CLOSE)
    assert_same(first, [2.0 * b for b in before], **CLOSE)


def deltas_of(one, t):
    B, A = one.lora(t)
    return B @ A.mT


@pytest.mark.parametrize(("options", "phi"), [({"temporary": 3}, 3), ({"temporary": 50}, 8), ({}, 2)], ids=str)
def test_the_number_of_temporary_vectors(options, phi):
    rule = method("share", r=8, **EXACT, **options)
    learn(rule, 1)
    begin(rule, 2)
    assert {p.shape[1] for p in (*rule.learned["beta"], *rule.learned["alpha"])} == {phi}
    assert {tuple(p.shape) for p in (*rule.learned["coeff_beta"], *rule.learned["coeff_alpha"])} == {(phi, 8)}


def test_the_width_never_falls_and_may_be_fixed():
    rule, fixed = method("share"), method("share", basis=3)
    widths = []
    for i in range(1, 6):
        learn(rule, i)
        learn(fixed, i)
        widths.append([beta.shape[1] for beta in rule.state["beta"]])
        assert {beta.shape[1] for beta in fixed.state["beta"]} == {3}
        assert [A.shape[0] for A in rule.current.A] == widths[-1]
    assert all(later >= earlier for a, b in itertools.pairwise(widths) for earlier, later in zip(a, b, strict=True))
    assert widths[0] < [4, 4, 4]


# -- on a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coeff", ["mean", "last"])
def test_the_view_is_what_computes_without_a_label_afterwards(coeff):
    model = peft_model()
    learner = mbf.ContinualLora(model, "share", coeff=coeff)
    for i in (1, 2, 3):
        with learner.task(f"t{i}"):
            train(model, i)
            inside = logits(model)
            with learner.merged_view():
                view = logits(model)
            assert torch.equal(logits(model), inside)
            with pytest.raises(ValueError, match="merges without a weight"), learner.merged_view(0.5):
                pass
        torch.testing.assert_close(logits(model), view, rtol=1e-3, atol=1e-4)
        assert (view - inside).abs().max() > 1e-3


def test_labels_bring_the_tasks_back_and_plain_peft_has_the_mean(tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, "share", **EXACT, temporary=4, sigma=0.3)
    after = []
    for i in (1, 2, 3):
        with learner.task(f"t{i}"):
            train(model, i, steps=6)
            after.append(logits(model))
    for i, wanted in enumerate(after, 1):
        learner.select_task(f"t{i}")
        torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-4)
    learner.select_task(None)
    mean = logits(model)
    assert all((mean - one).abs().max() > 1e-2 for one in after)
    learner.export(tmp_path / "mean")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base_model(), tmp_path / "mean")), mean, **CLOSE)


def test_a_trainer_trains_what_is_not_the_adapter(tmp_path):
    model = peft_model(lora_dropout=0.1)
    learner = mbf.ContinualLora(model, "share")
    for i in (1, 2):
        rows = [{k: v[0] for k, v in batch(10 * i + n, rows=1).items()} for n in range(8)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(i)),
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with learner.task(f"t{i}"):
            begun = {name: [p.detach().clone() for p in ps] for name, ps in learner.method.learned.items()}
            kept = learner.method.current.clone()
            Trainer(model=model, args=arguments, train_dataset=rows).train()
            assert all(
                (p != q).any()
                for name, ps in begun.items()
                for p, q in zip(ps, learner.method.learned[name], strict=True)
            )
            assert i == 1 or all(torch.equal(a, b) for a, b in zip(kept.A, learner.method.current.A, strict=True))
    assert [record.steps for record in learner.history] == [4, 4]


def test_an_adapter_trained_elsewhere_is_phase_1():
    model = peft_model()
    train(model, 1)
    before = logits(model)
    learner = mbf.ContinualLora(model, "share", **EXACT)
    assert [record.name for record in learner.history] == ["before"]
    torch.testing.assert_close(logits(model), before, **CLOSE)


def test_adapters_of_several_ranks_merge_without_a_model_into_the_mean(tmp_path):
    paths, found = [], []
    for seed, r in enumerate((4, 6, 2)):
        torch.manual_seed(seed)
        model = peft_model(r=r, lora_alpha=2 * r)
        train(model, seed)
        model.save_pretrained(tmp_path / f"a{seed}")
        paths.append(tmp_path / f"a{seed}")
        found.append(of(model))
    out = merge_adapters(paths, tmp_path / "out", "share", **EXACT)
    for name, value in of(PeftModel.from_pretrained(base_model(), out.path)).items():
        torch.testing.assert_close(value, sum(f[name] for f in found) / 3, rtol=1e-3, atol=1e-5)
    narrow = merge_adapters(paths, tmp_path / "narrow", "share", basis=2)
    layers = mbf.ContinualLora(PeftModel.from_pretrained(base_model(), narrow.path), "seqlora", learnt=False).layers
    assert {layer.A.shape[0] for layer in layers} == {2}


def of(model):
    return {n: m.get_delta_weight("default") for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}
