"""Claim: the Triton kernels move few bytes beyond those of the base product. Bytes are counted, no time is measured.

``mbf`` runs under Triton's interpreter on the CPU: what a kernel loads and stores is the sum of the masks of its loads
and stores times the size of an element. From which memory or cache of a GPU it would come makes no difference, so what
several programs load counts several times. Of torch's operators, those of PEFT and those that mbf calls beside its
kernels, each tensor argument counts as read and each result as written, but once an operator; views and allocations
move nothing. Left out on every side are the products with the frozen weight W (what the sum of such a product and an
accumulator reads of the accumulator is counted).

``mbf-epilogue`` is mbf where tuning has chosen a kernel that computes the base product itself, with the branch in its
epilogue; what it moves for that product is left out, too.

Peers: ``peft``, PEFT's lora.Linear with its fp32 A and B; ``peft-nocast``, the same with A and B in x's dtype;
``in-place``, three in-place torch calls with a stored mask; ``frozen``, the layers without adapter, which move bytes
here only where autograd sums the gradients of an x that several layers share. They run on meta tensors, dropout by
``native_dropout``, the operator that torch takes on a GPU. ``passes`` is what mbf's passes would move if each read or
wrote x, y, dy and dx once and nothing else: x, y, y forward, dy, x, dx, dx backward. ``ideal`` is what remains if the
base product did the rest: x forward, dy and x backward. x is bf16; W is frozen, x needs a gradient.

A layer is written d_in x d_out, layers that share x d_in x d_out+d_out+...; bytes per element are bytes over
tokens * (d_in + d_out) / 2, summed over the layers. Before a row is printed, y and every gradient of mbf are held
against fp64.

Run: ``python bench/traffic.py --csv bench/results/traffic.csv``; ``traffic_plot.py`` draws it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # read when triton and the kernels are imported

import torch
from common import BOTH_P, AddRow, run_script, table
from lora_linear import in_place_layer
from mbf.kernels import lora_group, lora_linear
from mbf.kernels._tune import forced
from meter import PARTS, Count, Counts, Meter
from torch import Tensor, nn
from torch.nn import functional as F
from traffic_plot import LAYERS

from mbf.ops import dropout_mask
from mbf.ops._operands import Branch, prepare
from mbf.ops.philox import keep_scale
from mbf.run.layers import DTYPES, SCALE, Operands, Variant, failures, frozen_layer, peft_layer

COLUMNS = ["shape", "rank", "p", "tokens", "dtype", "factors", "variant", "part", "bytes", "per_element", "launches"]
Result = dict[str, dict[str, Counts]]  # by variant, part, and kernel or operator


class Case(NamedTuple):
    """One row of the benchmark; ``factors`` is the dtype of mbf's A and B, a key of ``DTYPES``."""

    shape: str
    rank: int
    p: float
    tokens: int
    factors: str = "bf16"

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of every layer."""
        d_in, outs = self.shape.split("x")
        return [(int(d_in), int(d_out)) for d_out in outs.split("+")]

    @property
    def elements(self) -> float:
        """The activation elements that bytes are divided by."""
        return self.tokens * sum(map(sum, self.sizes)) / 2

    def __str__(self) -> str:
        name = f" ({LAYERS[self.shape]})" if self.shape in LAYERS else ""
        return f"{self.shape}{name} r={self.rank} p={self.p:g} T={self.tokens} A, B {self.factors}"


def product(
    shapes: Sequence[str], ranks: Sequence[int], ps: Sequence[float], tokens: Sequence[int], factors: Sequence[str]
) -> list[Case]:
    return [Case(*one) for one in itertools.product(shapes, ranks, ps, tokens, factors)]


CLAIM = Case("4096x4096", 16, 0.1, 8192)
DECODER = ("4096x4096+1024+1024", "4096x4096", "4096x14336+14336", "14336x4096")  # of Llama-3-8B, as mbf runs it
CASES = [
    *product(list(LAYERS), [16], [0.1], [1024], ["bf16"]),
    Case("4096x4096", 16, 0.0, 1024),
    *product(DECODER, [16], [0.1], [4096], ["bf16"]),
    Case("4096x4096", 8, 0.1, 8192),
    CLAIM,
    CLAIM._replace(tokens=16384),
]
EPILOGUE = {"forward": "epilogue", "backward": "epilogue"}  # what tuning may choose
QUICK = [Case("72x40", 3, 0.1, 70), Case("64x48+36", 8, 0.0, 33), Case("64x64", 16, 0.1, 64, "fp32")]
TUNED = (CLAIM, QUICK[0])  # counted with that choice, too, of which the interpreter takes its time


# -- mbf, on the CPU ---------------------------------------------------------------------------------------------------


def draw(case: Case) -> list[Operands]:
    """Random operands of each layer; they share x. A and B have the dtype of the case."""
    x = torch.randn(case.tokens, case.sizes[0][0]).bfloat16().requires_grad_()
    found = []
    for d_in, d_out in case.sizes:
        W = nn.Parameter((torch.randn(d_out, d_in) / d_in**0.5).bfloat16(), requires_grad=False)
        A = (torch.randn(case.rank, d_in) / d_in**0.5).to(DTYPES[case.factors])
        B = (torch.randn(d_out, case.rank) / case.rank**0.5).to(DTYPES[case.factors])
        found.append(Operands(W, A, B, x, torch.randn(case.tokens, d_out).bfloat16()))
    return found


def run_mbf(given: Sequence[Operands], branches: Sequence[Branch], meter: Meter) -> dict[str, Tensor]:
    """y and the gradients that training asks for, counted. It fails where the kernels decline."""
    weights, dys, x = [one.W for one in given], [one.dy for one in given], given[0].x.detach()
    of_branch = [True, True, False, False, False, False]
    with meter.kernels(), meter:
        if len(given) == 1:
            y, h = lora_linear.forward(x, weights[0], None, branches[0])
            ys, hs = [y], [h]
            meter.part = "backward"
            needs = [True, False, False, *of_branch]
            dx, _, _, *gradients = lora_linear.backward(dys[0], h, x, weights[0], branches[0], needs)
        else:
            ys, hs = lora_group.forward(x, weights, [None] * len(given), branches)
            meter.part = "backward"
            needs = [True, *of_branch * len(given)]
            dx, *gradients = lora_group.backward(dys, hs, x, weights, branches, needs)
    return named(ys, dx, gradients[:: len(of_branch)], gradients[1 :: len(of_branch)])


def named(ys: Sequence[Tensor], dx: Tensor, dAs: Sequence[Tensor], dBs: Sequence[Tensor]) -> dict[str, Tensor]:
    lists = {"y": ys, "dA": dAs, "dB": dBs}
    return {"dx": dx} | {f"{name}{n}": one for name, several in lists.items() for n, one in enumerate(several)}


def formula(given: Sequence[Operands], keeps: Sequence[Tensor | None], p: float, exact: bool) -> dict[str, Tensor]:
    """What mbf computes, by torch's operators in the same dtypes or, exact, in fp64."""

    def leaf(tensor: Tensor) -> Tensor:
        return (tensor.detach().double() if exact else tensor.detach()).requires_grad_()

    x = leaf(given[0].x)
    As, Bs = [leaf(one.A) for one in given], [leaf(one.B) for one in given]
    ys = []
    for one, A, B, keep in zip(given, As, Bs, keeps, strict=True):
        wide = x.to(A.dtype)
        dropped = wide if keep is None else wide * keep * keep_scale(p)
        base = F.linear(x, one.W.double() if exact else one.W)
        ys.append((base + SCALE * F.linear(F.linear(dropped, A), B)).to(x.dtype))
    dys = [one.dy.to(x.dtype) for one in given]
    dx, *gradients = torch.autograd.grad(ys, [x, *As, *Bs], dys)
    return named([y.detach() for y in ys], dx, gradients[: len(As)], gradients[len(As) :])


