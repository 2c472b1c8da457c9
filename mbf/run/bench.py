"""Time of one LoRA layer on this machine's CPU: the frozen layer alone, PEFT's lora.Linear, and that layer fused.

All three compute on the same W, x and dy, the two adapters with the same random A and B. W is frozen, x needs a
gradient. ``bench/lora_linear.py`` of the source tree is the long form, with more peers, parts and memory.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from mbf.ops.philox import P_END
from mbf.peft import calls, fuse
from mbf.run.doctor import diagnose

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = {"576x576": 8, "576x1536": 16, "2048x2048": 16}  # by shape: two of SmolLM2-135M, one of Llama-3.2-1B
_OTHER_RANK = 16
_SCALE = 2.0
_ROW_SECONDS = 6.0  # a row that would take longer has fewer rounds, but three
_SAMPLE_SECONDS = 1e-3  # a sample of a small layer is several calls


@dataclass(frozen=True)
class Case:
    """One row: the layer is d_in x d_out, x is tokens x d_in."""

    d_in: int
    d_out: int
    rank: int
    p: float
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.d_in}x{self.d_out} r={self.rank} p={self.p:g} T={self.tokens} {self.dtype}"


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

    Before a row is timed, y and the gradients of the fused layer without dropout are held against fp64: each may be off
    by twice the error of PEFT's layer + 1e-6, relative in norm.

    Args:
        shapes: ``DINxDOUT``; none are those of ``RANKS``.
        ps: dropout probabilities; none are 0 and 0.1.
        rank: of every layer; by default 16, or what ``RANKS`` has for the shape.
        tokens: rows of x.
        dtype: of W and x, a key of ``DTYPES``; A and B are fp32, as PEFT makes them.
        rounds: samples of each variant at most, interleaved in rotating order.
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


# -- the variants ------------------------------------------------------------------------------------------------------


class _Variant(NamedTuple):
    layer: nn.Module
    factors: tuple[Tensor, ...]  # A and B


def _base(W: nn.Parameter) -> nn.Linear:
    """A linear layer that has W itself: all variants read the same memory."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = W
    return layer


def _adapted(W: nn.Parameter, A: Tensor, B: Tensor, p: float) -> _Variant:
    rank = A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, lora_dropout=p, target_modules=["0"])  # type: ignore[arg-type]
    model: Any = get_peft_model(nn.Sequential(_base(W)), config)
    layer = model.base_model.model[0]
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for weight, value in zip(factors, (A, B), strict=True):
            weight.copy_(value)
    return _Variant(layer, factors)


def _measure(case: Case, rounds: int) -> Row:
    dtype = DTYPES[case.dtype]
    W = nn.Parameter((torch.randn(case.d_out, case.d_in) / case.d_in**0.5).to(dtype), requires_grad=False)
    A = torch.randn(case.rank, case.d_in) / case.d_in**0.5
    B = torch.randn(case.d_out, case.rank) / case.rank**0.5
    x = torch.randn(case.tokens, case.d_in).to(dtype).requires_grad_()
    dy = torch.randn(case.tokens, case.d_out).to(dtype)
    peft, fused = _adapted(W, A, B, case.p), _adapted(W, A, B, case.p)
    fuse(fused.layer)
    if problems := _problems(peft, fused, W, x, dy):
        return Row(case, {}, 0, problems)
    return _time(case, {"frozen": _Variant(_base(W), ()), "peft": peft, "mbf": fused}, x, dy, rounds)


# -- right before fast -------------------------------------------------------------------------------------------------


def _results(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach()} | dict(zip(("dx", "dA", "dB"), gradients, strict=True))


def _problems(peft: _Variant, fused: _Variant, W: Tensor, x: Tensor, dy: Tensor) -> tuple[str, ...]:
    """What the fused layer computes wrong with its dropout off."""
    found = []
    before = calls.copy()
    got, plain = (_without_dropout(variant, x, dy) for variant in (fused, peft))
    if calls["slow"] != before["slow"] or calls["fast"] == before["fast"]:
        found.append("the layer was left to PEFT")
    wide, A, B = (t.detach().double().requires_grad_() for t in (x, *peft.factors))
    y = F.linear(wide, W.double()) + _SCALE * F.linear(F.linear(wide, A), B)
    for name, exact in _results(y, (wide, A, B), dy.double()).items():
        error, limit = _error(got[name], exact), 2 * _error(plain[name], exact) + 1e-6
        if not error <= limit:
            found.append(f"{name} is off by {error:.2g}, allowed {limit:.2g}")
    return tuple(found)


def _without_dropout(variant: _Variant, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    variant.layer.eval()
    found = _results(variant.layer(x), (x, *variant.factors), dy)
    variant.layer.train()
    return found


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


# -- time --------------------------------------------------------------------------------------------------------------


def _sample(variant: _Variant, x: Tensor, dy: Tensor, repeats: int) -> float:
    """Seconds of one forward and backward, over ``repeats``."""
    inputs = (x, *variant.factors)
    start = perf_counter()
    for _ in range(repeats):
        torch.autograd.grad(variant.layer(x), inputs, dy)
    return (perf_counter() - start) / repeats


def _time(case: Case, variants: Mapping[str, _Variant], x: Tensor, dy: Tensor, rounds: int) -> Row:
    for variant in variants.values():
        _sample(variant, x, dy, 1)
    once = {name: _sample(variant, x, dy, 1) for name, variant in variants.items()}
    repeats = min(50, math.ceil(_SAMPLE_SECONDS / once["frozen"]))
    rounds = min(rounds, max(3, int(_ROW_SECONDS / (repeats * sum(once.values())))))
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    try:
        for n in range(rounds):
            with torch.no_grad():
                x.normal_()
                dy.normal_()
            for k in range(len(names)):
                name = names[(n + k) % len(names)]
                seconds[name].append(_sample(variants[name], x, dy, repeats))
    finally:
        gc.unfreeze()
    return Row(case, {name: 1e3 * median(samples) for name, samples in seconds.items()}, rounds)
