"""Claim: ``mbf`` computes one LoRA layer in little more than the time of the frozen layer alone.

Peers, on the same W, x, dy, A and B: ``frozen``, the layer without adapter (forward and dX), the floor; ``peft``,
PEFT's lora.Linear; ``peft-nocast``, the same with ``autocast_adapter_dtype=False`` (bf16 only: in fp32 it is ``peft``);
``in-place``, three in-place torch calls with a hand-written backward and a stored mask, A and B in x's dtype;
``peft-compiled`` with ``--compile``; ``mbf``, PEFT's layer after ``mbf.fuse``. W is frozen, x needs a gradient.
Run: ``python bench/lora_linear.py --claims``; without a choice of rows, a sweep of the shapes of SmolLM2 and Llama 3.

Printed are medians of one call in microseconds, with quartiles in the CSV; ``over frozen`` is the ratio of medians,
``vs PEFT`` PEFT's median over the variant's (more is faster), ``peak MB`` what forward and backward allocate at most.
Before a row is timed, y and every gradient of ``mbf`` and ``in-place``, dropout included, are held against fp64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from common import DTYPES, AddRow, failures, interleave, quartiles, rounds_within, run_rows, table
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import mbf
from mbf.ops import draw_seed, dropout_mask
from mbf.ops.philox import keep_scale
from mbf.peft import calls

SCALE = 2
PARTS = ("forward", "backward", "both")
COLUMNS = [
    *("shape", "dtype", "rank", "p", "tokens", "variant", "part"),
    *("median_us", "q1_us", "q3_us", "over_frozen", "vs_peft", "peak_mb", "rounds"),
]


class Case(NamedTuple):
    """One row; the shape is that of the layer, d_in x d_out."""

    shape: str
    dtype: str
    rank: int
    p: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} r={self.rank} p={self.p:g} T={self.tokens}"


def product(
    shapes: Iterable[str], dtypes: Sequence[str], ranks: Sequence[int], ps: Sequence[float], tokens: Sequence[int]
) -> list[Case]:
    return [Case(*one) for one in itertools.product(shapes, dtypes, ranks, ps, tokens)]


SHAPES = {
    "SmolLM2-135M": ("576x576", "576x192", "576x1536", "1536x576"),
    "Llama-3.2-1B": ("2048x2048", "2048x512", "2048x8192", "8192x2048"),
    "Llama-3-8B": ("4096x4096", "4096x1024", "4096x14336", "14336x4096"),
    "others": ("768x768", "1024x1024"),
}
BOTH_P = (0.0, 0.1)
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


class Variant(NamedTuple):
    run: Callable[[Tensor], Tensor]
    factors: tuple[Tensor, ...]  # A and B


def base_layer(W: nn.Parameter) -> nn.Linear:
    """A linear layer that has W itself, so that all variants read the same memory."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = W
    return layer


def peft_layer(W: nn.Parameter, A: Tensor, B: Tensor, p: float, **options: Any) -> Variant:
    config = LoraConfig(r=A.shape[0], lora_alpha=SCALE * A.shape[0], lora_dropout=p, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(base_layer(W)), config, **options)
    layer = model.base_model.model[0]
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for weight, value in zip(factors, (A, B), strict=True):
            weight.copy_(value)
    return Variant(layer, factors)


def build(case: Case, W: nn.Parameter, A: Tensor, B: Tensor, compiled: bool) -> dict[str, Variant]:
    own = tuple(factor.to(W.dtype).requires_grad_() for factor in (A, B))
    variants = {
        "frozen": Variant(base_layer(W), ()),
        "peft": peft_layer(W, A, B, case.p),
        "in-place": Variant(lambda x: InPlace.apply(x, W, *own, case.p), own),
        "mbf": peft_layer(W, A, B, case.p),
    }
    mbf.fuse(variants["mbf"].run, strict=True)  # type: ignore[arg-type]
    if W.dtype != torch.float32:
        variants["peft-nocast"] = peft_layer(W, A, B, case.p, autocast_adapter_dtype=False)
    if compiled:
        torch.compiler.reset()
        layer = peft_layer(W, A, B, case.p)
        variants["peft-compiled"] = Variant(torch.compile(layer.run, dynamic=False), layer.factors)
    order = ("frozen", "peft", "peft-nocast", "peft-compiled", "in-place", "mbf")
    return {name: variants[name] for name in order if name in variants}