def count_mbf(case: Case) -> dict[str, Counts] | list[str]:
    """What mbf's kernels move, or what is wrong with their results."""
    given = draw(case)
    x = given[0].x.detach()
    seeds = torch.randint(2**62, (len(given),)).tolist()
    branches = [
        prepare(x, one.A, one.B, SCALE, None, None, case.p, seed, None, None)
        for one, seed in zip(given, seeds, strict=True)
    ]
    meter = Meter(one.W for one in given)
    got = run_mbf(given, branches, meter)
    keeps = [dropout_mask(branch.seed, x.shape, case.p) if case.p else None for branch in branches]
    with Meter(one.W for one in given):  # for its base products
        plain = formula(given, keeps, case.p, exact=False)
    found = failures(got, plain, formula(given, keeps, case.p, exact=True), torch.finfo(x.dtype).eps)
    return found or meter.counts


# -- the others, on meta tensors ---------------------------------------------------------------------------------------


class _Dropout(nn.Module):
    """The operator that ``F.dropout`` takes on a GPU."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def meta_peft_layer(given: Operands, p: float, **options: Any) -> Variant:
    variant = peft_layer(given, p, **options)
    layer: Any = variant.run
    if p:
        layer.lora_dropout["default"] = _Dropout(p)
    return variant


def count_eager(case: Case, build: Callable[[Operands], Variant]) -> dict[str, Counts]:
    """What torch's operators move for the layers that ``build`` makes."""
    with torch.device("meta"):
        x = torch.empty(case.tokens, case.sizes[0][0], dtype=torch.bfloat16, requires_grad=True)
        given = [
            Operands(
                nn.Parameter(torch.empty(d_out, d_in, dtype=torch.bfloat16), requires_grad=False),
                torch.empty(case.rank, d_in),
                torch.empty(d_out, case.rank),
                x,
                torch.empty(case.tokens, d_out, dtype=torch.bfloat16),
            )
            for d_in, d_out in case.sizes
        ]
    variants = [build(one) for one in given]
    factors = [factor for variant in variants for factor in variant.factors]
    with Meter(one.W for one in given) as meter:
        ys = [variant.run(x) for variant in variants]
        meter.part = "backward"
        torch.autograd.grad(ys, [x, *factors], [one.dy for one in given])
    return meter.counts


