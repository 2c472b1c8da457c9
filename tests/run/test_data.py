"""Rows to tokens: what is trained on, and that the loss is the mean over the answers' tokens and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from mbf.run.data import IGNORED, Collator, Encoder, pad_left
from mbf.run.model import load_model

ROWS = [
    {"text": "abcdefgh", "question": "\nWhat? Answer:", "answer": "yes"},
    {"text": "xy", "question": "\nWhat? Answer:", "answer": "no, never"},
]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-random-llama")


def test_only_the_text_is_truncated(tiny) -> None:
    tokenizer = tiny[1]
    encoder = Encoder(tokenizer, text_tokens=3, answer_tokens=4)
    assert [tokenizer.decode(ids) for ids in encoder.prompts(ROWS)] == ["abc\nWhat? Answer:", "xy\nWhat? Answer:"]
    answers = [example["answer"] for example in encoder.examples(ROWS)]
    assert [tokenizer.decode(ids[:-1]) for ids in answers] == [" yes", " no,"]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in answers)
    assert tokenizer.decode(encoder.answers(["no, never"])[0]) == " no, never"


def test_bos_only_where_the_tokenizer_puts_it(tiny) -> None:
    class WithBos:
        bos_token_id, eos_token, pad_token = 1, "</s>", "</s>"

        def __call__(self, text, add_special_tokens=True):
            ids = tiny[1](text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    plain = Encoder(tiny[1], 8, 8).prompts(ROWS)
    assert plain[0][0] != 1
    assert Encoder(WithBos(), 8, 8).prompts(ROWS) == [[1, *ids] for ids in plain]


def test_a_tokenizer_without_padding_is_refused(tiny) -> None:
    class NoPad:
        eos_token, pad_token = "</s>", None

    with pytest.raises(ValueError, match="no pad_token"):
        Encoder(NoPad(), 8, 8)


def test_padding_on_the_left() -> None:
    batch = pad_left([[5, 6, 7], [8]], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_labels_are_the_answers(tiny) -> None:
    examples = [{"prompt": [5, 6], "answer": [7, 2]}, {"prompt": [5], "answer": [8, 9, 2]}]
    batch = Collator(pad=2)(examples)
    assert batch["logits_to_keep"] == 4
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 2], [IGNORED, 8, 9, 2]]


def test_the_model_s_own_loss_is_that_of_the_answers(tiny) -> None:
    """Against one row at a time, without padding, with all logits."""
    model, tokenizer = tiny
    examples = Encoder(tokenizer, 6, 20).examples(ROWS)
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example["prompt"] + example["answer"]])
        logits = model(ids).logits[0, len(example["prompt"]) - 1 : -1]
        total = total + cross_entropy(logits, torch.tensor(example["answer"]), reduction="sum")
    count = sum(len(example["answer"]) for example in examples)
    batch = Collator(tokenizer.pad_token_id)(examples)
    torch.testing.assert_close(model(**batch).loss, total / count)
    torch.testing.assert_close(model(**batch, num_items_in_batch=2 * count).loss, total / (2 * count))
