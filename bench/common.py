"""What the benchmarks share: the facts under a figure, a script's options and its loop over cases, tables and CSV."""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from mbf.run.bench import LEAST_ROUNDS
from mbf.run.doctor import diagnose, gpus

BOTH_P = (0.0, 0.1)
Case = TypeVar("Case")
AddRow: TypeAlias = Callable[[Sequence[Any]], None]


def facts(device: str = "cpu") -> dict[str, Any]:
    """What a figure was measured with, on the ``cpu`` or on torch's current ``cuda`` device."""
    found = diagnose()
    cpu = found["cpu"]
    model = cpu["model"] or platform.processor() or "unknown"
    if device == "cuda":
        return {**found["versions"], **_gpu_facts(found["gpu"]), "cpu": model, "clocks before": clocks()}
    return {
        **found["versions"],
        "device": f"CPU {platform.machine()}",
        "cpu": model,
        "simd": cpu["torch dispatches to"],
        "bf16": "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated",
        "extension": found["compiled extension"]["reason"],
        "kernels": found["compiled extension"]["CPU kernels"] or "none",
    }


def _gpu_facts(gpu: dict[str, Any]) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2": f"{properties.L2_cache_size / 2**20:g} MiB",
        "driver": gpu["driver"],
        "cuda": torch.version.cuda,
        "triton": gpu["triton"],
        "triton kernels": gpu["Triton kernels"],
    }


def clocks() -> str:
    """The clocks of torch's current GPU now and at most, and its power limit."""
    found = gpus(f"GPU-{torch.cuda.get_device_properties().uuid}")
    return found[0].clocks if found else "not known: nvidia-smi is not there or does not list this GPU"


def missing_gpu() -> str | None:
    """Why ``--device cuda`` cannot be measured here and what to do, or None."""
    if torch.cuda.is_available():
        return None
    listed = ", ".join(gpu.name for gpu in gpus()) or "no GPU"
    if torch.version.cuda is None and torch.version.hip is None:
        found = f"torch {torch.__version__}, which is built for CPUs only, and {listed} in nvidia-smi"
        way = "install a build of torch for CUDA (https://pytorch.org/get-started/locally)"
    else:
        found = f"torch {torch.__version__}, which sees no GPU, and {listed} in nvidia-smi"
        way = "run on a machine with a GPU and its driver, and let CUDA_VISIBLE_DEVICES name it or nothing"
    return f"--device cuda: found {found}; {way}, or leave --device out to measure the CPU"


def plain_parser(description: str | None, row: str, budget: float) -> argparse.ArgumentParser:
    """A parser of the options that every script has; ``row`` is the word for what ``--budget`` is the budget of."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    add = parser.add_argument
    add("--rounds", type=_rounds, default=20, help="of every variant, at least three")
    add("--budget", type=float, default=budget, help=f"seconds a {row} may take; it then has fewer rounds, but three")
    add("--threads", type=int)
    add("--csv", metavar="FILE")
    return parser


def script_parser(description: str | None, row: str, budget: float) -> argparse.ArgumentParser:
    """The same with the options of whatever trains a LoRA layer."""
    parser = plain_parser(description, row, budget)
    parser.add_argument(
        "--p", action="append", type=float, help="dropout probability; may be repeated (default: 0, 0.1)"
    )
    parser.add_argument("--compile", action="store_true", help=f"with torch.compile, about a minute a {row}")
    return parser


def _rounds(text: str) -> int:
    return max(LEAST_ROUNDS, int(text))


def run_script(
    script: str,
    argv: Sequence[str] | None,
    arguments: Callable[[Sequence[str]], argparse.Namespace],
    measure: Callable[[Case, argparse.Namespace], Any],
    report: Callable[[Case, Any, AddRow], None],
    columns: Sequence[str],
) -> int:
    """Measure and report case by case, below the facts and the command; return 1 if a result was wrong.

    Args:
        script: the file's name in bench/.
        argv: the command line; None is that of the process.
        arguments: parses it with a ``script_parser`` and adds the ``cases`` and, unless it is the CPU, the ``device``.
        measure: returns what ``report`` takes or, where a result is wrong, a list of words that say what.
        report: prints a case and adds its rows, which have ``columns``, to the CSV.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    device = vars(args).get("device", "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    header = {**facts(device), "command": " ".join([f"python bench/{script}", *argv])}
    print("\n".join(f"{name}: {value}" for name, value in header.items()))
    status = 0
    with csv_rows(args.csv, columns, header) as add:
        for case in args.cases:
            result = measure(case, args)
            if isinstance(result, list):
                status = 1
                print(f"\n{case}   WRONG, not timed:\n  " + "\n  ".join(result), flush=True)
            else:
                report(case, result, add)
    if device == "cuda":
        after = f"clocks after: {clocks()}"
        print(f"\n{after}")
        if args.csv:
            with Path(args.csv).open("a", encoding="utf-8") as file:
                file.write(f"# {after}\n")
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


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first flush left and the others flush right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    flush = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(flush, line, widths, strict=True)) for line in lines
    )