# -- right before fast -------------------------------------------------------------------------------------------------


def formula(x: Tensor, W: Tensor, factors: Sequence[Tensor], keep: Tensor | None, scale: float) -> Tensor:
    """The layer with x dropped where ``keep`` is False and else multiplied by ``scale``."""
    A, B = factors
    wide = x.to(A.dtype)
    dropped = wide if keep is None else wide * keep * scale
    return (F.linear(x, W) + SCALE * F.linear(F.linear(dropped, A), B)).to(x.dtype)


def results(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach()} | dict(zip(("dx", "dA", "dB"), found, strict=True))


def wrong(name: str, variant: Variant, keep: Tensor | None, case: Case, x: Tensor, W: Tensor, dy: Tensor) -> list[str]:
    """What of the variant's y and gradients, computed after ``manual_seed(1)``, the mask ``keep`` doesn't explain."""
    torch.manual_seed(1)
    scale = keep_scale(case.p) if name == "mbf" else 1 / (1 - case.p)
    got = results(variant.run(x), (x, *variant.factors), dy)
    plain = results(formula(x, W, variant.factors, keep, scale), (x, *variant.factors), dy)
    wide, *factors = (t.detach().double().requires_grad_() for t in (x, *variant.factors))
    exact = results(formula(wide, W.double(), factors, keep, scale), (wide, *factors), dy.double())
    found = failures(got, plain, exact, torch.finfo(x.dtype).eps)
    if case.p and torch.equal(got["y"], variant.run(x)):
        found.append("two forwards dropped the same elements")
    return [f"{name}: {what}" for what in found]


def check(variants: dict[str, Variant], case: Case, x: Tensor, W: Tensor, dy: Tensor) -> list[str]:
    keeps: dict[str, Tensor | None] = {"mbf": None, "in-place": None}
    if case.p:
        torch.manual_seed(1)
        keeps["mbf"] = dropout_mask(draw_seed(x.device), x.shape, case.p)
        torch.manual_seed(1)
        keeps["in-place"] = torch.native_dropout(x, case.p, True)[1]
    before = calls.copy()
    found = [what for name, keep in keeps.items() for what in wrong(name, variants[name], keep, case, x, W, dy)]
    if calls["slow"] != before["slow"] or calls["fast"] == before["fast"]:
        found.append("mbf: the layer was left to PEFT")
    return found


# -- time and memory ---------------------------------------------------------------------------------------------------


def timed(variant: Variant, x: Tensor, dy: Tensor, repeats: int) -> tuple[float, ...]:
    """Seconds of one forward, one backward and both, over ``repeats`` calls."""
    forward = backward = 0.0
    inputs = (x, *variant.factors)
    for _ in range(repeats):
        start = perf_counter()
        y = variant.run(x)
        between = perf_counter()
        gradients = torch.autograd.grad(y, inputs, dy)
        end = perf_counter()
        forward += between - start
        backward += end - between
        del y, gradients
    return forward / repeats, backward / repeats, (forward + backward) / repeats


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


