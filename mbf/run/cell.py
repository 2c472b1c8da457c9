"""One cell of a run: one method learns one order of the stream with one seed."""

from __future__ import annotations

import shlex
import shutil
import warnings
from dataclasses import dataclass
from typing import Any

from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed

from mbf import methods
from mbf.continual import ContinualLora, DivergedError
from mbf.continual.header import CheckpointError
from mbf.report import RunResult, TaskMemory
from mbf.report.result import parse_result
from mbf.run.checkpoint import newest
from mbf.run.config import MethodSpec, RunConfig
from mbf.run.data import Collator
from mbf.run.directory import COMPARISON, CellDirectory, RunDirectory, read_json, write_json
from mbf.run.ledger import AT_ONCE, Learned, Ledger
from mbf.run.train import Trained, steps_of, train_task
from mbf.run.workbench import Workbench


@dataclass(frozen=True)
class CellKey:
    """Which cell."""

    method: MethodSpec
    order: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.label}-order{self.order}-seed{self.seed}"

    def task_seed(self, number: int) -> int:
        """The seed of everything random in task ``number`` (0: making the adapter), apart for every seed and task."""
        return 10_000 * self.seed + number


def cells_of(config: RunConfig) -> list[CellKey]:
    """All cells; methods change fastest, so that they can be compared early."""
    return [CellKey(m, order, seed) for seed in config.seeds for order in config.orders for m in config.methods]


def finished(key: CellKey, run: RunDirectory) -> RunResult | None:
    """The cell's result, if it is there."""
    path = run.cell(key.name).result
    data = read_json(path)
    return None if data is None else parse_result(data, path)


