"""Calls that do the same, checked and then timed side by side in rounds."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from common import AddRow, plain_parser, quartiles, run_script, table

from mbf.run.bench import LEAST_ROUNDS, order_of

COLUMNS = ["case", "variant", "median_ms", "q1_ms", "q3_ms", "times_faster", "note", "rounds"]


@dataclass
class Contest:
    """One case.

    Attributes:
        calls: by variant, in the order of the table; the first is mbf's.
        check: what is wrong with a variant's result, if anything.
        note: a figure of a variant's result that stands beside its times.
        slow: variants of which a few rounds must do.
    """

    calls: Mapping[str, Callable[[], Any]]
    check: Callable[[str, Any], list[str]]
    note: Callable[[str, Any], str] = lambda name, result: ""
    slow: frozenset[str] = frozenset()


@dataclass
class Times:
    """Seconds of every round, by variant."""

    seconds: dict[str, list[float]]
    notes: dict[str, str] = field(default_factory=dict)


def hold(contest: Contest, rounds: int, budget: float) -> Times | list[str]:
    """Check every variant, then time them in rounds, in orders drawn anew; or what was wrong.

    Args:
        rounds: at most; a slow variant has a fifth, and each has three.
        budget: seconds after which there are no more rounds.
    """
    problems, notes = [], {}
    for name, call in contest.calls.items():
        result = call()
        problems += [f"{name}: {what}" for what in contest.check(name, result)]
        notes[name] = contest.note(name, result)
        del result
    if problems:
        return problems
    times: dict[str, list[float]] = {name: [] for name in contest.calls}
    began = perf_counter()
    gc.collect()
    gc.disable()
    try:
        for n in range(rounds):
            for name in order_of(times, n):
                if name in contest.slow and len(times[name]) >= max(LEAST_ROUNDS, rounds // 5):
                    continue
                start = perf_counter()
                contest.calls[name]()
                times[name].append(perf_counter() - start)
            if n + 1 >= LEAST_ROUNDS and perf_counter() - began > budget:
                break
    finally:
        gc.enable()
    return Times(times, notes)


def run_contests(
    script: str,
    argv: Sequence[str] | None,
    description: str | None,
    cases: Mapping[str, Any],
    quick: Sequence[str],
    build: Callable[[str], Contest],
    budget: float,
    finish: Callable[[Times], Times] = lambda times: times,
) -> int:
    """A script whose cases have names: hold all of them, those of ``--case``, or the quick ones.

    Args:
        script, argv: as ``run_script``'s.
        build: the contest of a case.
        budget: seconds a case may take unless ``--budget`` says otherwise.
        finish: adds what is known only once all variants are timed.
    """

    def arguments(argv: Sequence[str]) -> argparse.Namespace:
        parser = plain_parser(description, "case", budget)
        rows = parser.add_mutually_exclusive_group()
        rows.add_argument("--case", action="append", choices=list(cases), metavar="NAME", help=f"of {', '.join(cases)}")
        rows.add_argument("--quick", action="store_true", help="a few small cases")
        args = parser.parse_args(argv)
        args.cases = args.case or (list(quick) if args.quick else list(cases))
        return args

    def measure(case: str, args: argparse.Namespace) -> Times | list[str]:
        found = hold(build(case), args.rounds, args.budget)
        return found if isinstance(found, list) else finish(found)

    return run_script(script, argv, arguments, measure, show, COLUMNS)


def show(case: str, times: Times, add: AddRow) -> None:
    """Print a case, and add its rows, which have COLUMNS, to the CSV."""
    lines = []
    ours = quartiles(next(iter(times.seconds.values())))[1]
    for name, seconds in times.seconds.items():
        q1, median, q3 = (1e3 * s for s in quartiles(seconds))
        faster, note = median / (1e3 * ours), times.notes[name]
        add([case, name, *(f"{t:.3f}" for t in (median, q1, q3)), f"{faster:.2f}", note, len(seconds)])
        lines.append(
            [name, *(f"{t:.2f}" for t in (median, q1, q3)), f"{faster:.2f}", str(len(seconds)), *([note] * bool(note))]
        )
    head = ["", "median ms", "q1", "q3", "mbf is … times faster", "rounds", *(["note"] * any(times.notes.values()))]
    width = len(head)
    print(f"\n{case}\n" + table(head, [[*line, *[""] * (width - len(line))] for line in lines]), flush=True)
