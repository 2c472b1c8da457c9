"""Claim: ``mbf`` computes one LoRA layer in little more than the time of the frozen layer alone.

Peers, on the same W, x, dy, A and B: ``frozen``, the layer without adapter (forward and dX), the floor; ``peft``,
PEFT's lora.Linear; ``peft-nocast``, the same with ``autocast_adapter_dtype=False`` (bf16 only: in fp32 it is ``peft``);
``in-place``, three in-place torch calls with a hand-written backward and a stored mask, A and B in x's dtype;
``peft-compiled`` with ``--compile``; ``mbf``, PEFT's layer after ``mbf.fuse``; and beside halves that the processor
cannot multiply ``mbf-fp32``, the same on fp32 operands of its own. W is frozen, x needs a gradient.
Run: ``python bench/lora_linear.py --claims``; without a choice of rows, a sweep of the shapes of SmolLM2 and Llama 3.
``--device cuda`` is the same on a GPU, by default on Llama 3 8B in bf16; how it is timed there says ``cuda_timing.py``.

Printed are medians of one call in microseconds, with quartiles in the CSV; ``over frozen`` is the ratio of medians,
``vs PEFT`` PEFT's median over the variant's (more is faster), ``peak MB`` what forward and backward allocate at most.
Before a row is timed, y and every gradient of ``mbf`` and ``in-place``, dropout included, are held against fp64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cuda_timing
import torch
from common import BOTH_P, AddRow, missing_gpu, quartiles, run_script, script_parser, table
from torch import Tensor
from torch.nn import functional as F

from mbf.ops import native_status
from mbf.run.bench import Samples, sample, timed
from mbf.run.layers import (
    DTYPES,
    SCALE,
    Case,
    Kept,
    Operands,
    Variant,
    draw,
    frozen_layer,
    fused_layer,
    peft_layer,
    problems,
    wrong,
)

PARTS = ("forward", "backward", "both")
COLUMNS = [
    *("shape", "dtype", "rank", "p", "tokens", "variant", "part"),
    *("median_us", "q1_us", "q3_us", "over_frozen", "vs_peft", "peak_mb", "rounds"),
]


def product(
    shapes: Iterable[str], dtypes: Sequence[str], ranks: Sequence[int], ps: Sequence[float], tokens: Sequence[int]
) -> list[Case]:
    """A case for every combination; a shape is d_in x d_out."""
    found = itertools.product(shapes, dtypes, ranks, ps, tokens)
    return [Case(*map(int, shape.split("x")), rank, p, rows, dtype) for shape, dtype, rank, p, rows in found]


SHAPES = {
    "SmolLM2-135M": ("576x576", "576x192", "576x1536", "1536x576"),
    "Llama-3.2-1B": ("2048x2048", "2048x512", "2048x8192", "8192x2048"),
    "Llama-3-8B": ("4096x4096", "4096x1024", "4096x14336", "14336x4096"),
    "others": ("768x768", "1024x1024"),
}
CLAIMS = [
    *product(["2048x2048", "2048x512"], ["fp32"], [16], BOTH_P, [512]),
    *product(["576x576"], ["fp32"], [8], BOTH_P, [1, 16, 512]),
    *product(["1024x1024"], ["fp32", "bf16"], [16], BOTH_P, [128]),
]
SWEEP = [
    *CLAIMS,
    *product(itertools.chain(*SHAPES.values()), ["fp32"], [16], BOTH_P, [512]),
    *product(["576x576", "2048x2048"], ["fp32"], [8, 64], BOTH_P, [512]),
    *product(["576x576", "2048x2048"], ["fp32"], [16], BOTH_P, [16, 128, 2048]),
    *product(["576x576", "2048x2048"], ["bf16"], [16], BOTH_P, [128]),
]
QUICK = [
    *product(["576x192"], ["fp32"], [8], BOTH_P, [1, 61]),
    *product(["192x576"], ["bf16"], [3], BOTH_P, [16]),
]

# What an axis is where only others are given; on a GPU also all that is timed by default.
CPU: tuple[Any, ...] = (["2048x2048"], ["fp32"], [16], BOTH_P, [512])
CUDA: tuple[Any, ...] = (SHAPES["Llama-3-8B"], ["bf16"], [16, 64], BOTH_P, [2048, 8192])


# -- the variants ------------------------------------------------------------------------------------------------------


class InPlace(torch.autograd.Function):
    """The layer in as few passes over x and y as plain torch can make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
        y = F.linear(x, W)
        dropped, keep = torch.native_dropout(x, p, True) if p else (x, None)
        h = dropped @ A.t()
        ctx.save_for_backward(x, keep, h, W, A, B)
        ctx.rescale = 1 / (1 - p)
        return y.addmm_(h, B.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, keep, h, W, A, B = ctx.saved_tensors
        dh = (dy @ B).mul_(SCALE)
        dB = (dy.t() @ h).mul_(SCALE)
        dx = dy @ W
        if keep is None:
            return dx.addmm_(dh, A), None, dh.t() @ x, dB, None
        dh.mul_(ctx.rescale)
        return dx.addcmul_(dh @ A, keep), None, dh.t() @ (x * keep), dB, None


def in_place_layer(given: Operands, p: float) -> Variant:
    W = given.W
    A, B = (factor.to(W.dtype).requires_grad_() for factor in (given.A, given.B))
    return Variant(lambda x: InPlace.apply(x, W, A, B, p), (A, B))


def build(case: Case, given: Operands, compiled: bool) -> dict[str, Variant]:
    variants = {"frozen": frozen_layer(given), "peft": peft_layer(given, case.p)}
    if given.W.dtype != torch.float32:
        variants["peft-nocast"] = peft_layer(given, case.p, autocast_adapter_dtype=False)
    if compiled:
        torch.compiler.reset()
        layer = peft_layer(given, case.p)
        variants["peft-compiled"] = Variant(torch.compile(layer.run, dynamic=False), layer.factors)
    variants |= {"in-place": in_place_layer(given, case.p), "mbf": fused_layer(given, case.p)}
    if given.x.device.type == "cpu" and case.dtype != "fp32" and case.dtype not in native_status().kernels:
        wide = draw(replace(case, dtype="fp32"))
        variants["mbf-fp32"] = fused_layer(wide, case.p)._replace(given=wide)
    return variants


def check(variants: dict[str, Variant], given: Operands, p: float) -> list[str]:
    def drop() -> Kept:
        return Kept(torch.native_dropout(given.x, p, True)[1], 1 / (1 - p))

    found = {
        "mbf": problems(variants["mbf"], given, p),
        "in-place": wrong(variants["in-place"], given, drop if p else None),
    }
    return [f"{name}: {what}" for name, one in found.items() for what in one]


# -- time and memory ---------------------------------------------------------------------------------------------------


@contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's library writes a line to file descriptor 2 whenever it starts or stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_mb(variant: Variant, given: Operands) -> float:
    """The most that tensors of one forward and backward hold at a time; x, dy and the parameters aren't counted."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        timed(variant, given, 1)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    moves = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in moves), initial=0)) / 1e6


class Result(NamedTuple):
    samples: Samples
    peaks: dict[str, float]
    not_captured: dict[str, str]  # why, by variant; empty on the CPU


def measure(case: Case, args: argparse.Namespace) -> Result | list[str]:
    """The row's times, or what is wrong with its results."""
    torch.seed()
    given = draw(case, args.device)
    variants = build(case, given, args.compile)
    if found := check(variants, given, case.p):
        return found
    if args.device == "cuda":
        peaks = {name: cuda_timing.peak_mb(variant, given) for name, variant in variants.items()}
        samples, notes = cuda_timing.sample(variants, given, args.rounds, args.budget)
        return Result(samples, peaks, notes)
    samples = sample(variants, given, args.rounds, args.budget)
    return Result(samples, {name: peak_mb(variant, given) for name, variant in variants.items()}, {})


# -- the table ---------------------------------------------------------------------------------------------------------


def report(case: Case, result: Result, add: AddRow) -> None:
    (times, rounds, repeats), peaks, not_captured = result
    stats = {
        (name, part): quartiles([1e6 * seconds[n] for seconds in times[name]])
        for name in times
        for n, part in enumerate(PARTS)
    }
    lines = []
    for name in times:
        label = f"{name} (not captured)" if name in not_captured else name
        line = [label]
        for part in PARTS:
            q1, median, q3 = stats[name, part]
            over, against = median / stats["frozen", part][1], stats["peft", part][1] / median
            us = [f"{t:.2f}" for t in (median, q1, q3)]
            ratios = [f"{over:.3f}", f"{against:.3f}"]
            row = [case.shape, case.dtype, case.rank, case.p, case.tokens, label, part]
            add([*row, *us, *ratios, f"{peaks[name]:.2f}", rounds])
            line += [f"{median:.1f}", f"{over:.2f}"]
        lines.append([*line, f"{against:.2f}", f"{peaks[name]:.2f}"])
    print(f"\n{case}   {rounds} rounds of {repeats} call{'s' * (repeats > 1)}")
    heads = [head for part in PARTS for head in (f"{part} µs", "over frozen")]
    print(table(["", *heads, "vs PEFT", "peak MB"], lines), flush=True)
    for name, why in not_captured.items():
        print(f"{name} was not captured, so its launches are timed, too: {why}", flush=True)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = script_parser(__doc__, "row", budget=120.0)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--shape", action="append", metavar="INxOUT", help="d_in x d_out; may be repeated, as the next three may")
    add("--rank", action="append", type=int)
    add("--tokens", action="append", type=int, help="rows of x")
    add("--dtype", action="append", choices=[*DTYPES])
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--claims", action="store_true", help="only the rows that the README claims")
    rows.add_argument("--quick", action="store_true", help="a few small rows")
    args = parser.parse_args(argv)
    axes = (args.shape, args.dtype, args.rank, args.p, args.tokens)
    if any(axes) and (args.claims or args.quick):
        parser.error(
            "--claims and --quick choose the rows; give no --shape, --rank, --p, --tokens or --dtype with them"
        )
    if args.device == "cuda" and (missing := missing_gpu()):
        parser.error(missing)
    defaults, sweep = (CUDA, product(*CUDA)) if args.device == "cuda" else (CPU, list(dict.fromkeys(SWEEP)))
    args.cases = CLAIMS if args.claims else QUICK if args.quick else sweep
    if any(axes):
        args.cases = product(*(given or default for given, default in zip(axes, defaults, strict=True)))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("lora_linear.py", argv, arguments, measure, report, COLUMNS)


def test_lora_linear(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