def peak_mb(variant: Variant, x: Tensor, dy: Tensor) -> float:
    """The most that tensors of one forward and backward hold at a time; x, dy and the parameters aren't counted."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        timed(variant, x, dy, 1)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    moves = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in moves), initial=0)) / 1e6


class Result(NamedTuple):
    """``times[variant]`` holds forward, backward and both of every round, in microseconds."""

    times: dict[str, list[tuple[float, ...]]]
    peaks: dict[str, float]
    rounds: int
    repeats: int


def measure(case: Case, rounds: int, budget: float, compiled: bool) -> Result | list[str]:
    """The row's times, or what is wrong with its results."""
    d_in, d_out = map(int, case.shape.split("x"))
    dtype = DTYPES[case.dtype]
    torch.seed()
    W = nn.Parameter((torch.randn(d_out, d_in) / d_in**0.5).to(dtype), requires_grad=False)
    A = (torch.randn(case.rank, d_in) / d_in**0.5).to(dtype).float()  # what every variant's dtype can hold
    B = (torch.randn(d_out, case.rank) / case.rank**0.5).to(dtype).float()
    x = torch.randn(case.tokens, d_in).to(dtype).requires_grad_()
    dy = torch.randn(case.tokens, d_out).to(dtype)
    variants = build(case, W, A, B, compiled)
    if found := check(variants, case, x, W, dy):
        return found
    torch.seed()

    def refresh() -> None:
        with torch.no_grad():
            x.normal_()
            dy.normal_()

    for variant in variants.values():
        timed(variant, x, dy, 1)
    once = {name: timed(variant, x, dy, 1)[2] for name, variant in variants.items()}
    repeats = min(50, math.ceil(1e-3 / once["frozen"]))  # a sample of a small layer is a millisecond of calls
    used = rounds_within(budget, repeats * sum(once.values()), rounds)
    peaks = {name: peak_mb(variant, x, dy) for name, variant in variants.items()}
    runs = {name: lambda v=variant: timed(v, x, dy, repeats) for name, variant in variants.items()}
    times = interleave(runs, used, refresh)
    return Result(
        {name: [tuple(1e6 * t for t in sample) for sample in one] for name, one in times.items()}, peaks, used, repeats
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def report(case: Case, result: Result, add: AddRow) -> None:
    times, peaks, rounds, repeats = result
    stats = {(name, part): quartiles([t[n] for t in times[name]]) for name in times for n, part in enumerate(PARTS)}
    lines = []
    for name in times:
        line = [name]
        for part in PARTS:
            q1, median, q3 = stats[name, part]
            over, against = median / stats["frozen", part][1], stats["peft", part][1] / median
            us = [f"{t:.2f}" for t in (median, q1, q3)]
            add([*case, name, part, *us, f"{over:.3f}", f"{against:.3f}", f"{peaks[name]:.2f}", rounds])
            line += [f"{median:.1f}", f"{over:.2f}"]
        lines.append([*line, f"{against:.2f}", f"{peaks[name]:.2f}"])
    print(f"\n{case}   {rounds} rounds of {repeats} call{'s' * (repeats > 1)}")
    heads = [head for part in PARTS for head in (f"{part} µs", "over frozen")]
    print(table(["", *heads, "vs PEFT", "peak MB"], lines), flush=True)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--shape", action="append", metavar="INxOUT", help="d_in x d_out; may be repeated, as the next four may")
    add("--rank", action="append", type=int)
    add("--p", action="append", type=float, help="dropout probability")
    add("--tokens", action="append", type=int, help="rows of x")
    add("--dtype", action="append", choices=DTYPES)
    add("--rounds", type=int, default=20)
    add("--budget", type=float, default=120.0, help="seconds a row may take; it then has fewer rounds, but three")
    add("--threads", type=int)
    add("--compile", action="store_true", help="with torch.compile of PEFT, about a minute a row")
    add("--csv", metavar="FILE")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--claims", action="store_true", help="only the rows that the README claims")
    rows.add_argument("--quick", action="store_true", help="a few small rows")
    args = parser.parse_args(argv)
    axes = (args.shape, args.dtype, args.rank, args.p, args.tokens)
    if any(axes) and (args.claims or args.quick):
        parser.error(
            "--claims and --quick choose the rows; give no --shape, --rank, --p, --tokens or --dtype with them"
        )
    defaults: tuple[Any, ...] = (["2048x2048"], ["fp32"], [16], BOTH_P, [512])
    args.cases = CLAIMS if args.claims else QUICK if args.quick else list(dict.fromkeys(SWEEP))
    if any(axes):
        args.cases = product(*(given or default for given, default in zip(axes, defaults, strict=True)))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    def measured(case: Case) -> Result | list[str]:
        return measure(case, args.rounds, args.budget, args.compile)

    return run_rows(args.cases, measured, report, COLUMNS, args.csv, " ".join(["python bench/lora_linear.py", *argv]))


def test_lora_linear(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
