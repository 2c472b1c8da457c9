"""Runs with made-up scores that are different in every cell, so that a number in the wrong place shows."""

from __future__ import annotations

from typing import Any

from mbf.continual.metrics import ScoreMatrix
from mbf.report import RunResult, TaskMemory


def run(
    label: str = "slao",
    *,
    tasks: tuple[str, ...] = ("sst2", "agnews", "trec"),
    order: int = 1,
    seed: int = 0,
    offset: float = 0.0,
    joint: bool = False,
    **fields: Any,
) -> RunResult:
    count = len(tasks)
    matrix = ScoreMatrix.empty(tasks)
    for i, task in enumerate(tasks):
        matrix.record(task, 0, 11.25 + i + offset)
        for t in range(count if joint else 1, count + 1):
            matrix.record(task, t, (70 - 3.125 * (t - i) if t > i else 20 + 3.5 * i + t) + offset)
    phases = 1 if joint else count
    return RunResult(
        **{
            "method": label,
            "label": label,
            "stream": "quickstart",
            "order": order,
            "order_tasks": tasks,
            "seed": seed,
            "matrix": matrix,
            "memory": [TaskMemory(adapter_bytes=4096, state_bytes=1024 * n) for n in range(1, phases + 1)],
            "train_seconds": [10.0] * phases,
            "train_tokens": [5000] * phases,
            "versions": {"mbf": "0.1.0", "torch": "2.13.0"},
            "data_hashes": {task: f"hash-of-{task}" for task in tasks},
            "config": {"model": "SmolLM2-135M", "training": {"lr": 1e-4}},
            "command": f"mbf run quickstart --seed {seed}",
            **fields,
        }
    )


def skipping(result: RunResult, task: str, reason: str) -> RunResult:
    """The run, had it left ``task`` out."""
    n = result.order_tasks.index(task)
    data = result.model_dump()
    for row in data["matrix"]["scores"]:
        row[n] = row[n - 1]
    data["matrix"]["skipped"], data["skipped"] = (task,), {task: reason}
    data["train_seconds"][n], data["train_tokens"][n] = 0.0, 0
    return RunResult.model_validate(data)
