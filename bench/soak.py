"""Hundreds of tasks in one process: its memory, the time a task takes, and the merged LoRA against the closed form.

``loop`` takes a learner through tasks with a plain training loop and saves it after each; ``run`` is ``mbf run`` over
as many tasks with an evaluation of all that were seen; ``merge`` makes adapters and merges all so far with
``merge_adapters``, again and again. A tiny Llama, so that what grows shows. After every task the merged LoRA on disk is
held against ``A_ft(T)`` and ``Σ w_i B_ft(i)``, ``w_i = i^(-1/2) Π_{j>i} (1 − j^(-1/2))``, in fp64 (arXiv 2512.23017,
Algorithm 1, with the recurrence written out).

    python bench/soak.py loop --csv bench/results/soak_loop.csv
    python bench/soak.py run --csv bench/results/soak_run.csv
    python bench/soak.py merge --csv bench/results/soak_merge.csv
    python bench/soak_plot.py bench/results/soak_{loop,run,merge}.csv
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from common import csv_rows, facts
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from mbf.continual import ContinualLora, merge_adapters
from mbf.peft.stored import read_tensors
from mbf.run import LogProgress
from mbf.run import run as run_stream
from mbf.run.config import parse_config

TASKS = {"loop": 200, "run": 200, "merge": 500}
TOLERANCE = 1e-5  # of the norm of B
RANK, VOCABULARY, ROWS, LENGTH, STEPS = 8, 512, 4, 32, 6
EVERY = 25  # tasks between two merges of all adapters so far
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """What was measured after a task.

    Attributes:
        task: its number, from 1.
        seconds: of training and of both boundaries; of ``merge``: of merging all adapters so far.
        boundary: seconds of beginning, ending and saving the task; 0 where not told apart.
        resident: MiB of the process's memory but for mapped files, such as libraries, which the system drops and reads
            again as it likes.
        tensors: Python's live tensors.
        files: that the process has open.
        state: bytes of adapter and the method's state.
        error: of the merged B against the closed form, the largest over the layers, relative to its norm.
    """

    task: int
    seconds: float
    boundary: float
    resident: float
    tensors: int
    files: int
    state: int
    error: float


COLUMNS = [field.name for field in fields(Sample)]


class ClosedForm:
    """Keeps every fine-tuned B on disk, so that memory is the learner's alone, and sums them anew for each T."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "finetuned.f32"
        self._sizes: list[int] = []
        self._tasks = 0

    def add(self, B: Sequence[torch.Tensor]) -> None:
        self._sizes = [b.numel() for b in B]
        with self._file.open("ab") as file:
            file.write(torch.cat([b.detach().float().flatten() for b in B]).numpy().tobytes())
        self._tasks += 1

    def error(self, merged: Sequence[torch.Tensor]) -> float:
        """‖B_merge − Σ w_i B_i‖ / ‖Σ w_i B_i‖, the largest over the layers."""
        total = torch.zeros(sum(self._sizes), dtype=torch.float64)
        with self._file.open("rb") as file:  # a task at a time, so that it is not this that grows
            for weight in weights(self._tasks).tolist():
                total += weight * torch.frombuffer(bytearray(file.read(4 * len(total))), dtype=torch.float32).double()
        wanted = total.split(self._sizes)
        return max(
            float((b.detach().double().flatten() - w).norm() / w.norm()) for b, w in zip(merged, wanted, strict=True)
        )


def weights(tasks: int) -> torch.Tensor:
    """w_i of the closed form after so many tasks, ``[tasks]`` in fp64."""
    left = [1 - j**-0.5 for j in range(1, tasks + 1)]
    return torch.tensor([i**-0.5 * math.prod(left[i:]) for i in range(1, tasks + 1)], dtype=torch.float64)


