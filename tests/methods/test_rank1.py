"""Rank-1 expert pool: the batch's vote, what it lets through, what is counted, penalised and kept."""

import pytest
import torch

import mbf
from mbf.methods.rank1 import pooled, top
from tests.continual.tiny import batch, batches, logits, peft_model, train
from tests.methods.plain import begin, data, end, method


def in_task(i, r=6, **options):
    rule = method("rank1", r=r, **options)
    for task in range(1, i + 1):
        begin(rule, task)
        with torch.no_grad():
            for layer in rule.layers:
                layer.A.normal_()
                layer.B.normal_()
        if task < i:
            forward(rule, task)
            end(rule, task)
    return rule


def forward(rule, seed=0):
    """A step of its own with one forward, as the learner makes it; the votes are counted."""
    rule.model.train()
    rule.forward_mod(seed, {})
    loss = rule.model(**data(seed)[0]).loss
    rule.loss_extra()
    return loss


def masks(rule, x):
    """m of every layer for the inputs x ``[batch, tokens, d]``, sample by sample from the definition."""
    found = []
    for n, layer in enumerate(rule.layers):
        features = x[:, -1, : layer.A.shape[1]]
        votes = [0] * len(layer.A)
        for f in features:
            order = (rule.state["router"][n] @ f).argsort(descending=True)
            for j in order[:4].tolist():
                votes[j] += 1
        chosen = sorted(range(len(votes)), key=lambda j: (-votes[j], j))[:4]
        found.append((votes, [float(j in chosen) for j in range(len(votes))]))
    return found


def test_the_batch_votes_and_the_chosen_experts_compute():
    rule = in_task(1)
    x = data(3)[0]["inputs"]
    wanted = masks(rule, x)
    for n, layer in enumerate(rule.layers):
        here = x[..., : layer.A.shape[1]]
        votes, m = wanted[n]
        y = here @ layer.W.T + layer.scale * (here @ layer.A.T * torch.tensor(m)) @ layer.B.T
        torch.testing.assert_close(layer(here), y.detach(), rtol=1e-4, atol=1e-4)
        assert sum(m) == 4 and len(set(votes)) > 1
    assert len({tuple(m) for _, m in wanted}) > 1  # each layer by a router of its own


@pytest.mark.parametrize("i", [1, 2])
def test_i_all_experts_are_plain_lora(i):
    rule = in_task(i, active=6)
    for n, layer in enumerate(rule.layers):
        x = torch.randn(2, 5, layer.A.shape[1])
        old = 0 if i == 1 else layer.scale * x @ (rule.merged.B[n] @ rule.merged.A[n]).T
        wanted = x @ layer.W.T + old + layer.scale * x @ (layer.B @ layer.A).T
        torch.testing.assert_close(layer(x), wanted.detach(), rtol=1e-4, atol=1e-4)


def test_ii_experts_that_are_not_chosen_have_no_gradient_at_all():
    rule = in_task(1, active=2)
    loss = forward(rule, 3)
    loss.backward()
    for layer in rule.layers:
        alive_A, alive_B = layer.A.grad.any(1), layer.B.grad.any(0)
        assert int(alive_A.sum()) == 2 and torch.equal(alive_A, alive_B)


def test_iii_the_penalty_is_zero_where_the_busiest_are_orthogonal_to_the_past():
    rule = in_task(2, penalty=0.3)
    forward(rule, 8)
    assert any(rule._busiest(n).tolist() != [0, 1] for n in range(3))
    wanted = 0.0
    for n, layer in enumerate(rule.layers):
        S = rule.state["counts"][n].argsort(descending=True, stable=True)[:2].sort().values
        wanted += (layer.B[:, S].T @ rule.state["past"][n]).abs().sum() / 3
    torch.testing.assert_close(rule.loss_extra(), 0.3 * wanted)
    with torch.no_grad():
        for n, layer in enumerate(rule.layers):
            past = torch.linalg.qr(rule.state["past"][n]).Q
            S = rule._busiest(n)
            layer.B[:, S] -= past @ (past.T @ layer.B[:, S])
    assert rule.loss_extra() < 1e-4
    with torch.no_grad():  # the others may overlap as they like
        for n, layer in enumerate(rule.layers):
            layer.B[:, sorted({*range(6)} - {*rule._busiest(n).tolist()})] += 1
    assert rule.loss_extra() < 1e-4
    assert in_task(1).loss_extra() is None


@pytest.mark.parametrize("i", [1, 2])
def test_iv_keeping_all_of_all_experts_keeps_the_function(i):
    rule = in_task(i, active=6, keep=6)
    inside = [layer.delta() for layer in rule.layers]
    end(rule, i)
    for layer, before in zip(rule.layers, inside, strict=True):
        torch.testing.assert_close(layer.delta(), before, rtol=1e-4, atol=1e-4)


