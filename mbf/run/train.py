"""Training on one task: ``transformers.Trainer``, watched, with checkpoints that a kill cannot spoil."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mbf.run.checkpoint import TaskCheckpoint, seal
from mbf.run.config import TrainSection
from mbf.run.data import Collator
from mbf.run.processes import Processes
from mbf.run.progress import Progress
from mbf.run.trainer import RunTrainer


@dataclass(frozen=True)
class Trained:
    """What training on a task took, over all processes that had a part in it: wall-clock seconds, unpadded tokens."""

    seconds: float
    tokens: int


def steps_of(examples: int, train: TrainSection) -> int:
    """Optimiser steps of one task."""
    batches = -(-examples // train.batch_size)
    return train.epochs * -(-batches // train.accumulation)


def warmup_of(examples: int, train: TrainSection) -> int:
    """Steps of warm-up: half of a short task's at most, which would else be over before its rate is there."""
    return min(train.warmup_steps, steps_of(examples, train) // 2)


def train_task(
    model: nn.Module,
    examples: Sequence[Mapping[str, list[int]]],
    train: TrainSection,
    *,
    pad: int,
    seed: int,
    directory: Path,
    run_name: str,
    method_state: Callable[[], Mapping[str, Tensor]],
    check: Callable[[Tensor], None],
    checkpoint: TaskCheckpoint | None,
    progress: Progress,
    processes: Processes,
) -> Trained:
    """Train whatever of ``model`` requires grad, with AdamW, on the answers of ``examples``.

    Args:
        model: a PEFT model; on return it is trained.
        examples: from ``Encoder.examples``.
        train: sizes and rates; the batch is that of all processes together.
        pad: id of the padding token.
        seed: of the batches and dropout. The same seed gives the same bits, interrupted or not.
        directory: for checkpoints, the newest of which stays.
        run_name: what trackers (``train.report_to``) call the task.
        method_state: asked at every checkpoint for what to put beside it.
        check: called with the loss of every step before its gradients are clipped and used; what it raises ends the
            training.
        checkpoint: where to go on, or None.
        progress: told of every step.
        processes: those that train together, each with its rows of every batch.
    """
    several = processes.size > 1
    arguments = TrainingArguments(
        output_dir=str(directory),
        run_name=run_name,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size // processes.size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=warmup_of(len(examples), train),
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        optim="adamw_torch",
        seed=seed,
        save_strategy="steps",
        save_steps=train.save_steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log the mean of the losses before in the place of NaN
        include_num_input_tokens_seen="non_padding",
        report_to=train.report_to,
        label_names=["labels"],
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=several and processes.device.type == "cpu",
        ddp_find_unused_parameters=False if several else None,
    )
    watch = _Watch(progress, steps_of(len(examples), train), method_state, checkpoint, processes, seed)
    trainer = RunTrainer(
        model,
        arguments,
        processes=processes,
        rows=examples,
        batch_size=train.batch_size,
        padding={"prompt": [pad], "answer": []},
        check=check,
        data_collator=Collator(pad),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    tokens = train.epochs * sum(len(example["prompt"]) + len(example["answer"]) for example in examples)
    return Trained(watch.seconds, tokens)


class _Watch(TrainerCallback):
    """Tells ``Progress`` of every step and seals every checkpoint."""

    def __init__(
        self,
        progress: Progress,
        steps: int,
        method_state: Callable[[], Mapping[str, Tensor]],
        checkpoint: TaskCheckpoint | None,
        processes: Processes,
        seed: int,
    ) -> None:
        self.processes = processes
        self.seed = seed
        self.progress = progress
        self.steps = steps
        self.method_state = method_state
        self.first_step, self.seconds_before = (checkpoint.step, checkpoint.seconds) if checkpoint else (0, 0.0)
        self.first_tokens = 0
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_tokens = int(state.num_input_tokens_seen)
        self.began = time.perf_counter()
        if self.processes.rank:  # another process, other rows: dropout masks of its own
            torch.manual_seed(self.seed + 1_000_003 * self.processes.rank)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the summary at the end
            return
        here = time.perf_counter() - self.began
        tokens = int(state.num_input_tokens_seen) - self.first_tokens
        left = (self.steps - state.global_step) * here / (state.global_step - self.first_step)
        self.progress.step(state.global_step, self.steps, logs["loss"], tokens / here, left)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.processes.wait()  # each has written its random state
        if self.processes.main:
            seal(path, state.global_step, self.seconds, self.method_state())
        self.processes.wait()