def sample(task: int, seconds: float, boundary: float, state: int, error: float) -> Sample:
    gc.collect()
    pages = [int(word) for word in Path("/proc/self/statm").read_text().split()]
    resident = (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") / MIB
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return Sample(task, seconds, boundary, resident, tensors, len(os.listdir("/proc/self/fd")), state, error)


def saved(state: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """B as fine-tuned and as merged, of a learner on disk; checks that A was replaced."""
    header = json.loads((state / "learner.json").read_text(encoding="utf-8"))
    kept, adapter = read_tensors(state / "learner.safetensors"), read_tensors(state / "adapter_model.safetensors")
    finetuned, merged = [], []
    for n, name in enumerate(header["layers"]):
        if not torch.equal(kept[f"ft.A.{n}"], adapter[f"base_model.model.{name}.lora_A.weight"]):
            raise SystemExit(f"{state}: A of {name} is not the last fine-tuned one")
        finetuned.append(kept[f"ft.B.{n}"])
        merged.append(adapter[f"base_model.model.{name}.lora_B.weight"])
    return finetuned, merged


# -- a plain training loop -----------------------------------------------------------------------------------------


def model() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def loop(tasks: int, folder: Path) -> Iterator[Sample]:
    learner, closed = ContinualLora(model(), "slao"), ClosedForm(folder)
    for number in range(1, tasks + 1):
        ids = torch.randint(VOCABULARY, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
        began = time.perf_counter()
        learner.begin_task(f"task {number}")
        at_work = time.perf_counter()
        optimizer = torch.optim.AdamW([p for p in learner.model.parameters() if p.requires_grad], lr=1e-3)
        for batch in ids:
            learner.model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        closed.add([layer.B for layer in learner.layers])
        trained = time.perf_counter()
        learner.end_task()
        learner.save(folder / "state")
        ended = time.perf_counter()
        _, merged = saved(folder / "state")
        boundary = (at_work - began) + (ended - trained)
        kept = learner.memory_bytes()
        size = kept["adapter"] + kept["state"]
        yield sample(number, ended - began, boundary, size, closed.error(merged))


# -- mbf run ---------------------------------------------------------------------------------------------------------


def stream(tasks: int, folder: Path) -> Path:
    """As many tasks of four training rows and one test row."""
    for number in range(1, tasks + 1):
        for split, rows in (("train", 4), ("test", 1)):
            file = folder / f"task{number:03d}" / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"text": f"{split} {number} {n}", "label": ["yes", "no"][n % 2]} for n in range(rows)]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


class Watch(LogProgress):
    """Samples whenever a task begins, of the one before it."""

    def __init__(self, folder: Path, output: Path, add: Callable[[Sample], None]) -> None:
        self._closed, self._output, self._add = ClosedForm(folder), output, add

    def task_started(self, cell: str, task: str, number: int, total: int, steps: int) -> None:
        if number > 1:
            self._sample(number - 1)

    def cell_finished(self, cell: str) -> None:
        self._sample(len(self._ledger()))

    def step(self, *arguments: Any) -> None: ...

    def scored(self, *arguments: Any) -> None: ...

    def _ledger(self) -> list[dict[str, Any]]:
        progress = next(self._output.glob("cells/*/progress.json"))
        return json.loads(progress.read_text(encoding="utf-8"))["learned"]

    def _sample(self, number: int) -> None:
        finetuned, merged = saved(next(self._output.glob(f"cells/*/state/task-{number:02d}")))
        self._closed.add(finetuned)
        learned = self._ledger()[-1]
        size = learned["adapter_bytes"] + learned["state_bytes"]
        self._add(sample(number, learned["seconds"], 0.0, size, self._closed.error(merged)))


def through_run(tasks: int, folder: Path, add: Callable[[Sample], None]) -> None:
    output = folder / "run"
    settings = {
        "stream": str(stream(tasks, folder / "stream")),
        "model": "tiny-random-llama",
        "lora": {"r": RANK, "dropout": 0.1},
        "train": {"batch_size": 2, "text_tokens": 16, "save_steps": 1},
        "eval": {"every": "seen"},
        "output": str(output),
    }
    run_stream(parse_config(settings), Watch(folder, output, add))


# -- merging alone -----------------------------------------------------------------------------------------------------


def merge(tasks: int, folder: Path) -> Iterator[Sample]:
    learner, closed, adapters = model(), ClosedForm(folder), []
    names = [name for name in learner.state_dict() if name.endswith("lora_B.default.weight")]
    for number in range(1, tasks + 1):
        torch.manual_seed(number)
        B = []
        for name, parameter in learner.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
            if name in names:
                B.append(parameter)
        closed.add(B)
        adapters.append(folder / f"adapter-{number:03d}")
        learner.save_pretrained(str(adapters[-1]))
        if number % EVERY == 0 or number == tasks:
            began = time.perf_counter()
            merge_adapters(adapters, folder / "merged")
            seconds = time.perf_counter() - began
            found = read_tensors(folder / "merged" / "adapter_model.safetensors")
            merged = [found[name.replace(".default", "")] for name in names]
            size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
            yield sample(number, seconds, 0.0, size, closed.error(merged))


# -- the script ----------------------------------------------------------------------------------------------------


def slope(values: Sequence[float], tasks: Sequence[int]) -> float:
    """Least-squares growth of a value a task."""
    x, y = torch.tensor(tasks, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def summary(samples: Sequence[Sample]) -> str:
    """Growth over the later three quarters, when all is loaded, and the largest error."""
    late = samples[len(samples) // 4 :]
    tasks = [one.task for one in late]
    lines = [f"{samples[-1].task} tasks, closed form off by at most {max(one.error for one in samples):.1e}"]
    for name, unit in (("resident", "MiB"), ("seconds", "s"), ("tensors", ""), ("files", ""), ("state", "B")):
        values = [getattr(one, name) for one in late]
        grows = slope(values, tasks) if len(late) > 1 else 0.0
        lines.append(f"{name:9} {values[0]:.4g} … {values[-1]:.4g} {unit}, {1000 * grows:+.3g} {unit} in 1000 tasks")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=TASKS)
    parser.add_argument("--tasks", type=int, help="how many; default 200, of adapters to merge 500")
    parser.add_argument("--csv", metavar="FILE")
    args = parser.parse_args(argv)
    tasks = args.tasks or TASKS[args.kind]
    logging.getLogger("mbf").setLevel(logging.WARNING)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    header = {**facts(), "command": f"python bench/soak.py {words}"}
    samples: list[Sample] = []
    with csv_rows(args.csv, COLUMNS, header) as row, tempfile.TemporaryDirectory() as place:

        def add(one: Sample) -> None:
            samples.append(one)
            row([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(one)])

        if args.kind == "run":
            through_run(tasks, Path(place), add)
        else:
            total = tasks if args.kind == "loop" else -(-tasks // EVERY)
            kind = loop if args.kind == "loop" else merge
            for one in track(kind(tasks, Path(place)), args.kind, total=total):
                add(one)
    print(summary(samples))
    wrong = [one.task for one in samples if not one.error <= TOLERANCE]
    if wrong:
        print(f"WRONG: after task {wrong[0]} the merged LoRA is off the closed form by more than {TOLERANCE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
