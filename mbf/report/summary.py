"""From single runs to one row a method: means and spreads over seeds and orders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mbf.continual.metrics import OrderDisparity, order_disparity
from mbf.report.result import ResultError, RunResult


class Stat(NamedTuple):
    """Mean and sample standard deviation of the n runs that have the value; the deviation needs two."""

    mean: float | None
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Stat:
        known = [value for value in values if value is not None]
        n = len(known)
        if n == 0:
            return cls(None, None, 0)
        mean = math.fsum(known) / n
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1)) if n > 1 else None
        return cls(mean, sd, n)


@dataclass(frozen=True)
class SummaryRow:
    """One method on one stream.

    Scores are in percent over all runs of the label; ``adapter_bytes`` and ``state_bytes`` are what was measured after
    the last task (the largest over the runs); ``train_seconds`` is the sum over tasks of a run, ``task_seconds`` that
    sum over the number of tasks learned; ``disparity`` is None where the orders have different tasks.
    """

    stream: str
    label: str
    method: str
    joint: bool
    orders: tuple[int, ...]
    seeds: tuple[int, ...]
    runs: int
    aa: Stat
    bwt: Stat
    fwt: Stat
    forgetting: Stat
    disparity: OrderDisparity | None
    adapter_bytes: int | None
    state_bytes: int | None
    train_seconds: Stat
    task_seconds: Stat
    tokens_per_second: float | None

    def flat(self) -> dict[str, Any]:
        """One value a column, as ``summary.csv`` has them."""
        flat: dict[str, Any] = {
            "stream": self.stream,
            "label": self.label,
            "method": self.method,
            "orders": " ".join(map(str, self.orders)),
            "seeds": " ".join(map(str, self.seeds)),
            "runs": self.runs,
        }
        for name in ("aa", "bwt", "fwt", "forgetting"):
            stat: Stat = getattr(self, name)
            flat |= {f"{name}_mean": stat.mean, f"{name}_sd": stat.sd, f"{name}_n": stat.n}
        return flat | {
            "mopd": self.disparity and self.disparity.mopd,
            "aopd": self.disparity and self.disparity.aopd,
            "adapter_bytes": self.adapter_bytes,
            "state_bytes": self.state_bytes,
            "train_seconds": self.train_seconds.mean,
            "task_seconds": self.task_seconds.mean,
            "tokens_per_second": self.tokens_per_second,
        }


def prepare(results: Iterable[RunResult]) -> list[RunResult]:
    """Check that results can stand in one report, and tell apart labels that cover several sets of options.

    Raises:
        ResultError: nothing to report, the same run twice, or one order of a stream with different tasks.
    """
    results = _distinct_labels(list(results))
    if not results:
        raise ResultError("no results to report; give at least one")
    cells: set[str] = set()
    tasks: dict[tuple[str, int], tuple[str, ...]] = {}
    for result in results:
        if result.cell in cells:
            raise ResultError(f"two results are {result.cell}; leave one out or give one another label")
        cells.add(result.cell)
        known = tasks.setdefault((result.stream, result.order), result.order_tasks)
        if known != result.order_tasks:
            raise ResultError(
                f"{result.stream} order {result.order} is {', '.join(known)} in one result and "
                f"{', '.join(result.order_tasks)} in another; report them separately"
            )
    return results


def _distinct_labels(results: list[RunResult]) -> list[RunResult]:
    """Where one label covers several option sets, add the options that differ to it, so that they are not averaged."""
    sets: dict[tuple[str, str], dict[str, RunResult]] = {}
    for result in results:
        sets.setdefault((result.stream, result.label), {}).setdefault(f"{result.method} {result.options_key}", result)

    def label(result: RunResult) -> str:
        variants = list(sets[result.stream, result.label].values())
        names = sorted({name for variant in variants for name in variant.method_options})
        shown = [name for name in names if len({_text(v.method_options.get(name)) for v in variants}) > 1]
        extra = [result.method] if len({variant.method for variant in variants}) > 1 else []
        extra += [f"{name}={_text(result.method_options.get(name, 'default'))}" for name in shown]
        return f"{result.label} ({', '.join(extra)})" if extra else result.label

    return [result.model_copy(update={"label": label(result)}) for result in results]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def summary_rows(results: Iterable[RunResult]) -> list[SummaryRow]:
    """One row for each label of each stream, streams as they first occur, then by falling AA; without AA last.

    Raises:
        ResultError: see ``prepare``.
    """
    groups: dict[str, dict[str, list[RunResult]]] = {}
    for result in prepare(results):
        groups.setdefault(result.stream, {}).setdefault(result.label, []).append(result)
    rows: list[SummaryRow] = []
    for labels in groups.values():
        of_stream = [_row(runs) for runs in labels.values()]
        rows += sorted(of_stream, key=lambda row: math.inf if row.aa.mean is None else -row.aa.mean)
    return rows


def _row(runs: Sequence[RunResult]) -> SummaryRow:
    first = runs[0]

    def stat(value: Callable[[RunResult], float | None]) -> Stat:
        return Stat.of(value(run) for run in runs)

    last = [run.memory[-1] for run in runs if run.memory]
    same_tasks = len({frozenset(run.order_tasks) for run in runs}) == 1
    timed = [run for run in runs if run.train_tokens and len(run.train_tokens) == len(run.train_seconds)]
    seconds = math.fsum(second for run in timed for second in run.train_seconds)
    return SummaryRow(
        stream=first.stream,
        label=first.label,
        method=first.method,
        joint=all(run.matrix.joint for run in runs),
        orders=tuple(sorted({run.order for run in runs})),
        seeds=tuple(sorted({run.seed for run in runs})),
        runs=len(runs),
        aa=stat(lambda run: run.matrix.aa),
        bwt=stat(lambda run: run.matrix.bwt),
        fwt=stat(lambda run: run.matrix.fwt),
        forgetting=stat(lambda run: run.matrix.forgetting),
        disparity=order_disparity(run.matrix for run in runs) if same_tasks else None,
        adapter_bytes=max((memory.adapter_bytes for memory in last), default=None),
        state_bytes=max((memory.state_bytes for memory in last), default=None),
        train_seconds=stat(lambda run: math.fsum(run.train_seconds) if run.train_seconds else None),
        task_seconds=stat(
            lambda run: (
                math.fsum(run.train_seconds) / len(run.matrix.learned)
                if run.train_seconds and run.matrix.learned
                else None
            )
        ),
        tokens_per_second=sum(n for run in timed for n in run.train_tokens) / seconds if seconds else None,
    )