def test_the_busiest_third_is_kept_and_joins_the_past():
    rule = in_task(2)
    for seed in (4, 5):
        forward(rule, seed)
    S = [count.argsort(descending=True, stable=True)[:2].sort().values for count in rule.state["counts"]]
    now, past, merged = rule.current.clone(), rule.state["past"], rule.merged
    end(rule, 2)
    for n, layer in enumerate(rule.layers):
        wanted = merged.B[n] @ merged.A[n] + now.B[n][:, S[n]] @ now.A[n][S[n]]
        torch.testing.assert_close(layer.delta(), layer.scale * wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(rule.state["past"][n], torch.cat([past[n], now.B[n][:, S[n]]], 1))
    assert sorted(rule.state) == ["past", "ranks"]


def test_v_every_sample_of_a_training_forward_casts_its_votes_once():
    rule = in_task(1)
    rule.model.train()
    for seed in (1, 2):  # both of one step
        rule.forward_mod(0, {})
        rule.model(**data(seed)[0])
        rule.model(**data(seed)[0])  # the same forward again, as activation checkpointing makes it
    rule.loss_extra()
    rule.loss_extra()  # of another optimiser
    rule.model.eval()
    rule.model(**data(3)[0])
    rule.loss_extra()
    assert [int(count.sum()) for count in rule.state["counts"]] == [4 * 8] * 3
    wanted = [torch.zeros(6, dtype=torch.int64) for _ in rule.layers]
    for seed in (1, 2):
        for n, (votes, _) in enumerate(masks(rule, data(seed)[0]["inputs"])):
            wanted[n] += torch.tensor(votes)
    assert all(torch.equal(a, b) for a, b in zip(rule.state["counts"], wanted, strict=True))


def test_the_vote_of_its_first_forward_holds_for_a_step():
    rule = in_task(1, active=2)
    alone = []
    for seed in (1, 2):
        rule.model.zero_grad()
        forward(rule, seed).backward()
        alone.append([layer.A.grad.any(1) for layer in rule.layers])
    assert not all(torch.equal(a, b) for a, b in zip(*alone, strict=True))
    rule.model.zero_grad()
    for seed in (1, 2):
        rule.forward_mod(7, {})
        rule.model(**data(seed)[0]).loss.backward()
    for layer, chosen in zip(rule.layers, alone[0], strict=True):
        assert torch.equal(layer.A.grad.any(1), chosen)
    rule.model.eval()  # who evaluates within the step votes for themselves
    x = data(2)[0]["inputs"]
    for layer, chosen in zip(rule.layers, alone[1], strict=True):
        here = x[..., : layer.A.shape[1]]
        wanted = here @ layer.W.T + layer.scale * (here @ layer.A.T * chosen) @ layer.B.T
        torch.testing.assert_close(layer(here), wanted, rtol=1e-4, atol=1e-4)


def test_processes_vote_together_and_count_together():
    rule = in_task(1, active=2)
    rule.total = lambda votes: votes + torch.tensor([0, 0, 0, 9, 0, 9]).repeat(len(votes) // 6)
    forward(rule, 1).backward()
    for layer, count in zip(rule.layers, rule.state["counts"], strict=True):
        assert layer.A.grad.any(1).tolist() == [False, False, False, True, False, True]
        assert int(count.sum()) == 2 * 4 + 18 and count[3] >= 9 and count[5] >= 9


def test_the_prompt_gives_the_feature():
    x = torch.arange(24.0).view(2, 4, 3)
    prompt = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert torch.equal(pooled(x, prompt, "last"), torch.stack([x[0, 2], x[1, 0]]))
    assert torch.equal(pooled(x, prompt, "mean"), torch.stack([x[0, 1:3].mean(0), x[1, 0]]))
    assert torch.equal(pooled(x, None, "last"), x[:, -1]) and torch.equal(pooled(x[0], None, "last"), x[0])
    rule = method("rank1")
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])  # of the last three tokens
    rule._see({"input_ids": torch.zeros(2, 5), "attention_mask": mask, "labels": labels})
    assert rule._prompt.tolist() == [[False, True, True, False, False], [True, True, True, True, False]]


def test_of_equals_the_first_are_taken():
    assert top(torch.tensor([[1, 3, 1, 3, 1], [0, 0, 9, 9, 9]]), 3).tolist() == [[0, 1, 3], [2, 3, 4]]


def test_no_gradient_reaches_the_router_unless_it_goes_straight_through():
    rule = in_task(1)
    assert rule.learned == {} and not any(R.requires_grad for R in rule.state["router"])
    twin = in_task(1, straight_through=True)
    for ours, theirs in zip(rule.layers, twin.layers, strict=True):
        theirs.W = ours.W
        theirs.write(ours.A, ours.B)
    for n, R in enumerate(twin.learned["router"]):
        R.data.copy_(rule.state["router"][n])
    losses = [forward(one, 2) for one in (rule, twin)]
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert all(R.grad.abs().max() > 0 for R in twin.learned["router"])


def test_a_llama_learns_and_the_view_is_what_the_merge_becomes():
    model = peft_model(r=6)
    learner = mbf.ContinualLora(model, "rank1")
    for i in (1, 2):
        with learner.task(f"t{i}", batches(i)):
            train(model, i)
            with learner.merged_view():
                view = logits(model)
            model.train()
            model(**batch(5))  # routes are as before
        assert [layer.A.shape[0] for layer in learner.layers] == [2 * i] * len(learner.layers)
        model.eval()
    assert view.shape == logits(model).shape
