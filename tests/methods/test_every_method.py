"""What holds for every method, on a small Llama: its start, its size as tasks come, resumption, inference."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import mbf
from mbf import methods
from tests.continual.tiny import base_model, batch, batches, logits, peft_model, train

METHODS = [name for name in methods.available() if not methods.get(name).joint]

NO_VIEW = {
    "loda": "take a pass of the trained model",
    "opcm": "a single layer has no view of the merge",
    "pm": r"call merged_view\(weight\)",
}
"""What methods say whose merge ``merged_view`` cannot show; ``pm`` in task 1, too, the others from task 2 on."""


def learnt(name, tasks, model=None, **options):
    model = model or peft_model()
    learner = mbf.ContinualLora(model, name, **options)
    for i in range(1, tasks + 1):
        torch.manual_seed(i)
        with learner.task(f"t{i}", batches(i)):
            train(model, i, steps=2)
    return model, learner


@pytest.mark.parametrize("name", METHODS)
def test_the_first_task_starts_from_the_function_of_the_base(name):
    model = peft_model()
    learner = mbf.ContinualLora(model, name)
    plain = logits(base_model())
    with learner.task("t1", batches(1)):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
        train(model, 1, steps=2)
    assert (logits(model) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_only_what_the_method_trains_has_a_gradient(name):
    model, learner = learnt(name, 1)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    learner.begin_task("t2", batches(2))
    A, B = learner.method.trains(2)
    assert all((layer.A.requires_grad, layer.B.requires_grad) == (A, B) for layer in learner.layers)
    own = [p for parameters in learner.method.learned.values() for p in parameters]
    assert bool(own) == learner.method.learns or not learner.method.learns
    inside = {id(p) for p in model.parameters()}
    assert all(id(p) in inside for p in own)
    train(model, 2, steps=2)
    learner.end_task(batches(2))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if "lora_" not in n)
    assert {n for n, _ in model.named_parameters() if "lora_" not in n} == set(frozen)


@pytest.mark.parametrize("name", METHODS)
def test_memory_grows_with_the_tasks_as_the_table_says(name):
    """Without a T in ``info.memory`` size stays the same; with one no task adds more than the second did."""
    model = peft_model(r=2)
    learner = mbf.ContinualLora(model, name)
    sizes, states = [], []
    for i in range(1, 6):
        torch.manual_seed(i)
        with learner.task(f"t{i}", batches(i)):
            train(model, i, steps=1)
        sizes.append(sum(learner.memory_bytes().values()))
        states.append(learner.memory_bytes()["state"])
    claim = learner.method.info.memory
    if "k ≤ d/2" in claim:  # a basis or its complement, at most half of every layer's d × d; it may shrink
        half = sum(layer.A.shape[1] ** 2 * 4 // 2 + 16 for layer in learner.layers)
        assert 0 < min(states) <= max(states) <= half, (claim, states)
        sizes = [size - state for size, state in zip(sizes, states, strict=True)]
    added = [b - a for a, b in itertools.pairwise(sizes[1:])]
    if "T" in claim:
        largest = max(sizes[0], sizes[1] - sizes[0])
        assert all(0 <= more <= 1.05 * largest for more in added) and sizes[-1] > sizes[0], (claim, sizes)
    elif re.search(r"\bk\b|dk", claim):  # a basis that grows to the width of its layer and no further
        assert added == sorted(added, reverse=True) or sizes == sorted(sizes), (claim, sizes)
    else:
        assert set(added) == {0}, (claim, sizes)


@pytest.mark.parametrize("name", METHODS)
def test_a_task_goes_on_from_a_checkpoint_within_it(name):
    """As a run resumes: begin again, put learner, adapter, optimiser and random state back, train on."""
    ends = []
    for interrupted in (False, True):
        model, learner = learnt(name, 2)
        torch.manual_seed(3)
        learner.begin_task("t3", batches(3))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model.train()
        for step in range(4):
            if step == 2 and interrupted:
                kept = {n: t.clone() for n, t in learner.method.state_dict().items()}
                factors, moments = learner.method.current.clone(), optimizer.state_dict()
                random, steps = torch.get_rng_state(), 2
                learner.abandon_task()
                torch.manual_seed(3)
                learner.begin_task("t3", batches(3))
                learner.method.write(factors)
                learner.continue_task(kept, steps)
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
                optimizer.load_state_dict(moments)
                torch.set_rng_state(random)
                model.train()
            model(**batch(300 + step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        learner.end_task(batches(3))
        ends.append((logits(model), learner.method.state_dict()))
    (function, state), (other, other_state) = ends
    assert torch.equal(function, other) and state.keys() == other_state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in methods.available()), ("magmax", {"space": "delta"})]
)
def test_merged_view_computes_what_ending_the_task_gives_or_says_that_it_cannot(name, options):
    model = peft_model()
    learner = mbf.ContinualLora(model, name, **options)
    for i in range(1, 2 if learner.method.joint else 4):
        torch.manual_seed(i)
        learner.begin_task(f"t{i}", batches(i))
        train(model, i, steps=2)
        inside, state = logits(model), learner.method.state_dict()
        if name in NO_VIEW and (i > 1 or name == "pm"):
            with pytest.raises(ValueError, match=NO_VIEW[name]), learner.merged_view():
                pass
            view = None
        else:
            with learner.merged_view():
                view = logits(model)
        assert torch.equal(logits(model), inside)
        now = learner.method.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
        learner.end_task(batches(i))
        if view is not None:
            torch.testing.assert_close(view, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_without_a_task_label_inference_depends_on_the_input_alone(name):
    """A row alone computes what it does in a batch, whatever came before; labels change nothing unless they must."""
    model, learner = learnt(name, 3)
    model.eval()
    ids = batch(7)["input_ids"]
    with torch.no_grad():
        together = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    learner.select_task("t1")
    first = logits(model)
    learner.select_task(None)
    assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)
    assert learner.method.info.task_id == ((first - together).abs().max() > 1e-5)
    with pytest.raises(ValueError, match="no task 'nowhere' was learnt"):
        learner.select_task("nowhere")


def test_methods_with_parameters_of_their_own_are_named_where_the_best_checkpoint_is_loaded():
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", page.split("leave this off with")[1].split(", and with")[0])
    assert named == [name for name in methods.available() if methods.get(name).learns]
