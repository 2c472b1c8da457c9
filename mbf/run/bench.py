"""Time of one LoRA layer on this machine's CPU: the frozen layer alone, PEFT's lora.Linear, and that layer fused.

``bench/lora_linear.py`` of the source tree is the long form, with more peers, parts and memory.
"""

from __future__ import annotations

import gc
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from mbf.ops.philox import P_END
from mbf.run.doctor import diagnose
from mbf.run.layers import DTYPES, Case, Operands, Variant, draw, frozen_layer, fused_layer, peft_layer, problems

RANKS = {"576x576": 8, "576x1536": 16, "2048x2048": 16}  # by shape: two of SmolLM2-135M, one of Llama-3.2-1B
_OTHER_RANK = 16
LEAST_ROUNDS = 3
_ROW_SECONDS = 6.0  # a row that would take longer has fewer rounds, but three
_SAMPLE_SECONDS = 1e-3  # a sample of a small layer is several calls


@dataclass(frozen=True)
class Row:
    """What one case took, or what was wrong with it; then there are no times.

    Attributes:
        milliseconds: medians of forward and backward together, by variant: ``frozen``, ``peft``, ``mbf``.
        rounds: how many samples of each variant the medians are of.
        problems: what the fused layer computed wrong.
    """

    case: Case
    milliseconds: Mapping[str, float]
    rounds: int
    problems: tuple[str, ...] = ()

    def over_frozen(self, variant: str) -> float:
        """The variant's time over that of the frozen layer."""
        return self.milliseconds[variant] / self.milliseconds["frozen"]

    def against_peft(self) -> float:
        """PEFT's time over that of the fused layer: above 1 the fused layer is faster."""
        return self.milliseconds["peft"] / self.milliseconds["mbf"]


@dataclass(frozen=True)
class Report:
    """The facts of the machine, by name, and one row a case."""

    facts: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def correct(self) -> bool:
        return not any(row.problems for row in self.rows)


def bench(
    *,
    shapes: Sequence[str] = (),
    ps: Sequence[float] = (),
    rank: int | None = None,
    tokens: int = 512,
    dtype: str = "fp32",
    rounds: int = 10,
    threads: int | None = None,
    started: Callable[[Case], None] | None = None,
) -> Report:
    """Check, then time, one LoRA layer of each shape with each dropout probability.

    Before a row is timed, y and the gradients of the fused layer, dropout included, are held against fp64: each may be
    off by twice the error of torch in the same dtypes + 1e-6, relative in norm.

    Args:
        shapes: ``DINxDOUT``; none are those of ``RANKS``.
        ps: dropout probabilities; none are 0 and 0.1.
        rank: of every layer; by default 16, or what ``RANKS`` has for the shape.
        tokens: rows of x.
        dtype: of W and x, a key of ``DTYPES``; A and B are fp32, as PEFT makes them.
        rounds: samples of each variant at most, interleaved in an order drawn for every round.
        threads: for the length of the call; by default torch's number.
        started: called with each case before it is checked.

    Raises:
        ValueError: a value is not what it must be; nothing was computed then.
    """
    chosen = _cases(shapes, ps, rank, tokens, dtype)
    _positive("rounds", rounds)
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise ValueError(
            f"threads: found {threads}, wanted a whole number from 1 to {cores}, the cores of this machine"
        )
    rows = []
    with _threads(threads), torch.random.fork_rng(devices=[]):
        for case in chosen:
            if started is not None:
                started(case)
            rows.append(_measure(case, rounds))
        return Report(_facts(), tuple(rows))


# -- what was asked for ------------------------------------------------------------------------------------------------


