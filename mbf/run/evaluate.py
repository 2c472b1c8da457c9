"""Scores of a model on a task's test rows.

Classification ranks the labels by length-normalised log-likelihood; ``choice_scores`` does that in two forwards a
batch, whatever the number of labels: one over the prompts, and one over the *tree* of the labels' tokens, in which
labels that begin alike share nodes, each node seeing its prompt (from the key-value cache) and its own ancestors.
Labels of a single token need no second forward. Where a label begins another, as "1" does "10", all end in EOS, as they
do in training: else nothing would count against stopping at the shorter one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mbf.run.data import Encoder, pad_left
from mbf.run.processes import Processes
from mbf.streams import Task

_SURPLUS = re.compile(rf"(?!\.\d|(?<!\w)-\.?\d)[{re.escape(string.punctuation)}]")
"""Punctuation that is no part of a number."""


@dataclass(frozen=True)
class ChoiceTree:
    """Inner nodes of the trie of all labels' token ids; source 0 is the prompt's last token, source n + 1 is node n.

    Attributes:
        tokens: token id of each node.
        parents: source from which each node continues.
        depths: of each node, 1 for those that follow the prompt.
        steps: for each label its (source, token id) pairs: log p(label) = sum of log p(token | source).
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    steps: list[list[tuple[int, int]]] = field(default_factory=list)

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> ChoiceTree:
        """The tree of ``labels``, each a non-empty list of token ids."""
        tree = cls()
        source_of: dict[tuple[int, ...], int] = {(): 0}
        for label in labels:
            steps = []
            for depth, token in enumerate(label):
                before = tuple(label[:depth])
                if before not in source_of:
                    tree.tokens.append(before[-1])
                    tree.parents.append(source_of[before[:-1]])
                    tree.depths.append(depth)
                    source_of[before] = len(tree.tokens)
                steps.append((source_of[before], token))
            tree.steps.append(steps)
        return tree

    def ancestry(self) -> Tensor:
        """bool [nodes, nodes]: whether node n sees node m, that is, m is n or an ancestor of it."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for n, parent in enumerate(self.parents):
            if parent:
                seen[n] |= seen[parent - 1]
        return seen


@dataclass(frozen=True)
class TestSet:
    """A task's test rows as tokens, made once a run: ``choices`` for classification, None for generation."""

    __test__ = False  # no test class, whatever the name

    name: str
    metric: str
    prompts: list[list[int]]
    references: list[list[str]]
    labels: tuple[str, ...]
    choices: ChoiceTree | None
    encoder: Encoder

    @classmethod
    def of(cls, task: Task, encoder: Encoder) -> TestSet:
        classify = task.kind == "classification"
        return cls(
            name=task.name,
            metric=task.metric,
            prompts=encoder.prompts(task.test),
            references=list(task.test["references"]),
            labels=task.labels,
            choices=ChoiceTree.of(told_apart(encoder.answers(task.labels), encoder)) if classify else None,
            encoder=encoder,
        )


def told_apart(labels: list[list[int]], encoder: Encoder) -> list[list[int]]:
    """Token ids of every label, with EOS if one is the beginning of another."""
    beginnings = {tuple(label[:n]) for label in labels for n in range(1, len(label))}
    if beginnings.isdisjoint(map(tuple, labels)):
        return labels
    return [[*label, encoder.tokenizer.eos_token_id] for label in labels]


