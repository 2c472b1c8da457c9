"""How long a regular expression of an adapter's configuration may take, so that a hostile one cannot hang a load.

``re`` tries one way after another. How many ways there are from one place in a name of n characters, and how many steps
they all take, are bounded by Σ p[d] C(n + d, d), since places along a match never decrease.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from math import comb
from typing import Any

# By the field of the configuration, what PEFT matches with names of layers.
AS_PEFT_MATCHES = {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_Polynomial = list[float]
_ENDLESS: _Polynomial = [float("inf")]


def steps_of(name: str, pattern: str, length: int) -> float:
    """A bound on the steps that PEFT takes to match ``pattern`` of field ``name`` with ``length`` characters."""
    exact = re.search(r"\(\?[a-zA-Z-]+[:)]", pattern) is None  # no flags, so letters are only what they are
    _, steps = _of_sequence(_parser.parse(AS_PEFT_MATCHES[name].format(pattern)), exact)
    return sum(part * comb(length + d, d) for d, part in enumerate(steps) if part)


def _of_sequence(items: Any, exact: bool) -> tuple[_Polynomial, _Polynomial]:
    """(ways, steps) of what ``re`` parsed."""
    ways: _Polynomial = [1]
    steps: _Polynomial = [1]
    before = ""
    for at, (op, value) in enumerate(items):
        here, cost = _of_item(repr(op), value, exact)
        follows = _lead(items[at + 1 :]) if exact and repr(op).endswith("_REPEAT") else ""
        if follows and len(value[2]) == 1 and not _takes(value[2][0], follows[0]):
            here = [1]  # what follows can only be where the repeat ends
        if exact and _is_beginning(repr(op), value):  # only the ways that take no character get past it
            steps = _sum([steps, ways])
            ways = [sum(ways)]
        elif repr(op) == "LITERAL" == before:
            cost = [0.1]  # in one go
        steps, before = _sum([steps, _times(ways, cost)]), repr(op)
        ways = _times(ways, here)
    return ways, steps


def _of_item(op: str, value: Any, exact: bool) -> tuple[_Polynomial, _Polynomial]:
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "GROUPREF"):
        return [1], [1]
    if op == "SUBPATTERN":
        return _of_sequence(value[3], exact)
    if op == "ATOMIC_GROUP":
        return _of_sequence(value, exact)
    if op in ("ASSERT", "ASSERT_NOT"):
        return [1], _of_sequence(value[1], exact)[1]
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = value
        return _of_repeat(least, most, body, exact)
    if op == "BRANCH":
        leads = [_lead(one) if exact else "" for one in value[1]]
        parts = [_of_sequence(one, exact) for one in value[1]]
        # Those that match at one place begin with the beginning of one of them.
        together = [
            _sum(ways for other, (ways, _) in zip(leads, parts, strict=True) if lead.startswith(other))
            for lead in leads
        ]
        most = [max(column) for column in zip(*_as_long(together), strict=True)]
        return most, _sum([[1], *(steps for _, steps in parts)])
    return _ENDLESS, _ENDLESS


def _of_repeat(least: int, most: int, body: Any, exact: bool) -> tuple[_Polynomial, _Polynomial]:
    ways, steps = _of_sequence(body, exact)
    if ways == [1]:
        often: _Polynomial = [most - least + 1] if most <= 1 else [0, 1]
        return often, _times(steps, often if most <= 1 else [1, 1])
    if most > 30:  # of two ways or more
        return _ENDLESS, _ENDLESS
    found: _Polynomial = [0]
    tried: _Polynomial = [0]
    power: _Polynomial = [1]
    for times in range(most + 1):
        tried = _sum([tried, power])
        if times >= least:
            found = _sum([found, power])
        power = _times(power, ways)
    return found, _times(steps, tried)


def _is_beginning(op: str, value: Any) -> bool:
    if op == "SUBPATTERN":
        return len(value[3]) > 0 and _is_beginning(repr(value[3][0][0]), value[3][0][1])
    return op == "AT" and repr(value) in ("AT_BEGINNING", "AT_BEGINNING_STRING")


def _lead(items: Any) -> str:
    """The characters that any match of ``items`` begins with."""
    found = ""
    for op, value in items:
        if repr(op) == "SUBPATTERN":
            found += _lead(value[3])
            if all(repr(inner) == "LITERAL" for inner, _ in value[3]):
                continue
            return found
        if repr(op) != "LITERAL":
            return found
        found += chr(value)
    return found


def _takes(item: tuple[Any, Any], letter: str) -> bool:
    """Whether ``item`` may match ``letter``; True also where that is not told."""
    op, value = repr(item[0]), item[1]
    if op == "LITERAL":
        return bool(chr(value) == letter)
    if op == "NOT_LITERAL":
        return bool(chr(value) != letter)
    if op == "RANGE":
        return bool(value[0] <= ord(letter) <= value[1])
    if op == "CATEGORY":
        classes = {"DIGIT": r"\d", "NOT_DIGIT": r"\D", "WORD": r"\w", "NOT_WORD": r"\W"}
        return re.match(classes.get(repr(value).removeprefix("CATEGORY_"), "."), letter) is not None
    if op == "IN":
        negated = repr(value[0][0]) == "NEGATE"
        return negated != any(_takes(part, letter) for part in value[negated:])
    return True


def _as_long(parts: Iterable[_Polynomial]) -> list[_Polynomial]:
    several = list(parts)
    size = max(map(len, several))
    return [part + [0] * (size - len(part)) for part in several]


def _sum(parts: Iterable[_Polynomial]) -> _Polynomial:
    return _within([sum(column) for column in zip(*_as_long(parts), strict=True)])


def _times(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    if _ENDLESS in (a, b):
        return _ENDLESS
    product: _Polynomial = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return _within(product)


def _within(found: _Polynomial) -> _Polynomial:
    return found if len(found) <= 12 and max(found) < 1e18 else _ENDLESS