def floors(case: Case) -> Result:
    """``passes`` and ``ideal``: whole tensors of bf16, read or written once."""
    each = 2 * case.tokens
    x, y = each * case.sizes[0][0], each * sum(d_out for _, d_out in case.sizes)
    return {
        "passes": {"forward": {"": Count(0, x + y, y)}, "backward": {"": Count(0, y + 2 * x, x)}},
        "ideal": {"forward": {"": Count(0, x)}, "backward": {"": Count(0, x + y)}},
    }


# -- the table ---------------------------------------------------------------------------------------------------------


def eager(case: Case) -> Result:
    """The peers, each as separate layers."""
    found = {
        "peft": count_eager(case, lambda given: meta_peft_layer(given, case.p)),
        "peft-nocast": count_eager(case, lambda given: meta_peft_layer(given, case.p, autocast_adapter_dtype=False)),
        "in-place": count_eager(case, lambda given: in_place_layer(given, case.p)),
    }
    return found if len(case.sizes) == 1 else {"frozen": count_eager(case, frozen_layer), **found}


def measure(case: Case, args: argparse.Namespace) -> Result | list[str]:
    torch.seed()
    ours: Result = {}
    for name, choices in {"mbf": {}, "mbf-epilogue": EPILOGUE}.items():
        if choices and case not in TUNED:
            continue
        with forced(choices):
            counts = count_mbf(case)
        if isinstance(counts, list):
            return counts
        ours[name] = counts
    return {**eager(case), **ours, **floors(case)}


def moved(counts: Counts) -> int:
    return sum(count.moved for count in counts.values())


def launches(counts: Counts) -> int:
    return sum(count.launches for count in counts.values())


SUMMARY = ["bytes per element", *PARTS, "both", "both MB"]


def summary(variant: str, totals: Sequence[int], elements: float) -> list[str]:
    """A line of such a table, of the bytes of each part."""
    return [variant, *(f"{total / elements:.2f}" for total in (*totals, sum(totals))), f"{sum(totals) / 1e6:.1f}"]