def _cases(shapes: Sequence[str], ps: Sequence[float], rank: int | None, tokens: int, dtype: str) -> list[Case]:
    _positive("tokens", tokens)
    if rank is not None:
        _positive("rank", rank)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, wanted one of {', '.join(DTYPES)}")
    ps = ps or (0.0, 0.1)
    for p in ps:
        if not 0 <= p < P_END:
            raise ValueError(f"p: found {p:g}, wanted a dropout probability of at least 0 and below 1")
    found = []
    for shape in shapes or RANKS:
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if sizes is None:
            raise ValueError(f"shape: found {shape!r}, wanted DINxDOUT of two whole numbers above 0, such as 576x1536")
        d_in, d_out = map(int, sizes.groups())
        found += [Case(d_in, d_out, rank or RANKS.get(shape, _OTHER_RANK), p, tokens, dtype) for p in ps]
    return list(dict.fromkeys(found))


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: found {value}, wanted a whole number above 0")


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _facts() -> dict[str, str]:
    found = diagnose()
    versions, cpu, extension = found["versions"], found["cpu"], found["compiled extension"]
    commit = f" ({versions['commit']})" if versions["commit"] else ""
    return {
        "cpu": f"{cpu['model'] or cpu['machine']}, {cpu['cores']} cores, {cpu['torch dispatches to']}",
        "threads": versions["threads"],
        "torch": versions["torch"],
        "peft": versions["peft"],
        "mbf": f"{versions['mbf']}{commit}",
        "compiled extension": "loaded" if extension["loaded"] else f"not loaded: {extension['reason']}",
    }


# -- time --------------------------------------------------------------------------------------------------------------


def _measure(case: Case, rounds: int) -> Row:
    given = draw(case)
    variants = {"frozen": frozen_layer(given), "peft": peft_layer(given, case.p), "mbf": fused_layer(given, case.p)}
    if found := problems(variants["mbf"], given, case.p):
        return Row(case, {}, 0, tuple(found))
    samples = sample(variants, given, rounds, _ROW_SECONDS)
    milliseconds = {name: 1e3 * median(both for *_, both in one) for name, one in samples.seconds.items()}
    return Row(case, milliseconds, samples.rounds)


class Samples(NamedTuple):
    """``seconds[variant]`` holds forward, backward and both of every round, each the mean of ``repeats`` calls."""

    seconds: dict[str, list[tuple[float, ...]]]
    rounds: int
    repeats: int


def sample(variants: Mapping[str, Variant], given: Operands, rounds: int, budget: float) -> Samples:
    """Time the variants, ``frozen`` among them, in ``rounds`` interleaved rounds or as many as ``budget`` allows."""

    def runs(repeats: int) -> dict[str, Callable[[], tuple[float, ...]]]:
        return {name: partial(timed, variant, given, repeats) for name, variant in variants.items()}

    for run in runs(1).values():
        run()
    once = {name: run()[-1] for name, run in runs(1).items()}
    repeats = repeats_for(once["frozen"])
    rounds = rounds_within(budget, repeats * sum(once.values()), rounds)
    return Samples(interleave(runs(repeats), rounds, given.refresh), rounds, repeats)


def timed(variant: Variant, given: Operands, repeats: int) -> tuple[float, ...]:
    """Seconds of one forward, one backward and both, over ``repeats`` calls."""
    forward = backward = 0.0
    given = variant.given or given
    inputs = (given.x, *variant.factors)
    for _ in range(repeats):
        start = perf_counter()
        y = variant.run(given.x)
        between = perf_counter()
        gradients = torch.autograd.grad(y, inputs, given.dy)
        end = perf_counter()
        forward += between - start
        backward += end - between
        del y, gradients
    return forward / repeats, backward / repeats, (forward + backward) / repeats


def repeats_for(frozen: float) -> int:
    """How many calls make a sample, given the seconds that one of the frozen layer takes."""
    return min(50, math.ceil(_SAMPLE_SECONDS / frozen))


def rounds_within(budget: float, one_round: float, wanted: int) -> int:
    """As many rounds as ``budget`` seconds allow, but three; at most ``wanted``."""
    return min(wanted, max(LEAST_ROUNDS, int(budget / one_round)))


def order_of(names: Iterable[str], n: int) -> list[str]:
    """The order of round ``n``, drawn anew for every round and the same in every run.

    So each variant follows every other about as often: what one leaves behind, caches and freed memory that the system
    clears once more for the next, falls on all alike. In a rotation it would always fall on the same.
    """
    order = list(names)
    random.Random(n).shuffle(order)
    return order


def interleave(
    variants: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int, refresh: Callable[[], Any]
) -> dict[str, list[tuple[float, ...]]]:
    """Run every variant once a round, in the order of ``order_of``, after ``refresh``."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in variants}
    gc.collect()
    gc.freeze()
    try:
        for n in range(rounds):
            refresh()
            for name in order_of(variants, n):
                found[name].append(variants[name]())
    finally:
        gc.unfreeze()
    return found
