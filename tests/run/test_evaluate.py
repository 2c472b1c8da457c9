"""Evaluation: the tree of labels against one forward a label, generation against a plain greedy loop."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mbf.run.data import Collator, Encoder, lost_by_cutting
from mbf.run.evaluate import (
    ChoiceTree,
    TestSet,
    _generate,
    choice_scores,
    evaluate,
    rouge_l,
    same_answer,
    told_apart,
)
from mbf.run.model import load_model
from mbf.streams import Row, make_task

LABELS = ("light blue", "light green", "light", "red", "a")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-random-llama")


def rows(answers: list[str]) -> list[Row]:
    return [
        Row("word " * (n % 5 + 1) + str(n), "\nWhat is it? Answer:", answer, (answer,))
        for n, answer in enumerate(answers)
    ]


def naive_score(model, prompt: list[int], label: list[int]) -> torch.Tensor:
    log_p = model(torch.tensor([prompt + label])).logits[0].log_softmax(-1)
    return torch.stack([log_p[len(prompt) - 1 + n, token] for n, token in enumerate(label)]).mean()


@torch.no_grad()
@pytest.mark.parametrize("labels", [LABELS, ("x", "y"), ("only one",)])
def test_choices_equal_the_naive_computation(tiny, labels) -> None:
    model, tokenizer = tiny
    encoder = Encoder(tokenizer, 20, 20)
    prompts = encoder.prompts([row._asdict() for row in rows(["red"] * 6)])
    ids = encoder.answers(labels)
    scores = choice_scores(model, prompts, ChoiceTree.of(ids), tokenizer.pad_token_id)
    wanted = torch.stack([torch.stack([naive_score(model, p, label) for label in ids]) for p in prompts])
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_the_tree_holds_every_label_once(labels: list[list[int]]) -> None:
    tree = ChoiceTree.of(labels)
    paths: list[list[int]] = [[]]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append([*paths[parent], token])
    assert len(set(map(tuple, paths))) == len(paths)  # nothing is computed twice
    for label, steps in zip(labels, tree.steps, strict=True):
        assert [token for _, token in steps] == label
        assert [paths[source] for source, _ in steps] == [label[:n] for n in range(len(label))]
    for n, row in enumerate(tree.ancestry().tolist()):
        assert sorted(tree.depths[m] for m, seen in enumerate(row) if seen) == list(range(1, tree.depths[n] + 1))


def test_classification_counts_the_best_label(tiny) -> None:
    model, tokenizer = tiny
    encoder = Encoder(tokenizer, 20, 20)
    answers = ["red", "a", "light", "light blue", "light green", "red", "a"]
    task = make_task("t", {"train": rows(["red"])[:1], "test": rows(answers)[1:]}, labels=LABELS, noun="it")
    tests = TestSet.of(task, encoder)
    with torch.no_grad():
        best = [
            max(LABELS, key=lambda name: float(naive_score(model, prompt, encoder.answers([name])[0])))
            for prompt in tests.prompts
        ]
    wanted = 100 * sum(b == a for b, a in zip(best, answers[1:], strict=True)) / len(best)
    told: list[tuple[int, int]] = []
    for batch_size in (1, 4, 100):
        assert evaluate(model, tests, batch_size, lambda *at: told.append(at)) == pytest.approx(wanted)
    assert told[-1] == (6, 6)


def test_ties_go_to_the_first_label() -> None:
    class Indifferent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, **ignored):
            shape = (*input_ids[:, -1:].shape, 300)
            return type("Out", (), {"logits": torch.zeros(shape)})()

    encoder = Encoder(_OneToken(), 20, 20)
    data = {"train": rows(["x"]), "test": rows(["x", "x", "y", "x"])[1:]}
    task = make_task("t", data, labels=("x", "y"), noun="n")
    assert evaluate(Indifferent(), TestSet.of(task, encoder)) == pytest.approx(200 / 3)


def test_labels_that_differ_in_punctuation_or_case_alone_are_different() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, **ignored):
            return type("Out", (), {"logits": torch.zeros(*input_ids[:, -1:].shape, 300)})()

    data = {"train": rows(["C"]), "test": rows(["C", "C++", "c", "C"])[1:]}
    task = make_task("t", data, labels=("C", "C++", "c"), noun="n")
    assert evaluate(First(), TestSet.of(task, Encoder(_OneToken(), 20, 20))) == pytest.approx(100 / 3)


def test_labels_that_cannot_be_ranked_are_no_first_label() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, **ignored):
            logits = torch.zeros(*input_ids[:, -1:].shape, 300)
            logits[0, 0, 7] = torch.nan
            return type("Out", (), {"logits": logits})()

    data = {"train": rows(["x"]), "test": rows(["x", "x", "y", "x"])[1:]}
    tests = TestSet.of(make_task("t", data, labels=("x", "y"), noun="n"), Encoder(_OneToken(), 20, 20))
    with pytest.raises(ValueError, match=r"task t: the model gives NaN for 2 of 3 test rows.*wider dtype"):
        evaluate(Broken(), tests, batch_size=2)


class _OneToken:
    """A tokenizer for which every text is one token."""

    eos_token, pad_token, bos_token_id, eos_token_id, pad_token_id = "e", "e", None, 2, 2

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[3 + len(text) + ord(text[-1]) % 100] for text in texts]}


def test_labels_end_where_one_begins_another(tiny) -> None:
    encoder = Encoder(tiny[1], 20, 20)
    eos = tiny[1].eos_token_id
    for labels, ends in ((("1", "10", "2"), True), (("yes", "yes indeed"), True), (("red", "rose"), False)):
        ids = encoder.answers(labels)
        assert told_apart(ids, encoder) == [[*one, eos] if ends else one for one in ids]


def test_a_model_that_has_learnt_them_tells_a_label_from_one_that_it_begins() -> None:
    """All weights are trained, so that greedy decoding gives every answer to the letter."""
    torch.manual_seed(0)
    model, tokenizer = load_model("tiny-random-llama")
    encoder = Encoder(tokenizer, 20, 20)
    labels = ("1", "10", "100")
    data = [Row(f"{'abc'[n % 3]}{n}", " Answer:", labels[n % 3], (labels[n % 3],)) for n in range(9)]
    batch = Collator(tokenizer.pad_token_id)(encoder.examples([row._asdict() for row in data]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    test = [row._replace(text=row.text.strip()) for row in data]
    task = make_task("t", {"train": rows(["1"]), "test": test}, labels=labels, noun="n")
    assert evaluate(model, TestSet.of(task, encoder)) == 100.0


def test_a_models_own_settings_do_not_change_generation(tiny) -> None:
    model, tokenizer = tiny
    task = make_task("t", {"train": rows(["x"] * 4)[3:], "test": rows(["x"] * 3)}, labels=(), noun="n", metric="rougeL")
    tests = TestSet.of(task, Encoder(tokenizer, 20, 8))
    found = []
    for settings_ in ({}, {"no_repeat_ngram_size": 1, "num_beams": 4, "repetition_penalty": 9.0}):
        other = deepcopy(model)
        other.generation_config = type(model.generation_config)(**settings_)
        texts = _generate(other, tests.prompts, tests.encoder, False)
        found.append(texts)
        assert all(getattr(other.generation_config, name) == value for name, value in settings_.items())
    assert found[0] == found[1]


def test_what_cutting_loses_is_counted() -> None:
    rows_ = [{"text": text, "question": ""} for text in ("aaaa 1", "aaaa 2", "aaaa 3", "b", "b")]
    examples = [
        {"prompt": [1] if row["text"][0] == "a" else [2], "answer": [answer]}
        for row, answer in zip(rows_, (7, 8, 7, 9, 7), strict=True)
    ]
    ambiguous, leaked = lost_by_cutting(rows_, examples, [[1], [3], [2]])
    assert ambiguous.startswith("3 of 5 training rows begin as others do that have another answer")
    assert leaked.startswith("2 of 3 test rows begin as training rows do")
    assert lost_by_cutting(rows_[3:], examples[3:], [[3]]) == []


def test_generation_is_greedy(tiny) -> None:
    model, tokenizer = tiny
    encoder = Encoder(tokenizer, 20, 5)
    prompts = encoder.prompts([row._asdict() for row in rows(["x"] * 3)])
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert all(answers)
    data = [row._replace(references=("other", answer)) for row, answer in zip(rows(answers), answers, strict=True)]
    wrong = [row._replace(answer="zzz", references=("zzz",)) for row in data[:1]] + data[1:]
    for test, wanted in ((data, 100.0), (wrong, 200 / 3)):
        task = make_task("t", {"train": rows(["x"] * 4)[3:], "test": test}, labels=(), noun="n", metric="accuracy")
        assert evaluate(model, TestSet.of(task, encoder)) == pytest.approx(wanted)


def test_answers_that_nan_chose_are_no_answers(tiny) -> None:
    model, tokenizer = tiny
    broken = deepcopy(model)
    task = make_task("t", {"train": rows(["x"] * 4)[3:], "test": rows(["x"] * 3)}, labels=(), noun="n", metric="rougeL")
    tests = TestSet.of(task, Encoder(tokenizer, 20, 5))
    token = next(iter(set(tests.prompts[0]) - set(tests.prompts[1]) - set(tests.prompts[2])))
    weight = model.lm_head.weight.detach().clone()  # the embeddings' apart from lm_head's, which they are tied to
    weight[token] = torch.nan
    broken.get_input_embeddings().weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"task t: the model gives NaN for 1 of 3 test rows.*wider dtype"):
        evaluate(broken, tests)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_s_mode_is_given_back_and_it_can_train_on(tiny, training: bool) -> None:
    model, tokenizer = tiny
    model.train(training)
    task = make_task("t", {"train": rows(["x"])[:1], "test": rows(["x", "y"])[1:]}, labels=("x", "y"), noun="n")
    evaluate(model, TestSet.of(task, Encoder(tokenizer, 20, 20)))
    assert model.training is training
    model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("the cat", "the dog sat", 0.4),  # LCS 1 of 2 and 3 words
        ("a b c d", "d c b a", 0.25),
        ("", "a", 0.0),
        ("ночь", "Ночь", 1.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, wanted: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(wanted)


def test_exact_match_is_normalised() -> None:
    assert same_answer(" The  Answer.", "the answer")
    assert not same_answer("the answers", "the answer")


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("-5", "5", False),
        ("(-5).", "-5", True),
        ("-.5", ".5", False),
        ("3.14", "314", False),
        ("It is $3.14.", "it is 3.14", True),
        ("1,000", "1000", True),
        ("well-known", "wellknown", True),
        ("5-6", "56", True),
        ("+", "-", False),
        ("", "?", False),
        (" ? ", "?", True),
        ("<=", ">=", False),
    ],
)
def test_numbers_keep_their_sign_and_their_point(prediction: str, reference: str, same: bool) -> None:
    assert same_answer(prediction, reference) is same