def report(case: Case, result: Result, add: AddRow) -> None:
    each, lines = case.elements, []
    for variant, parts in result.items():
        factors = {"peft": "fp32", "mbf": case.factors, "mbf-epilogue": case.factors}.get(variant, "bf16")
        for part, counts in parts.items():
            row = [case.shape, case.rank, case.p, case.tokens, "bf16", factors, variant, part]
            add([*row, moved(counts), f"{moved(counts) / each:.3f}", launches(counts)])
        totals = [moved(parts[part]) for part in PARTS]
        lines.append(summary(variant, totals, each))
    print(f"\n{case}\n" + table(SUMMARY, lines))
    detail = [
        [f"{variant} {part}: {name}", str(count.launches), *(f"{n / each:.3f}" for n in (count.loaded, count.stored))]
        for variant in ("mbf", "mbf-epilogue", "peft-nocast", "peft")
        if variant in result
        for part in PARTS
        for name, count in result[variant][part].items()
    ]
    print("\n" + table(["of which", "launches", "loaded", "stored"], detail), flush=True)


def decoder(found: Mapping[Case, Result]) -> str:
    """Of all projections of a decoder layer together, where each was counted at one rank, p, length and dtype."""
    cases = [[case._replace(shape=shape) for shape in DECODER] for case in found if case.shape == DECODER[0]]
    shown = ""
    for of_layer in cases:
        if not found.keys() >= set(of_layer):
            continue
        each, lines = sum(case.elements for case in of_layer), []
        for variant in found[of_layer[1]]:
            if not all(variant in found[case] for case in of_layer):
                continue
            totals = [sum(moved(found[case][variant][part]) for case in of_layer) for part in PARTS]
            lines.append(summary(variant, totals, each))
        what = str(of_layer[0]._replace(shape="all projections of a decoder layer"))
        shown += f"\n{what}\n{table(SUMMARY, lines)}\n"
    return shown


def claims(case: Case, result: Result) -> str:
    """What the project promises, and whether the counts keep it."""
    theirs = sum(moved(result["peft-nocast"][part]) for part in PARTS)
    found = []
    for name in ("mbf", "mbf-epilogue"):
        forward, backward = (moved(result[name][part]) for part in PARTS)
        found += [
            (f"{name} forward, bytes per element", forward / case.elements, 6.5),
            (f"{name} backward, bytes per element", backward / case.elements, 8.5),
            (f"{name} both, over PEFT in bf16", (forward + backward) / theirs, 0.45),
        ]
    lines = [[what, f"{value:.3f}", f"{most:g}", "met" if value <= most else "MISSED"] for what, value, most in found]
    return f"\n{case}\n" + table(["claims", "counted", "at most", ""], lines)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Without a choice of rows: the layers of Llama-3-8B at 1024 and 4096 tokens, and one at 8192 for the "
        "claims and at 16384. The interpreter takes about ten minutes for the claims.",
    )
    add = parser.add_argument
    add("--shape", action="append", metavar="INxOUT[+OUT]", help="layers that share x; may be repeated, as the others")
    add("--rank", action="append", type=int)
    add("--p", action="append", type=float, help="dropout probability (default: 0 and 0.1)")
    add("--tokens", action="append", type=int, help="rows of x")
    add("--factors", action="append", choices=["bf16", "fp32"], help="dtype of mbf's A and B; x is bf16")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--claims", action="store_true", help="only the row that the claims are on")
    rows.add_argument("--quick", action="store_true", help="a few small rows")
    add("--threads", type=int)
    add("--csv", metavar="FILE")
    args = parser.parse_args(argv)
    axes = (args.shape, args.rank, args.p, args.tokens, args.factors)
    if any(axes) and (args.claims or args.quick):
        parser.error("--claims and --quick choose the rows; give none of the options above with them")
    args.cases = [CLAIM] if args.claims else QUICK if args.quick else CASES
    if any(axes):
        defaults: tuple[Any, ...] = (["4096x4096"], [16], BOTH_P, [1024], ["bf16"])
        args.cases = product(*(given or default for given, default in zip(axes, defaults, strict=True)))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    found: dict[Case, Result] = {}

    def keep(case: Case, result: Result, add: AddRow) -> None:
        found[case] = result
        report(case, result, add)

    status = run_script("traffic.py", argv, arguments, measure, keep, COLUMNS)
    print(decoder(found), end="")
    if CLAIM in found:
        print(claims(CLAIM, found[CLAIM]))
    return status


if __name__ == "__main__":
    sys.exit(main())
