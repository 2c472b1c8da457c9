"""From a task's rows to token ids, for training and for evaluation alike.

A row is ``text[:N tokens] + question + " " + answer + EOS``; the loss is on answer and EOS alone. Batches are padded
on the left, so that all answers end in the last columns and the head need be computed there only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Encoder:
    """Tokenises rows with the columns text, question and answer.

    Attributes:
        tokenizer: of transformers. BOS is put first if the tokenizer itself does so.
        text_tokens: what is kept of a text.
        answer_tokens: what is kept of an answer in training, and the most that is generated.

    Raises:
        ValueError: a tokenizer without EOS or padding token.
    """

    tokenizer: Any
    text_tokens: int
    answer_tokens: int

    def __post_init__(self) -> None:
        for token in ("eos_token", "pad_token"):
            if getattr(self.tokenizer, token) is None:
                raise ValueError(f"the tokenizer has no {token}; set tokenizer.{token} and save it with the model")

    def prompts(self, rows: Iterable[Mapping[str, str]]) -> list[list[int]]:
        """Token ids of text and question of every row."""
        rows = list(rows)
        texts, questions = (self._ids([row[column] for row in rows]) for column in ("text", "question"))
        start = self._start()
        return [start + text[: self.text_tokens] + question for text, question in zip(texts, questions, strict=True)]

    def answers(self, answers: Iterable[str]) -> list[list[int]]:
        """Token ids of every answer as it follows its prompt, without EOS."""
        return self._ids([f" {answer}" for answer in answers])

    def examples(self, rows: Iterable[Mapping[str, str]]) -> list[dict[str, list[int]]]:
        """Training examples: ``prompt`` and ``answer``, the latter ending in EOS."""
        rows = list(rows)
        end = [self.tokenizer.eos_token_id]
        return [
            {"prompt": prompt, "answer": answer[: self.answer_tokens] + end}
            for prompt, answer in zip(self.prompts(rows), self.answers(row["answer"] for row in rows), strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []


def lost_by_cutting(
    rows: Iterable[Mapping[str, str]], examples: Sequence[Mapping[str, list[int]]], held_out: Iterable[Sequence[int]]
) -> list[str]:
    """What is no longer told apart where only the beginning of a text is kept.

    Args:
        rows: of training, with the columns text and question.
        examples: the same as ``Encoder.examples`` made them.
        held_out: prompts of the test rows. No whole text is in both splits.
    """
    seen: dict[tuple[int, ...], set[tuple[str, tuple[int, ...]]]] = {}
    for row, example in zip(rows, examples, strict=True):
        seen.setdefault(tuple(example["prompt"]), set()).add((row["text"], tuple(example["answer"])))
    unlike = {p for p, found in seen.items() if len({t for t, _ in found}) > 1 and len({a for _, a in found}) > 1}
    ambiguous = sum(tuple(example["prompt"]) in unlike for example in examples)
    held_out = [tuple(prompt) for prompt in held_out]
    leaked = sum(prompt in seen for prompt in held_out)
    notes = []
    if ambiguous:
        notes.append(
            f"{ambiguous} of {len(examples)} training rows begin as others do that have another answer, and the model "
            "sees no more of them"
        )
    if leaked:
        notes.append(f"{leaked} of {len(held_out)} test rows begin as training rows do, and the model sees no more")
    return notes


@dataclass(frozen=True)
class Collator:
    """Batches of training examples, as a causal LM of transformers takes them.

    ``input_ids``, ``attention_mask`` and ``position_ids`` are int64 [batch, length], padded on the left;
    ``logits_to_keep`` = K is one more than the longest answer; ``labels`` [batch, K] belong to those last K columns,
    so the model's own loss, which shifts by one, sees exactly the answers.
    """

    pad: int

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        keep = 1 + max(len(example["answer"]) for example in examples)
        labels = torch.full((len(examples), keep), IGNORED)
        for row, example in enumerate(examples):
            labels[row, keep - len(example["answer"]) :] = torch.tensor(example["answer"], dtype=torch.int64)
        inputs = pad_left([example["prompt"] + example["answer"] for example in examples], self.pad)
        return {**inputs, "labels": labels, "logits_to_keep": keep}


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``position_ids``, int64 [batch, longest]; positions count from 0 a row."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
