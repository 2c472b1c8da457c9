"""What all cells of a run share: the stream, the test sets, the tokenizer, the base model and its zero-shot scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbf.run.config import ConfigError, RunConfig
from mbf.run.data import Encoder
from mbf.run.directory import read_json, write_json
from mbf.run.evaluate import TestSet, evaluate
from mbf.run.ledger import check_scores
from mbf.run.model import load_model
from mbf.run.processes import Processes
from mbf.run.progress import Progress
from mbf.streams import Stream, load_stream


class Workbench:
    """Loads stream and model, and checks against them what the configuration alone could not show.

    Raises:
        ConfigError: an order that the stream has not, target modules that the model has not, or a batch that the
            processes cannot share.
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
        self.stream: Stream = load_stream(config.stream, train_rows=config.train.rows, test_rows=config.eval.rows)
        for order in config.orders:
            if order not in self.stream.orders:
                known = ", ".join(map(str, self.stream.orders))
                raise ConfigError(f"orders: stream {self.stream.name!r} has no order {order}; it has {known}")
        progress.message(f"loading {config.model}")
        model, self.tokenizer = load_model(config.model, getattr(torch, config.dtype))
        self._loaded: Any = model
        self._check_targets(model)
        self.encoder = Encoder(self.tokenizer, config.train.text_tokens, config.train.answer_tokens)
        self.tests = {name: TestSet.of(task, self.encoder) for name, task in self.stream.tasks.items()}

    def data_hashes(self) -> dict[str, str]:
        """sha256 of the rows by task."""
        return {name: task.fingerprint for name, task in self.stream.tasks.items()}

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
        if isinstance(targets, str):  # "all-linear", or a pattern, which PEFT reads
            return
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                ends = sorted({name.rpartition(".")[2] for name in names})
                raise ConfigError(f"lora.target_modules: the model has no {target!r}; it has {', '.join(ends)}")
