"""Launching kernels, eagerly or into a graph that torch.compile traces, and the shapes that they are launched with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from triton import knobs

_tracing: ContextVar[bool] = ContextVar("mbf_kernels_tracing", default=False)
_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("mbf_kernels_recorder", default=None)


class Launch(NamedTuple):
    """What a kernel was to be launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    meta: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block nothing is launched; what would have been is put into the list."""
    launches: list[Launch] = []
    token = _recorder.set(launches.append)
    try:
        yield launches
    finally:
        _recorder.reset(token)


@contextmanager
def tracing() -> Iterator[None]:
    """Within the block launches go into the graph that is being traced, as nodes of ``torch.library.wrap_triton``."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def tracing_now() -> bool:
    """Whether a graph is being traced."""
    return _tracing.get()


def eager() -> bool:
    """Whether a launch would run now."""
    return not _tracing.get() and _recorder.get() is None


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **meta: Any) -> None:
    """Run ``kernel[grid](*arguments, **meta)`` now or, within ``tracing``, put it into the graph."""
    if (record := _recorder.get()) is not None:
        record(Launch(kernel, tuple(grid), arguments, meta))
        return
    run = torch.library.wrap_triton(kernel) if _tracing.get() else kernel
    run[tuple(grid)](*arguments, **meta)


def interpreted() -> bool:
    """Whether kernels run on the CPU, in numpy: ``TRITON_INTERPRET=1`` was set when they were imported."""
    return knobs.runtime.interpret


if interpreted():
    from mbf.kernels import _interpreter

    _interpreter.mend()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def spans(size: int, block: int, others: int, programs: int, least: int) -> tuple[int, int]:
    """Split an axis so that there are about ``programs`` programs, a part having ``least`` elements or more.

    Args:
        size: of the axis.
        block: what one step of the loop takes; a part is a multiple of it.
        others: programs that there are for each part.
        programs: wanted in all.
        least: elements of a part, unless the axis has fewer.

    Returns:
        Elements of a part, and the number of parts. The same for the same arguments, so sums over the parts are too.
        Of symbolic sizes they are expressions, which no guard binds.
    """
    least_of, most_of = (torch.sym_min, torch.sym_max) if tracing_now() else (min, max)
    parts = most_of(1, least_of(programs // most_of(1, others), size // least))
    span = cdiv(cdiv(size, parts), block) * block
    return span, most_of(1, cdiv(size, span))
