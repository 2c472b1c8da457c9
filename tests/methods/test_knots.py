"""KnOTS: the joint SVD from factors, TIES and DARE on its Z, and what the learner and ``mbf merge`` make of them."""

import pytest
import torch
from peft import PeftModel

import mbf
from mbf.continual import merge_adapters
from mbf.methods.knots import align, ties
from tests.continual.tiny import base_model, logits, peft_model, train
from tests.methods.plain import assert_same, deltas, learn, method

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pairs(T=3, r=4, d_out=24, d_in=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)) for _ in range(T)]


def dense(tasks):
    """U, S and the Z_t by the formula itself: the SVD of [dW_1 .. dW_T]."""
    dW = [(B @ A).double() for A, B in tasks]
    U, S, Vh = torch.linalg.svd(torch.cat(dW, dim=1), full_matrices=False)
    kept = S > 1e-5
    Z = (S[kept, None] * Vh[kept]).split([d.shape[1] for d in dW], dim=1)
    return U[:, kept], torch.stack(Z), dW


def plain_ties(Z, share, aggregate):
    """TIES entry by entry, as one would write it down."""
    T, *shape = Z.shape
    flat = Z.reshape(T, -1)
    count = int(share * flat.shape[1])
    out = torch.zeros(flat.shape[1], dtype=Z.dtype)
    limits = [sorted(row.abs().tolist(), reverse=True)[count - 1] for row in flat]
    for j in range(flat.shape[1]):
        column = [row[j].item() for row, limit in zip(flat, limits, strict=True) if abs(row[j]) >= limit]
        total = sum(column)
        agreeing = [v for v in column if v * total > 0]
        if agreeing:
            out[j] = sum(agreeing) / (len(agreeing) if aggregate == "mean" else 1)
    return out.reshape(shape)


@pytest.mark.parametrize("shape", [{}, {"d_out": 40, "d_in": 17}, {"T": 8, "d_out": 10}, {"r": 20, "d_in": 9}], ids=str)
def test_every_task_is_U_times_its_Z_and_the_basis_is_that_of_the_joint_svd(shape):
    tasks = pairs(**shape)
    U, Z = align(tasks, 1.0, 1e-5)
    U_dense, Z_dense, dW = dense(tasks)
    assert U.shape == U_dense.shape and Z.shape == Z_dense.shape
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), rtol=0, atol=1e-10)
    for one, wanted in zip(Z, dW, strict=True):
        torch.testing.assert_close(U @ one, wanted, rtol=1e-6, atol=1e-5)
    sign = (U * U_dense).sum(0).sign()  # a singular vector's sign is nobody's
    torch.testing.assert_close(U * sign, U_dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(Z * sign[:, None], Z_dense, rtol=1e-4, atol=1e-4)


def test_small_singular_values_of_the_scaled_product_are_dropped():
    (A, B), other = pairs(T=2, r=3)
    Q, P = torch.linalg.qr(B).Q, torch.linalg.qr(A.mT).Q.mT
    tasks = [(P, Q * torch.tensor([1.0, 1e-3, 1e-8])), (P, torch.zeros_like(other[1]))]
    assert [align(tasks, scale, 1e-5)[0].shape[1] for scale in (1.0, 1e-4, 1e4)] == [2, 1, 3]
    assert align([(A, torch.zeros_like(B))], 1.0, 1e-5)[0].shape[1] == 1  # an untrained LoRA is a LoRA, too


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_ties_is_its_definition(share, aggregate):
    Z = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    least = Z.abs().flatten(1).sort(dim=1, descending=True).values[:, int(share * 35) - 1]
    torch.testing.assert_close(ties(Z, least, aggregate), plain_ties(Z, share, aggregate))


def test_an_entry_that_sums_to_zero_takes_the_sign_of_most_others():
    Z = torch.tensor([[[1.0, 2.0, 5.0]], [[-1.0, 2.0, -1.0]]])
    assert ties(Z, torch.zeros(2), "mean").tolist() == [[1.0, 2.0, 5.0]]
    assert ties(-Z, torch.zeros(2), "mean").tolist() == [[-1.0, -2.0, -5.0]]


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_task_arithmetic_on_Z_is_that_on_dW(aggregate):
    rule = method("knots", merge="task_arithmetic", aggregate=aggregate, scaling=0.7)
    functions = [deltas(learn(rule, i)[1]) for i in range(1, 4)]
    for merged, *dW in zip(deltas(rule.current), *functions, strict=True):
        wanted = 0.7 * sum(dW) / (3 if aggregate == "mean" else 1)
        torch.testing.assert_close(merged, wanted, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"aggregate": "sum"}, {"top": 0.2}], ids=str)
def test_the_merge_is_that_of_the_dense_route(options):
    rule = method("knots", r=3, **options)
    tasks = [learn(rule, i)[1] for i in range(1, 4)]
    found = [dense([(t.A[n], t.B[n]) for t in tasks]) for n in range(3)]
    top, aggregate = options.get("top", 1.0), options.get("aggregate", "mean")
    magnitudes = torch.cat([Z.abs().flatten(1) for _, Z, _ in found], dim=1).sort(dim=1, descending=True).values
    least = magnitudes[:, int(top * magnitudes.shape[1]) - 1]  # over all layers, task by task
    for merged, (U, Z, _) in zip(deltas(rule.current), found, strict=True):
        kept = torch.where(Z.abs() >= least[:, None, None], Z, 0.0)
        torch.testing.assert_close(merged, (0.5 * U @ plain_ties(kept, 1.0, aggregate)).float(), rtol=1e-3, atol=1e-4)
    assert [A.shape[0] for A in rule.current.A] == [9, 9, 9]


