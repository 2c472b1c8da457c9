"""LoDA: its two branches against the eigenproblems they solve, the merge that shrinks, and the aligned gradients."""

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments

import mbf
from mbf.methods._passes import input_moments
from mbf.methods.loda import general_directions, private_directions, shrinkage
from tests.continual.tiny import batch, batches, logits, peft_model, train
from tests.methods.plain import begin, data, end, learn, method, random_factors

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def moment(seed, d=30, rows=200, span=None):
    """C [d, d] in fp64, of uneven energy; of the first ``span`` directions of a random basis only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    x = x[:, :span] @ basis[:, :span].mT if span else x @ basis
    return x.mT @ x / len(x)


def moments_of(seed, skip=1):
    """C of the plain model's two inputs over ``data(seed)``."""
    found = []
    for d in (40, 17):
        x = torch.cat([b["inputs"][:, skip:, :d].reshape(-1, d) for b in data(seed)]).double()
        found.append(x.T @ x / len(x))
    return found


def finish(rule, i, tuned):
    for layer, A, B in zip(rule.layers, tuned.A, tuned.B, strict=True):
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
    end(rule, i)


# -- directions --------------------------------------------------------------------------------------------------------


def test_the_leading_private_direction_has_the_largest_generalised_rayleigh_quotient():
    C, C_prev = moment(1), moment(2)
    U = private_directions(C, C_prev, 6)
    quotients = (U.mT @ C @ U).diagonal() / (U.mT @ C_prev @ U).diagonal()
    eigenvalues = torch.linalg.eigvals(torch.linalg.solve(C_prev, C)).real.sort(descending=True).values
    torch.testing.assert_close(quotients[0], eigenvalues[0], **EXACT)
    torch.testing.assert_close(quotients, eigenvalues[:6], **EXACT)
    torch.testing.assert_close(U.mT @ C_prev @ U, torch.eye(6, dtype=C.dtype), **EXACT)
    others = torch.randn(30, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert ((others * (C @ others)).sum(0) / (others * (C_prev @ others)).sum(0)).max() < quotients[0]


def test_the_general_directions_are_the_leading_eigenvectors():
    C = moment(1) + moment(2)
    V = general_directions(C, 5)
    values = torch.linalg.eigvalsh(C).flip(0)[:5]
    torch.testing.assert_close(C @ V, V * values, **EXACT)
    torch.testing.assert_close(V.mT @ V, torch.eye(5, dtype=C.dtype), **EXACT)
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()


def test_old_statistics_without_full_rank_are_regularised_and_the_unused_directions_found():
    """Cholesky fails on a C_prev of rank 20; the private directions are then those that the old tasks never used."""
    C, C_prev = moment(1), moment(2, span=20)
    assert torch.linalg.cholesky_ex(C_prev - 1e-14 * torch.eye(30, dtype=C.dtype))[1] > 0
    U = private_directions(C, C_prev, 6)
    assert torch.isfinite(U).all()
    Q = torch.linalg.qr(U).Q
    assert (Q.mT @ C_prev @ Q).diagonal().max() < 1e-6 * C_prev.diagonal().mean()
    zero = private_directions(C, torch.zeros_like(C), 3)  # nothing was ever used: C alone decides
    torch.testing.assert_close(
        (torch.linalg.qr(zero).Q * general_directions(C, 3)).sum(0).abs(), torch.ones(3, dtype=C.dtype), **EXACT
    )


def test_both_branches_are_orthonormal_up_to_the_root_of_three_and_solve_the_tasks_eigenproblems():
    """A Aᵀ = I / 3 within each branch; of C_i + C_prev, and of C_i against C_prev."""
    rule = method("loda")
    begin(rule, 1)
    C_1 = moments_of(1)
    for layer, place in zip(rule.layers, (0, 0, 1), strict=True):
        torch.testing.assert_close(layer.A @ layer.A.mT, torch.eye(4) / 3, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.A * 3**0.5, general_directions(C_1[place], 4).mT.float(), **CLOSE)
        assert not layer.B.any()
    end(rule, 1)
    begin(rule, 2)
    C_2 = moments_of(2)
    for layer, place in zip(rule.layers, (0, 0, 1), strict=True):
        A_S, A_P = layer.A.detach().double().split(4)
        for branch in (A_S, A_P):
            torch.testing.assert_close(branch @ branch.mT, torch.eye(4).double() / 3, rtol=1e-5, atol=1e-5)
        general = general_directions(C_1[place] + C_2[place], 4)
        torch.testing.assert_close(A_S * 3**0.5, general.mT, **CLOSE)
        U = private_directions(C_2[place], C_1[place], 4)
        torch.testing.assert_close(A_P.mT @ (A_P @ U) * 3, U, rtol=1e-3, atol=1e-3)  # the span of u_1 .. u_r
        assert A_P[0] @ U[:, 0] > 0.99 * U[:, 0].norm() / 3**0.5  # u_1 comes first
        assert layer.A.shape[0] == layer.B.shape[1] == 8 and not layer.B.any()
    end(rule, 2)


def test_statistics_leave_out_padding_and_the_first_tokens():
    model = peft_model()
    padded = [b | {"attention_mask": torch.ones_like(b["input_ids"])} for b in batches(1)]
    for b in padded:
        b["attention_mask"][:2, 6:] = 0
    learner = mbf.ContinualLora(model, "loda", skip=2, batches=2)
    with learner.task("one", padded):
        train(model, 1, steps=2)
    wanted = input_moments(learner.method, padded[:2], skip=2)
    assert wanted.tokens == 2 * (2 * 4 + 2 * 7)
    for kept, C in zip(learner.method.state["C"], wanted.C, strict=True):
        torch.testing.assert_close(kept, C, **CLOSE)


# -- a task ------------------------------------------------------------------------------------------------------------


def test_what_trains():
    rule = method("loda")
    assert rule.trains(1) == (True, True) and rule.trains(2) == rule.trains(3) == (False, True)


def test_the_forward_weighs_both_branches_beside_the_sum():
    rule = method("loda", g_S=0.3, g_P=1.7)
    begin(rule, 1)
    first = random_factors(rule)
    for layer, A, B in zip(rule.layers, first.A, first.B, strict=True):
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
        torch.testing.assert_close(layer.delta(), 0.3 * layer.scale * B @ A, **CLOSE)
    end(rule, 1)
    for layer, A, B in zip(rule.layers, first.A, first.B, strict=True):
        torch.testing.assert_close(layer.delta(), 0.3 * layer.scale * B @ A, **CLOSE)  # plainly added
    before = [layer.delta() for layer in rule.layers]
    begin(rule, 2)
    for layer, delta in zip(rule.layers, before, strict=True):
        torch.testing.assert_close(layer.delta(), delta, **CLOSE)
        layer.B.data.normal_()
        (A_S, A_P), (B_S, B_P) = layer.A.split(4), layer.B.split(4, dim=1)
        wanted = delta + layer.scale * (0.3 * B_S @ A_S + 1.7 * B_P @ A_P)
        torch.testing.assert_close(layer.delta(), wanted.detach(), **CLOSE)


# -- the merge ---------------------------------------------------------------------------------------------------------


def test_a_row_is_kept_as_far_as_it_minimises_both_projected_energies():
    """1 − η = argmin_c c² p + γ (c − 1)² q, p and q the energies of old and new inputs along the row."""
    C, C_prev = moment(1), moment(2)
    A = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    kept = 1 - shrinkage(A, C_prev, C, 3.0)
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for row, c in zip(A, kept, strict=True):
        p, q = row @ C_prev @ row, row @ C @ row
        best = grid[(grid.square() * p + 3.0 * (grid - 1).square() * q).argmin()]
        assert c.item() == pytest.approx(best.item(), abs=1e-5)
        assert 0.01 < c < 0.99


def test_limits_of_the_shrinkage():
    C, C_prev, A = moment(1), moment(2), torch.randn(3, 30)
    assert shrinkage(A, C_prev, C, 1e12).max() < 1e-9  # only the new task counts: all is merged
    assert torch.equal(shrinkage(A, torch.zeros_like(C), C, 3.0), torch.zeros(3).double())
    assert shrinkage(A, C_prev, C, 0.0).min() > 1 - 1e-9
    assert torch.equal(shrinkage(A, 0 * C, 0 * C, 3.0), torch.zeros(3).double())


@pytest.mark.parametrize("gamma", [0.0, 0.2, 3.0, 1e12])
def test_the_merge_adds_the_shrunk_general_branch_and_the_whole_private_one(gamma):
    rule = method("loda", gamma=gamma, g_S=0.5, g_P=0.8)
    learn(rule, 1)
    C_prev = moments_of(1)
    begin(rule, 2)
    for layer in rule.layers:
        layer.B.data.normal_()
    before = [layer.scale * B @ A for layer, A, B in zip(rule.layers, rule.merged.A, rule.merged.B, strict=True)]
    trained = [layer.delta() for layer in rule.layers]
    factors = rule.current.clone()
    end(rule, 2)
    C = moments_of(2)
    for n, (layer, place) in enumerate(zip(rule.layers, (0, 0, 1), strict=True)):
        A_S, A_P = factors.A[n].double().split(4)
        B_S, B_P = factors.B[n].double().split(4, dim=1)
        wanted = before[n].double() + layer.scale * 0.8 * B_P @ A_P
        for a, b in zip(A_S, B_S.mT, strict=True):
            p, q = a @ C_prev[place] @ a, a @ C[place] @ a
            wanted += layer.scale * 0.5 * (1 - p / (p + gamma * q)) * torch.outer(b, a)
        torch.testing.assert_close(layer.delta().double(), wanted, **CLOSE)
        if gamma == 1e12:  # η = 0: what computes is what trained
            torch.testing.assert_close(layer.delta(), trained[n], **CLOSE)
        else:
            assert (layer.delta() - trained[n]).abs().max() > 1e-2


def test_shrinkage_weighs_by_the_trained_model_and_the_statistics_count_once():
    """down_proj reads what q and v of its layer and all before it computed: its C moves with training."""
    for twice in (False, True):
        model = peft_model()
        learner = mbf.ContinualLora(model, "loda", count_twice=twice, gao=False)
        with learner.task("one", batches(1)):
            untrained = input_moments(learner.method, batches(1), skip=1).C
            train(model, 1)
            trained = input_moments(learner.method, batches(1), skip=1).C
        C_1 = learner.method.state["C"]
        for kept, C in zip(C_1, trained, strict=True):
            torch.testing.assert_close(kept, (1 + twice) * C, **CLOSE)  # task 1 is merged as it is
        assert (trained[-1] - untrained[-1]).abs().max() > 1e-3 * trained[-1].abs().max()
        with learner.task("two", batches(2)):
            train(model, 2)
            trained = input_moments(learner.method, batches(2), skip=1).C
            last, factors = learner.layers[-1], learner.method.current.clone()
            before = learner.method.merged.clone()
        merged = input_moments(learner.method, batches(2), skip=1).C
        for old, kept, C, after in zip(C_1, learner.method.state["C"], trained, merged, strict=True):
            torch.testing.assert_close(kept, old + C + twice * after, **CLOSE)
        assert (merged[-1] - trained[-1]).abs().max() > 1e-6
        n, r = len(learner.layers) - 1, 4
        place = input_moments(learner.method, batches(2), skip=1).of[n]
        A_S, A_P = factors.A[n].split(r)
        B_S, B_P = factors.B[n].split(r, dim=1)
        eta = shrinkage(A_S, C_1[place], trained[place], 3.0).float()
        wanted = before.B[n] @ before.A[n] + 0.5 * (B_S * (1 - eta)) @ A_S + B_P @ A_P
        torch.testing.assert_close((last.B @ last.A).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_rank_of_the_branches_and_bound_of_the_sum():
    rule = method("loda", rank=2)
    learn(rule, 1)
    assert [layer.A.shape[0] for layer in rule.layers] == [4, 4, 4]
    begin(rule, 2)
    assert [layer.A.shape[0] for layer in rule.layers] == [4, 4, 4]  # 2 and 2
    assert all((gate == torch.tensor([0.5, 0.5, 1.0, 1.0])).all() for gate in rule._gates)
    end(rule, 2)
    rule = method("loda")
    for i in range(1, 6):
        learn(rule, i)
    assert [layer.A.shape[0] for layer in rule.layers] == [24, 24, 17]
    assert rule.ranks(6) == [4, 4, 4] and set(rule.state) == {"C", "ranks"}


def test_layers_of_other_ranks_that_read_one_input_share_its_directions():
    model = peft_model(rank_pattern={"q_proj": 2, "v_proj": 6})
    learner = mbf.ContinualLora(model, "loda")
    for i in (1, 2):
        with learner.task(f"t{i}", batches(i)):
            q, v = (next(x for x in learner.layers if x.name.endswith(f"layers.1.self_attn.{k}_proj")) for k in "qv")
            assert torch.equal(q.A[:2], v.A[:2])
            if i == 2:
                assert torch.equal(q.A[2:], v.A[6:8])
            train(model, i, steps=2)


def test_there_is_a_view_of_the_merge_only_where_it_takes_no_data():
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda")
    with learner.task("one", batches(1)):
        train(model, 1)
        inside = logits(model)
        with learner.merged_view():
            torch.testing.assert_close(logits(model), inside)
        with pytest.raises(ValueError, match="merges without a weight"), learner.merged_view(0.5):
            pass
    torch.testing.assert_close(logits(model), inside, **CLOSE)
    with learner.task("two", batches(2)):
        train(model, 2)
        with pytest.raises(ValueError, match="take a pass of the trained model"), learner.merged_view():
            pass
        with pytest.raises(ValueError, match="merges without a weight"), learner.merged_view(0.5):
            pass


# -- gradient alignment ------------------------------------------------------------------------------------------------


def aligned(rule, i, forwards, rho, seed):
    """The formula in plain torch, on the same draws: the split, then u; gradients by layer, of (A, B)."""
    torch.manual_seed(seed)
    rows = torch.cat([b["inputs"] for b in forwards])
    order = torch.randperm(len(rows))
    halves = rows[order[len(rows) // 2 :].sort().values], rows[order[: len(rows) // 2].sort().values]
    u = torch.rand(()).item()
    theta = []  # A (task 1 only), B_S, B_P
    for layer in rule.layers:
        A, B = layer.A.detach(), layer.B.detach()
        theta.append(([A] if i == 1 else []) + ([B] if i == 1 else list(B.split(4, dim=1))))

    def gradients(inputs, theta):
        theta = [[t.clone().requires_grad_() for t in one] for one in theta]
        loss = 0.0
        for n, layer in enumerate(rule.layers):
            x = inputs[..., : layer.W.shape[1]]
            y = x @ layer.W.T
            if i == 1:
                A, B = theta[n]
                y = y + 0.5 * layer.scale * x @ (B @ A).T
            else:
                (A_S, A_P), (B_S, B_P) = layer.A.detach().split(4), theta[n]
                y = y + layer.scale * x @ (rule.merged.B[n] @ rule.merged.A[n] + 0.5 * B_S @ A_S + B_P @ A_P).T
            loss = loss + y.square().sum() / (2 * len(inputs))
        flat = iter(torch.autograd.grad(loss, [t for one in theta for t in one]))
        return [[next(flat) for _ in one] for one in theta]

    crossed = []
    for here, there in (halves, halves[::-1]):
        first = gradients(here, theta)
        moved = [
            [t - rho * u * g / g.norm() for t, g in zip(a, b, strict=True)] for a, b in zip(theta, first, strict=True)
        ]
        crossed.append(gradients(there, moved))
    mean = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(*crossed, strict=True)]
    return [(one[0] if i == 1 else None, one[1] if i == 1 else torch.cat(one, dim=1)) for one in mean]


def ready(rule, i):
    """In task i, B far from zero and its branches of unequal size."""
    for j in range(1, i):
        learn(rule, j)
    trained = begin(rule, i)
    torch.manual_seed(77)
    for layer in rule.layers:
        layer.B.data.normal_()
        layer.B.data[:, 4:] *= 3
    return trained


def step(rule, forwards, seed):
    """What a loop does up to its optimiser's step."""
    for inputs in forwards:
        rule.forward_mod(0, inputs)
        (rule.model(**inputs).loss / len(forwards)).backward()
    torch.manual_seed(seed)
    with torch.no_grad():
        rule.after_backward()


@pytest.mark.parametrize("rho", [0.7, 5.0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("i", [1, 2])
def test_the_step_is_made_with_the_mean_of_the_crossed_gradients(i, count, rho):
    """The micro-batches of an accumulated step are one batch; B_S and B_P are moved each by a length of its own."""
    rule = method("loda", rho=rho, skip=0)
    ready(rule, i)
    before = rule.current.clone()
    forwards = data(31, batches=count, rows=3)
    step(rule, forwards, seed=8)
    for layer, (dA, dB), A, B in zip(
        rule.layers, aligned(rule, i, forwards, rho, seed=8), before.A, before.B, strict=True
    ):
        torch.testing.assert_close(layer.B.grad, dB, **CLOSE)
        assert (layer.A.grad is None) == (i == 2)
        if dA is not None:
            torch.testing.assert_close(layer.A.grad, dA, **CLOSE)
        assert torch.equal(layer.A, A) and torch.equal(layer.B, B)  # bit for bit where they were


def test_processes_that_train_together_take_the_mean_of_their_gradients():
    rules, sums = [], []
    for _ in range(2):
        torch.manual_seed(4)
        rules.append(method("loda", skip=0))
        ready(rules[-1], 1)
    rules[1].total = lambda mine: sums.append(mine) or 3 * mine  # as of three processes that found the same
    for rule in rules:
        step(rule, data(31, batches=1, rows=3), seed=8)
    assert len(sums) == 1
    for mine, wanted in zip(rules[1].layers, rules[0].layers, strict=True):
        torch.testing.assert_close(mine.A.grad, wanted.A.grad, **CLOSE)
        torch.testing.assert_close(mine.B.grad, wanted.B.grad, **CLOSE)


def test_a_process_with_nothing_to_split_joins_in_all_the_same():
    """Otherwise the others would wait for it."""
    rule = method("loda", skip=0)
    ready(rule, 1)
    sums = []
    rule.total = lambda mine: sums.append(mine) or mine
    step(rule, data(31, batches=1, rows=1), seed=8)
    assert len(sums) == 1
    rule = method("loda", skip=0, gao=False)
    ready(rule, 1)
    rule.total = None  # not called
    step(rule, data(31, batches=1, rows=3), seed=8)


def test_without_a_move_it_is_the_gradient_of_the_batch():
    rule = method("loda", rho=0.0)
    trained = ready(rule, 2)
    forwards = data(31, batches=2, rows=4)
    step(rule, forwards, seed=8)
    ours = [p.grad.clone() for p in trained]
    rule.model.zero_grad()
    sum(rule.model(**inputs).loss / 2 for inputs in forwards).backward()
    for p, g in zip(trained, ours, strict=True):
        torch.testing.assert_close(p.grad, g, **CLOSE)


def test_a_step_is_four_passes_over_half_the_batch_beside_the_loops_own():
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda")
    rows = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with learner.task("one", batches(1)):
        rows.clear()
        train(model, 1, steps=2)
        assert rows == 2 * [4, 2, 2, 2, 2]
    handle.remove()
    rows.clear()
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda", gao=False)
    with learner.task("one", batches(1)):
        handle = model.get_base_model().register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        train(model, 1, steps=2)
        assert rows == [4, 4]
        handle.remove()


def test_what_cannot_be_split_keeps_the_loops_gradient():
    rule = method("loda")
    trained = ready(rule, 2)
    (inputs,) = data(5, batches=1, rows=1)
    rule.model(**inputs).loss.backward()
    loops = [p.grad.clone() for p in trained]
    rule.model.zero_grad()
    step(rule, [inputs], seed=1)
    assert all(torch.equal(p.grad, g) for p, g in zip(trained, loops, strict=True))
    rule.model.zero_grad()
    step(rule, [inputs, inputs], seed=1)  # two micro-batches of one row are two rows
    assert not any(torch.equal(p.grad, g) for p, g in zip(trained, loops, strict=True))


def test_groups_are_averaged_over_their_labels_and_rows_without_any_are_left_out():
    """On a Llama, ρ = 0: the mean of the two groups' mean losses, each over labels of its own, padded as they are."""
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda", rho=0.0)
    ids = batch(5, rows=5)["input_ids"]
    labels = ids.clone()
    labels[:, 0] = -100  # which no token predicts
    labels[0] = -100
    labels[1, 6:] = -100
    learner.begin_task("one", batches(1))
    model.train()
    torch.manual_seed(3)
    for layer in learner.layers:
        layer.B.data.normal_(std=0.1)
    trained = [p for layer in learner.layers for p in (layer.A, layer.B)]
    for rows in ([0, 1, 2], [3, 4]):
        # Trainer passes the number of labels of the whole step, by which the model divides.
        model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=torch.tensor(29)).loss.backward()
    torch.manual_seed(8)
    torch.optim.SGD(trained, lr=0.0).step()
    ours = [p.grad.clone() for p in trained]
    torch.manual_seed(8)
    second = torch.randperm(5)[:2].tolist()
    groups = [row for row in range(5) if row not in second], second
    losses = [model(input_ids=ids[rows], labels=labels[rows]).loss for rows in groups]
    for g, wanted in zip(ours, torch.autograd.grad(sum(losses) / 2, trained), strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-6)
    learner.abandon_task()


def test_a_model_without_a_loss_is_an_error_that_names_the_way_out():
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda")
    ids = batch(1)["input_ids"]
    learner.begin_task("one", batches(1))
    before = learner.method.current.clone()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids).logits.square().mean().backward()
    with pytest.raises(ValueError, match=r"gave none for input_ids.*pass labels to its forward, or set gao=False"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(learner.method.current.A, before.A, strict=True))
    learner.abandon_task()
    free = mbf.ContinualLora(peft_model(), "loda", gao=False)
    with free.task("one", batches(1)):
        free.model.train()
        optimizer = torch.optim.SGD([p for p in free.model.parameters() if p.requires_grad], lr=0.1)
        free.model(input_ids=ids).logits.square().mean().backward()
        gradients = [layer.B.grad.clone() for layer in free.layers]
        optimizer.step()
        assert all(torch.equal(layer.B.grad, g) for layer, g in zip(free.layers, gradients, strict=True))


def test_gradients_that_alignment_breaks_are_refused_before_the_optimiser_takes_them(monkeypatch):
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda")
    bad = lambda *_: [torch.full_like(p, float("nan")) for p in learner.method._trained()]  # noqa: E731
    monkeypatch.setattr(learner.method, "_crossed", bad)
    learner.begin_task("one", batches(1))
    model.train()
    before = learner.method.current.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch(1)).loss.backward()
    learner.check_step()  # the loop's own gradients are finite
    with pytest.raises(mbf.continual.DivergedError, match=r"task 1 'one', step 1: inf or NaN in the gradient of"):
        optimizer.step()
    assert all(torch.equal(layer.B, B) for layer, B in zip(learner.layers, before.B, strict=True))
    learner.abandon_task()


def test_the_passes_compute_under_the_loops_autocast():
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda")
    seen = []
    with learner.task("one", batches(1)):
        handle = model.get_base_model().lm_head.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(1)).loss
        loss.backward()
        optimizer.step()
        handle.remove()
    assert seen == 5 * [torch.bfloat16]


def test_trainer_with_accumulation_and_checkpointing_is_split_as_a_whole(tmp_path):
    model = peft_model(lora_dropout=0.1)
    learner = mbf.ContinualLora(model, "loda")
    rows = [{k: v[0] for k, v in batch(n, rows=1).items()} for n in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    seen = []
    with learner.task("one", batches(1)):
        handle = model.get_base_model().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        handle.remove()
    assert seen == [1] * 2 * (4 + 8) and learner.history[0].steps == 2  # two rows a group, each run twice


def test_alignment_learns():
    """The loss falls nearly as fast as with plain gradients, and on a way of its own."""
    fall = {}
    for gao in (False, True):
        model = peft_model()
        learner = mbf.ContinualLora(model, "loda", gao=gao, rho=0.05)
        with learner.task("one", batches(1)):
            model.train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
            trace = []
            for _ in range(25):
                loss = model(**batch(1)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                trace.append(loss.item())
            fall[gao] = trace[0] - trace[-1]
    assert fall[True] > 0.8 * fall[False] > 0.2 and fall[True] != fall[False]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_adapter_trained_elsewhere_is_refused():
    model = peft_model()
    train(model, 1)
    with pytest.raises(ValueError, match="'loda' cannot go on from an adapter that was trained elsewhere"):
        mbf.ContinualLora(model, "loda")


def test_more_directions_than_inputs_are_refused():
    model = peft_model(r=33)
    learner = mbf.ContinualLora(model, "loda")
    before = logits(model)
    with pytest.raises(ValueError, match=r"r of the 32 directions of .*q_proj, r is 33; use r ≤ 32"):
        learner.begin_task("one", batches(1))
    assert torch.equal(logits(model), before) and not learner.in_task


def test_inputs_with_nan_are_named():
    rule = method("loda")
    bad = data(1)
    bad[0]["inputs"][0, 2, 30] = float("nan")
    rule.merged = rule.current.clone()
    with pytest.raises(ValueError, match="inputs of layer0 have inf or NaN"):
        rule.before_task(1, bad)


def test_the_end_goes_through_the_data_of_the_begin():
    model = peft_model()
    learner = mbf.ContinualLora(model, "loda")
    learner.begin_task("one", batches(1))
    train(model, 1)
    learner.end_task()
    assert learner.task_index == 1 and learner.method.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"g_S": 0}, "g_S"),
        ({"gamma": float("inf")}, "gamma"),
        ({"rho": -1}, "rho"),
        ({"rank": 0}, "rank"),
        ({"skip": -1}, "skip"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValidationError, match=message):
        method("loda", **options)