def evaluate(
    model: nn.Module,
    tests: TestSet,
    batch_size: int = 32,
    watch: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> float:
    """The score of ``model`` on ``tests`` in percent: accuracy, or mean Rouge-L F1 where the metric is ``rougeL``; of
    several references the best counts. A label is right if it is a reference to the letter, generated text by
    ``same_answer``.

    Args:
        model: a causal LM, with or without adapters; evaluated in eval mode and left in the mode it was in.
        tests: from ``TestSet.of``.
        batch_size: prompts a forward; they are sorted by length, which changes no score.
        watch: called with (rows done, rows in all) after every batch.
        processes: those that evaluate together, each its share of the batches; the score is the same on all, and that
            of a single process.

    Raises:
        ValueError: the model gives NaN, by which no labels are ranked and no tokens chosen.
    """
    order = sorted(range(len(tests.prompts)), key=lambda row: len(tests.prompts[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, size = (processes.rank, processes.size) if processes is not None else (0, 1)
    sharded = processes is not None and processes.sharded
    points = torch.zeros(len(order), dtype=torch.float64)
    with _evaluating(model, inference=not sharded):
        for turn in range(-(-len(batches) // size)):
            # A process without a batch of its own repeats the last: a sharded model needs all of them in every forward.
            number = turn * size + rank
            rows = batches[min(number, len(batches) - 1)]
            predictions = _predict(model, tests, [tests.prompts[row] for row in rows], sharded)
            if number < len(batches):
                for row, prediction in zip(rows, predictions, strict=True):
                    points[row] = (
                        max(_points(tests, prediction, answer) for answer in tests.references[row])
                        if prediction is not None
                        else torch.nan
                    )
            if watch is not None:
                watch(min((turn + 1) * size * batch_size, len(order)), len(order))
    if processes is not None:
        points = processes.total(points)
    if bad := int(points.isnan().sum()):
        raise ValueError(
            f"task {tests.name}: the model gives NaN for {bad} of {len(order)} test rows, wanted numbers to choose "
            "answers by; compute in a wider dtype (dtype: bfloat16 or float32), or load the model anew"
        )
    return 100.0 * sum(points[order].tolist()) / len(order)


def choice_scores(model: nn.Module, prompts: Sequence[Sequence[int]], tree: ChoiceTree, pad: int) -> Tensor:
    """float32 [prompts, labels]: log-likelihood of each label after each prompt, divided by the label's tokens.

    The model must take a key-value cache and, where a label has several tokens, 4-D attention masks (sdpa or eager).
    """
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in pad_left(prompts, pad).items()}
    out = model(**inputs, use_cache=bool(tree.tokens), logits_to_keep=1)
    logits = out.logits
    if tree.tokens:
        after = _tree_logits(model, inputs, out.past_key_values, tree)
        logits = torch.cat([logits, after], dim=1)
    logits = logits.float()
    pairs = [pair for steps in tree.steps for pair in steps]
    sources, tokens = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    log_p = logits[:, sources, tokens] - logits.logsumexp(-1)[:, sources]
    return torch.stack([part.mean(1) for part in log_p.split([len(steps) for steps in tree.steps], dim=1)], dim=1)


def _tree_logits(model: nn.Module, inputs: dict[str, Tensor], cache: Any, tree: ChoiceTree) -> Tensor:
    """[prompts, nodes, vocabulary]: logits at every node of the tree."""
    prompt_mask, positions = inputs["attention_mask"], inputs["position_ids"]
    device, (batch, nodes) = prompt_mask.device, (len(prompt_mask), len(tree.tokens))
    seen = torch.cat(
        [prompt_mask.bool()[:, None].expand(-1, nodes, -1), tree.ancestry().to(device).expand(batch, -1, -1)], dim=2
    )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    additive = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return model(
        input_ids=torch.tensor(tree.tokens, device=device).expand(batch, -1),
        attention_mask=additive[:, None],
        position_ids=positions[:, -1:] + torch.tensor(tree.depths, device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits


def rouge_l(prediction: str, reference: str) -> float:
    """Rouge-L F1, 0 to 1: from the longest common subsequence of lower-cased words (of any script), no stemming."""
    found, wanted = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
    row = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for column, other in enumerate(wanted, 1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0


def same_answer(prediction: str, reference: str) -> bool:
    """Exact match of lower-cased text without punctuation and surplus space.

    Of the punctuation, a point before a digit stays, and so does a hyphen that begins a number: "-5" is not "5", nor
    "3.14" "314". A comma goes: "1,000" is "1000".
    """
    found, wanted = (" ".join(_SURPLUS.sub("", text.lower()).split()) for text in (prediction, reference))
    if not (found and wanted):  # "+" is not "-", and neither is nothing
        return prediction.strip() == reference.strip()
    return found == wanted


def _predict(model: nn.Module, tests: TestSet, prompts: list[list[int]], sharded: bool) -> list[str | None]:
    """An answer to each prompt; None where there are NaN among what it would be chosen by."""
    if tests.choices is None:
        return _generate(model, prompts, tests.encoder, sharded)
    scores = choice_scores(model, prompts, tests.choices, tests.encoder.tokenizer.pad_token_id)
    # argmax names no order among equals; a maximum's first place is the first label by any reading.
    best = (scores == scores.max(1, keepdim=True).values).int().argmax(1)
    return [
        None if row.isnan().any() else tests.labels[index] for row, index in zip(scores, best.tolist(), strict=True)
    ]


def _generate(model: Any, prompts: list[list[int]], encoder: Encoder, sharded: bool) -> list[str | None]:
    from transformers import GenerationConfig, LogitsProcessorList

    tokenizer = encoder.tokenizer
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in pad_left(prompts, tokenizer.pad_token_id).items()}
    greedy = GenerationConfig(
        max_new_tokens=encoder.answer_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    watch = _WatchForNaN(torch.zeros(len(prompts), dtype=torch.bool, device=device))
    # Synced: processes that are done go on with forwards that others need.
    with _no_settings_of_its_own(model):
        ids = model.generate(
            **inputs, generation_config=greedy, synced_gpus=sharded, logits_processor=LogitsProcessorList([watch])
        )
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [None if bad else text.strip() for text, bad in zip(texts, watch.rows.tolist(), strict=True)]


@contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """What a model's ``generation_config.json`` sets (beams, penalties) would fill in what ours leaves open."""
    from transformers import GenerationConfig

    holders = {id(one): one for one in (model, model.get_base_model() if hasattr(model, "get_base_model") else model)}
    kept = [(one, one.generation_config) for one in holders.values()]
    for one, _ in kept:
        one.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for one, settings in kept:
            one.generation_config = settings


@dataclass(frozen=True)
class _WatchForNaN:
    """A logits processor that changes nothing and marks in ``rows`` those whose logits were NaN."""

    rows: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.logical_or_(scores.isnan().any(1))
        return scores


def _points(tests: TestSet, prediction: str, answer: str) -> float:
    if tests.metric == "rougeL":
        return rouge_l(prediction, answer)
    return float(prediction == answer if tests.choices is not None else same_answer(prediction, answer))


@contextmanager
def _evaluating(model: nn.Module, inference: bool) -> Iterator[None]:
    """Without gradients; ``inference`` mode would leave gathered parameters that no later training can use."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            yield
    finally:
        model.train(training)