def test_identical_tasks_are_that_task_times_lambda():
    rule = method("knots", scaling=0.6)
    _, tuned, one = learn(rule, 1)
    assert_same(deltas(one), [0.6 * d for d in deltas(tuned)], **CLOSE)
    for i in (2, 3):
        learn(rule, i, tuned)
    assert_same(deltas(rule.current), [0.6 * d for d in deltas(tuned)], **CLOSE)
    assert [A.shape[0] for A in rule.current.A] == [4, 4, 4]  # the rank of what there is, not T r


def test_the_rank_is_at_most_that_of_all_tasks_and_the_layer():
    rule = method("knots", r=6)
    ranks = []
    for i in range(1, 5):
        learn(rule, i)
        ranks.append([A.shape[0] for A in rule.current.A])
    assert ranks == [[6, 6, 6], [12, 12, 12], [18, 18, 17], [24, 24, 17]]


def test_dare_drops_and_rescales_with_a_generator_of_its_own():
    tasks = [learn(method("knots"), 1)[1] for _ in range(2)]
    functions = []
    for options in ({"merge": "dare_ties"}, {"merge": "dare_ties"}, {"merge": "dare_ties", "seed": 5}, {}):
        rule = method("knots", scaling=1.0, **options)
        torch.manual_seed(len(functions))  # the training's stream decides nothing, and is left alone
        state = torch.get_rng_state()
        merged = rule.merge(tasks)
        assert torch.equal(torch.get_rng_state(), state)
        functions.append(deltas(merged))
    assert_same(functions[0], functions[1])
    assert all((a - b).norm() > 0.1 * a.norm() for a, b in zip(functions[0], functions[2], strict=True))
    assert_same(
        [d.float() for d in deltas(method("knots", merge="dare_ties", drop=0.0, scaling=1.0).merge(tasks))],
        functions[3],
    )


def test_what_dare_keeps_is_divided_by_the_chance_to_be_kept():
    rule = method("knots", merge="dare_ties", drop=0.75, scaling=1.0)
    _, tuned, _ = learn(rule, 1)
    U, Z = rule._aligned(0, [(tuned.A[0], tuned.B[0])])
    whole = align([(tuned.A[0], tuned.B[0])], rule.layers[0].scale, 1e-5)[1]
    kept = Z != 0
    torch.testing.assert_close(Z[kept], 4 * whole[kept])
    assert 0.1 < kept.double().mean() < 0.4
    torch.testing.assert_close(deltas(rule.current)[0], (U @ Z[0]).float(), **CLOSE)


def test_each_task_trains_alone_on_W_and_all_are_kept():
    rule = method("knots")
    tuned = []
    for i in range(1, 4):
        start, finetuned, _ = learn(rule, i)
        assert i == 1 or all(not B.any() for B in start.B)
        assert [A.shape[0] for A in start.A] == [4, 4, 4] and rule.terms is None
        tuned.append(finetuned)
    for kept, one in zip(rule.tasks(), tuned, strict=True):
        assert_same(kept.A, one.A)
        assert_same(kept.B, one.B)


@pytest.mark.parametrize("options", [{}, {"merge": "dare_ties"}, {"merge": "task_arithmetic", "top": 0.5}], ids=str)
def test_the_view_is_the_merge_that_follows(options):
    model = peft_model()
    learner = mbf.ContinualLora(model, "knots", **options)
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
            inside = logits(model)
            with learner.merged_view():
                view = logits(model)
            assert torch.equal(logits(model), inside)
            with pytest.raises(ValueError, match="merges without a weight"), learner.merged_view(0.5):
                pass
        torch.testing.assert_close(logits(model), view, **CLOSE)
        assert (view - inside).abs().max() > 1e-3


def test_a_share_of_all_layers_has_no_view_of_one():
    model = peft_model()
    learner = mbf.ContinualLora(model, "knots", top=0.5)
    with learner.task("t1"):
        train(model, 1)
        with (
            pytest.raises(ValueError, match=r"top=0\.5 compares the entries of all layers.*use top=1"),
            learner.merged_view(),
        ):
            pass


def test_adapters_of_several_ranks_and_scales_merge_without_a_model(tmp_path):
    paths, functions = [], []
    for seed, config in enumerate([{"r": 4}, {"r": 6}, {"r": 2, "lora_alpha": 3}]):
        torch.manual_seed(seed)
        model = peft_model(**config)
        train(model, seed)
        model.save_pretrained(tmp_path / f"a{seed}")
        paths.append(tmp_path / f"a{seed}")
        functions.append(of(model))
    out = merge_adapters(paths, tmp_path / "out", "knots", merge="task_arithmetic", aggregate="sum", scaling=1.0)
    for name, value in of(PeftModel.from_pretrained(base_model(), out.path)).items():
        torch.testing.assert_close(value, sum(f[name] for f in functions), **CLOSE)
    learnt = merge_adapters(paths, tmp_path / "ties", "knots", rank=5)
    assert learnt.compressed and 0.3 < learnt.kept < 1


def of(model):
    return {n: m.get_delta_weight("default") for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}
