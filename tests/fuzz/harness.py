"""Give a reader many wrong inputs: a plain mutational fuzzer, and the targets that it knows.

A target is a module ``tests/fuzz/targets/<name>.py`` (no leading underscore) with

- ``seeds() -> list[bytes]``: inputs to start from, most of them good;
- ``one(data: bytes) -> None``: gives ``data`` to the reader, catches the reader's documented errors and nothing else,
  and asserts what has to hold of that which is accepted. Whatever it raises is a find;
- optionally ``WORDS: list[bytes]``: tokens of the format, to be put into inputs.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from tests.fuzz import targets

LONGEST = 1 << 14
"""Bytes of an input: mutations beyond are cut."""

WORDS = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\r\n", b"\n", b"\t", b'"', b"../"]
"""Tokens of every format."""


SECONDS = 10
"""For an input, however wrong."""


class TooSlow(BaseException):
    """An input took more than it may; no ``Exception``, so that no reader takes it for one of its own."""


@contextmanager
def limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise ``TooSlow`` in the block when the process has computed for so long, whatever the clock says."""

    def over(*_: object) -> None:
        raise TooSlow(f"computed for more than {seconds} s")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def names() -> list[str]:
    """Of all targets."""
    return sorted(found.name for found in pkgutil.iter_modules(targets.__path__) if not found.name.startswith("_"))


def target(name: str) -> ModuleType:
    return importlib.import_module(f"{targets.__name__}.{name}")


def inputs(module: ModuleType, count: int, seed: int) -> Iterator[bytes]:
    """``count`` inputs: the seeds as they are, then mutations of them; the same for the same seed."""
    corpus: list[bytes] = module.seeds()
    words = [*WORDS, *getattr(module, "WORDS", [])]
    draw = random.Random(seed)
    for number in range(count):
        if number < len(corpus):
            yield corpus[number]
            continue
        data = bytearray(draw.choice(corpus))
        for _ in range(draw.choice((1, 1, 1, 2, 2, 4, 8))):
            _mutate(data, draw, corpus, words)
        yield bytes(data[:LONGEST])


def _mutate(data: bytearray, draw: random.Random, corpus: list[bytes], words: list[bytes]) -> None:
    """One change in place: a bit, a byte, a cut, a part left out or said again, a word, a part of another seed."""
    at = draw.randrange(len(data) + 1)
    end = min(len(data), at + draw.choice((1, 2, 4, 16, 64)))
    match draw.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        case 1 if at < len(data):
            data[at] = draw.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end] * draw.choice((1, 2, 16))
        case 5:
            data[at:end] = draw.choice(words)
        case 6:
            other = draw.choice(corpus)
            data[at:] = other[draw.randrange(len(other) + 1) :]
        case _:
            data[at:at] = draw.choice(words)
