"""What the benchmarks share: the facts under a figure, the interleaved loop, the accuracy rule and the CSV."""

from __future__ import annotations

import csv
import gc
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from mbf.ops import native_status
from mbf.run.versions import versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST_ROUNDS = 3
Case = TypeVar("Case")
AddRow: TypeAlias = Callable[[Sequence[Any]], None]


def facts() -> dict[str, Any]:
    """What a figure was measured with; every benchmark here computes on the CPU."""
    return {
        **versions(),
        "device": f"CPU {platform.machine()}",
        "cpu": _cpu_name(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "bf16": "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated",
        "extension": native_status().reason,
        "kernels": native_status().kernels,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def run_rows(
    cases: Iterable[Case],
    measure: Callable[[Case], Any],
    report: Callable[[Case, Any, AddRow], None],
    columns: Sequence[str],
    target: str | None,
    command: str,
) -> int:
    """Measure and report case by case, below the facts and the command; return 1 if a result was wrong.

    ``measure`` returns what ``report`` takes or, where a result is wrong, a list of words that say what.
    """
    header = {**facts(), "command": command}
    print("\n".join(f"{name}: {value}" for name, value in header.items()))
    status = 0
    with csv_rows(target, columns, header) as add:
        for case in cases:
            result = measure(case)
            if isinstance(result, list):
                status = 1
                print(f"\n{case}   WRONG, not timed:\n  " + "\n  ".join(result), flush=True)
            else:
                report(case, result, add)
    return status


@contextmanager
def csv_rows(target: str | None, columns: Sequence[str], header: Mapping[str, Any]) -> Iterator[AddRow]:
    """Yield a function that adds a row to ``target``, at once on disk; it does nothing without a target."""
    if target is None:
        yield lambda row: None
        return
    with Path(target).open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in header.items())
        rows = csv.writer(file)

        def add(row: Sequence[Any]) -> None:
            rows.writerow(row)
            file.flush()

        add(columns)
        yield add


def read_csv(source: str | Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The header and the rows of what ``csv_rows`` wrote."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    notes = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    return {name: value for name, value in notes}, list(csv.DictReader(x for x in lines if not x.startswith("# ")))


def interleave(
    variants: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int, refresh: Callable[[], Any]
) -> dict[str, list[tuple[float, ...]]]:
    """Run every variant once a round, in an order that is rotated from round to round, after ``refresh``."""
    names = list(variants)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    try:
        for n in range(rounds):
            refresh()
            for k in range(len(names)):
                name = names[(n + k) % len(names)]
                found[name].append(variants[name]())
    finally:
        gc.unfreeze()
    return found


def rounds_within(budget: float, one_round: float, wanted: int) -> int:
    """As many rounds as ``budget`` seconds allow, at most ``wanted`` and never fewer than three."""
    return max(LEAST_ROUNDS, min(wanted, int(budget / one_round)))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def relative_error(value: Tensor, exact: Tensor) -> float:
    """``‖value − exact‖ / ‖exact‖`` in fp64."""
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm()).item()


def failures(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], eps: float
) -> list[str]:
    """What of ``got`` is further from fp64 than twice the error of plain torch in the same dtype + 1e-6.

    Tensors under 64 elements may be off by ``eps`` more: on so few numbers torch's own error can be nil by chance.
    """
    found = []
    for name in exact.keys() | got.keys():
        if name not in got or name not in exact or got[name].dtype != plain[name].dtype:
            found.append(f"{name} is missing or of another dtype")
            continue
        error, allowed = relative_error(got[name], exact[name]), relative_error(plain[name], exact[name])
        limit = 2 * allowed + 1e-6 + (eps if exact[name].numel() < 64 else 0.0)
        if not error <= limit:
            found.append(f"{name} is off by {error:.2g}, allowed {limit:.2g}")
    return sorted(found)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first flush left and the others flush right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    flush = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(flush, line, widths, strict=True)) for line in lines
    )