class Cell:
    """Learns and evaluates task after task, from wherever the cell's directory says that it was left.

    The ledger is what counts: a task is learned when the ledger says so, which it does after the learner was saved.
    Before every task all seeds are set anew, so a cell that goes on in a new process computes what it would have.

    A task that diverges ends the cell, or is skipped (``on_bad_task``); then the ledger says so in its place, and the
    learner stays and is saved as it was.
    """

    def __init__(self, key: CellKey, run: RunDirectory, bench: Workbench) -> None:
        self.key = key
        self.run_directory = run
        self.directory: CellDirectory = run.cell(key.name)
        self.bench = bench
        self.config = bench.config
        self.tasks = bench.stream.orders[key.order]
        self.joint = methods.get(key.method.name).joint
        self.rounds = [(AT_ONCE, self.tasks)] if self.joint else [(name, (name,)) for name in self.tasks]
        self.processes = bench.processes
        self.ledger = self.processes.on_main(lambda: Ledger.read(self.directory.progress, self.tasks, self.joint))

    def run(self) -> RunResult:
        """Do what is left, write adapter and result."""
        self._tidy(len(self.ledger.learned))
        model = self.bench.base_model()
        zero_shot = self.bench.zero_shot(model, self.run_directory.zero_shot)
        learner = self._learner(model)
        for number in range(1, len(self.rounds) + 1):
            if number > len(self.ledger.learned):
                self._learn(learner, number, zero_shot)
            self._evaluate(learner, number)
        learner.export(self.directory.adapter)
        result = self._result(zero_shot)
        if self.processes.main:
            write_json(self.directory.result, result.model_dump(mode="json"))
        self.processes.wait()
        return result

    def _tidy(self, learned: int) -> None:
        self.processes.on_main(lambda: self.directory.tidy(learned))

    def _write_ledger(self) -> None:
        if self.processes.main:
            self.ledger.write(self.directory.progress)

    def _learner(self, model: nn.Module) -> ContinualLora:
        lora = self.config.lora
        set_seed(self.key.task_seed(0))
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
        )
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that transformers renamed; nothing that a user could mend
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, adapter)
        if self.ledger.learned:
            learner = self._stored_learner(adapted)
        else:
            learner = ContinualLora(adapted, self.key.method.name, fuse=self.config.fuse, **self.key.method.options)
        if self.processes.sharded:
            self.processes.shard(adapted)
        return learner

    def _stored_learner(self, adapted: nn.Module) -> ContinualLora:
        try:
            return ContinualLora.load(adapted, self.directory.state(len(self.ledger.learned)), fuse=self.config.fuse)
        except CheckpointError as error:
            note = f"or remove {self.directory.root}, and the cell is learned anew"
            vars(error).setdefault("__notes__", []).append(note)
            raise

    def _learn(self, learner: ContinualLora, number: int, zero_shot: dict[str, float]) -> None:
        name, skipped, scores = self.rounds[number - 1][0], None, {}
        try:
            trained = self._train(learner, number)
        except DivergedError as error:
            skipped, trained = self._refuse(error, number), Trained(seconds=0.0, tokens=0)
            # The LoRA has not changed, and so have no scores.
            scores = dict(self.ledger.learned[-1].scores if self.ledger.learned else zero_shot)
        with warnings.catch_warnings():
            # What plain PEFT loads is exported at the cell's end.
            warnings.filterwarnings("ignore", "method '.*' computes something else than the adapter that is saved")
            learner.save(self.directory.state(number))
        memory = learner.memory_bytes()
        self.ledger.learned.append(
            Learned(
                name=name,
                seconds=trained.seconds,
                tokens=trained.tokens,
                adapter_bytes=memory["adapter"],
                state_bytes=memory["state"],
                skipped=skipped,
                scores=scores,
            )
        )
        self._write_ledger()
        self._tidy(number)

    def _train(self, learner: ContinualLora, number: int) -> Trained:
        name, members = self.rounds[number - 1]
        train, progress = self.config.train, self.bench.progress
        examples = [example for task in members for example in self.bench.examples(task)]
        steps = steps_of(len(examples), train)
        progress.task_started(self.key.name, name, number, len(self.rounds), steps)
        checkpoint = self.processes.on_main(lambda: newest(self.directory.train(number)))
        seed = self.key.task_seed(number)
        set_seed(seed)
        with learner.task(name, self._batches(examples), steps):
            if checkpoint is not None:
                progress.message(f"{name}: goes on after step {checkpoint.step}")
                learner.continue_task(checkpoint.method_state(), checkpoint.step)
            return train_task(
                learner.model,
                examples,
                train,
                pad=self.bench.tokenizer.pad_token_id,
                seed=seed,
                directory=self.directory.train(number),
                run_name=f"{self.run_directory.root.name}/{self.key.name}/{name}",
                method_state=learner.method.state_dict,
                check=learner.check_step,
                checkpoint=checkpoint,
                progress=progress,
                processes=self.processes,
            )

    def _refuse(self, error: DivergedError, number: int) -> str:
        """Why task ``number`` is skipped; raises ``error`` where it is not, with its checkpoints gone, which may hold
        what made it diverge."""
        if self.config.on_bad_task == "skip":
            reason = self.processes.on_main(lambda: " ".join(str(error).split()))
            self.bench.progress.message(f"{self.key.name}: skipped: {reason}")
            return reason

        def stop() -> None:
            checkpoints, root = self.directory.train(number), shlex.quote(str(self.run_directory.root))
            if checkpoints.exists():
                shutil.rmtree(checkpoints)
            again = f"mbf resume {root} --on-bad-task skip"
            if (self.run_directory.root / COMPARISON).exists():
                again = f"mbf compare --out {root} --set on_bad_task=skip"
            error.args = (f"{error} To leave the task out: {again}",)
            raise error

        self.processes.on_main(stop)
        raise AssertionError("on_main raises on all processes")

    def _batches(self, examples: list[dict[str, list[int]]]) -> DataLoader[Any]:
        """The task's data for methods that take statistics of it, in the order of the rows."""
        collate, device = Collator(self.bench.tokenizer.pad_token_id), self.bench.device
        return DataLoader(
            examples,  # type: ignore[arg-type]
            batch_size=self.config.train.batch_size,
            collate_fn=lambda rows: send_to_device(collate(rows), device),
        )

    def _evaluate(self, learner: ContinualLora, number: int) -> None:
        learned = self.ledger.learned[number - 1]
        seen_only = self.config.eval.every == "seen" and not self.joint
        names = {one.name for one in self.ledger.learned[:number] if one.skipped is None}
        for task in self.tasks[:number] if seen_only else self.tasks:
            if task not in learned.scores:
                learner.select_task(task if task in names and not self.joint else None)
                learned.scores[task] = self.bench.score(learner.model, self.key.name, learned.name, task)
                self._write_ledger()
        learner.select_task(None)

    def _result(self, zero_shot: dict[str, float]) -> RunResult:
        learned, facts = self.ledger.learned, self.run_directory.facts
        return RunResult(
            method=self.key.method.name,
            label=self.key.method.label,
            stream=self.bench.stream.name,
            order=self.key.order,
            order_tasks=self.tasks,
            seed=self.key.seed,
            matrix=self.ledger.matrix(zero_shot, self.joint),
            skipped=self.ledger.skipped(self.joint),
            memory=[TaskMemory(adapter_bytes=one.adapter_bytes, state_bytes=one.state_bytes) for one in learned],
            train_seconds=[one.seconds for one in learned],
            train_tokens=[one.tokens for one in learned],
            method_options=self.key.method.options,
            versions=facts["versions"],
            data_hashes=facts["data"],
            config=facts["config"],
            command=facts["command"],
        )
