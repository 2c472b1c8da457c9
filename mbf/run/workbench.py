"""What all cells of a run share: the stream, the test sets, the tokenizer, the base model and its zero-shot scores."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mbf.run.config import ConfigError, RunConfig
from mbf.run.data import Encoder, lost_by_cutting
from mbf.run.directory import read_json, write_json
from mbf.run.evaluate import TestSet, evaluate
from mbf.run.ledger import check_scores
from mbf.run.model import digest_of, load_model
from mbf.run.processes import Processes
from mbf.run.progress import Progress
from mbf.streams import Stream, load_stream

_UNLISTED = ("azure_ml", "flyte")  # trackers that transformers does not list, or not always, when they are installed


class Workbench:
    """Loads stream and model, and checks against them what the configuration alone could not show.

    Raises:
        ConfigError: an order that the stream has not, target modules that the model has not, a batch that the
            processes cannot share, or a tracker that is unknown or not installed.
        mbf.streams.StreamError, ValueError: from loading them.
    """

    def __init__(self, config: RunConfig, progress: Progress, processes: Processes) -> None:
        self.config = config
        self.progress = progress
        self.processes = processes
        self.device = processes.device
        if config.train.batch_size % processes.size:
            raise ConfigError(
                f"train.batch_size: {config.train.batch_size} rows, the batch of all processes together, cannot be "
                f"shared evenly by {processes.size}; choose a multiple of {processes.size}, or other processes"
            )
        _check_trackers(config.train.report_to)
        self.stream: Stream = load_stream(config.stream, train_rows=config.train.rows, test_rows=config.eval.rows)
        for order in config.orders:
            if order not in self.stream.orders:
                known = ", ".join(map(str, self.stream.orders))
                raise ConfigError(f"orders: stream {self.stream.name!r} has no order {order}; it has {known}")
        progress.message(f"loading {config.model}")
        model, self.tokenizer = load_model(config.model, getattr(torch, config.dtype))
        self._loaded: Any = model
        self._model_digest = digest_of(config.model, model)
        self._check_targets(model)
        self.encoder = Encoder(self.tokenizer, config.train.text_tokens, config.train.answer_tokens)
        self._told: set[str] = set()
        self.tests = {name: TestSet.of(task, self.encoder) for name, task in self.stream.tasks.items()}

    def facts(self) -> dict[str, dict[str, str]]:
        """What scores depend on: ``data``, sha256 of the rows by task, and ``rules``, that of all else by its name."""
        tasks = self.stream.tasks
        rules = {
            f"labels or metric of {name}": hashlib.sha256(
                json.dumps([task.kind, task.labels, task.noun, task.metric]).encode()
            ).hexdigest()
            for name, task in tasks.items()
        }
        if self._model_digest is not None:
            rules["the model"] = self._model_digest
        return {"data": {name: task.fingerprint for name, task in tasks.items()}, "rules": rules}

    def examples(self, name: str) -> list[dict[str, list[int]]]:
        """A task's training rows as tokens; what is lost by cutting their texts is told the first time."""
        task = self.stream.tasks[name]
        examples = self.encoder.examples(task.train)
        if name not in self._told:
            self._told.add(name)
            for note in lost_by_cutting(task.train, examples, self.tests[name].prompts):
                self.progress.message(f"{name}: {note}; raise train.text_tokens ({self.config.train.text_tokens})")
        return examples

    def base_model(self) -> nn.Module:
        """The model as it came, a new one at every call, on ``device``, which accelerate chooses."""
        model, self._loaded = self._loaded, None
        if model is None:
            model, _ = load_model(self.config.model, getattr(torch, self.config.dtype))
        return model.to(self.device)

    def zero_shot(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Scores of the untouched ``model`` by task, kept at ``path``; none where only seen tasks are evaluated."""
        scores = self.processes.on_main(lambda: check_scores({} if (data := read_json(path)) is None else data, path))
        if self.config.eval.every == "seen":
            return scores
        for task in self.stream.tasks:
            if task not in scores:
                scores[task] = self.score(model, "zero-shot", None, task)
                if self.processes.main:
                    write_json(path, scores)
        return scores

    def score(self, model: nn.Module, cell: str, after: str | None, task: str) -> float:
        """The score on ``task`` in percent, with the progress told."""

        def watch(done: int, total: int) -> None:
            self.progress.evaluating(cell, after, task, done, total)

        score = evaluate(model, self.tests[task], self.config.eval.batch_size, watch, self.processes)
        self.progress.scored(cell, after, task, score)
        return score

    def _check_targets(self, model: nn.Module) -> None:
        targets = self.config.lora.target_modules
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        if isinstance(targets, str):
            if targets.lower() != "all-linear":
                self._check_pattern(targets, model, linear, ends)
            return
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                raise ConfigError(f"lora.target_modules: the model has no {target!r}; it has {ends}")

    @staticmethod
    def _check_pattern(pattern: str, model: nn.Module, linear: list[str], ends: str) -> None:
        """Of a string PEFT takes the modules whose whole name it matches as a regular expression."""
        example = pattern if any(name.endswith(f".{pattern}") for name in linear) else "q_proj, v_proj"
        way = f"write a list to name modules by their end, [{example}]"
        try:
            found = [name for name, _ in model.named_modules() if name and re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(
                f"lora.target_modules: found {pattern!r}, which is no regular expression ({error}); {way}"
            ) from None
        wanted = f"{way}; the model has {ends}"
        if not found:
            raise ConfigError(
                f"lora.target_modules: no module's whole name matches {pattern!r}, a regular expression; {wanted}"
            )
        if other := next((name for name in found if any(model.get_submodule(name).children())), None):
            raise ConfigError(
                f"lora.target_modules: {pattern!r}, a regular expression, matches {other!r}, too, which is no "
                f"single layer; {wanted}"
            )


def _check_trackers(report_to: str | list[str]) -> None:
    """As ``TrainingArguments`` takes them, and before there is something to report."""
    names = [report_to] if isinstance(report_to, str) else report_to
    if names in (["none"], ["all"]):
        return
    known, installed = [*INTEGRATION_TO_CALLBACK], get_available_reporting_integrations()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: none, all, {', '.join(known)}"
            raise ConfigError(f"train.report_to: the tracker {name!r} is unknown; {hint}")
        if name not in installed and name not in _UNLISTED:
            there = ", ".join(installed) or "none"
            raise ConfigError(
                f"train.report_to: the tracker {name!r} is not installed (there are: {there}); install it, or set "
                "train.report_to=none"
            )
