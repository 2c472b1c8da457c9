"""Time and memory of the variants of a layer on a GPU.

A call is the replay of a captured CUDA graph between two CUDA events, so that no launch from Python is timed; a variant
that cannot be captured is called as it is, and a note says why. ``both`` is one graph of forward and backward, and the
backward is ``both`` less the forward. Before each call a buffer larger than the second-level cache is written, which
also keeps the GPU busy until the call is queued. With dropout a replay may hold the two small fills by which torch
hands a graph the state of its generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple

import torch

from mbf.run.bench import Samples, interleave, repeats_for, rounds_within
from mbf.run.layers import Operands, Variant

WARM_UPS = 3
_LEAST_FLUSH = 256 << 20  # bytes; writing them takes longer than queueing a replay
_broken: list[torch.cuda.CUDAGraph] = []  # the allocator still asks a graph whose capture was cut off


class Calls(NamedTuple):
    """What is timed of a variant: replays or, where ``note`` says why there are none, its own calls."""

    forward: Callable[[], object]
    both: Callable[[], object]
    note: str = ""


class NotCapturedError(Exception):
    """The message says why."""


def calls_of(variant: Variant, given: Operands) -> Calls:
    """One forward, and one forward with its backward, as Python calls them."""
    given = variant.given or given
    inputs = (given.x, *variant.factors)
    return Calls(lambda: variant.run(given.x), lambda: torch.autograd.grad(variant.run(given.x), inputs, given.dy))


def prepare(variant: Variant, given: Operands, stream: torch.cuda.Stream) -> Calls:
    """Warm the variant up on ``stream`` and capture it there."""
    calls = calls_of(variant, given)
    before = torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            calls.forward()
            calls.both()
    before.wait_stream(stream)
    try:
        return Calls(capture(calls.forward, stream).replay, capture(calls.both, stream).replay)
    except NotCapturedError as error:
        return calls._replace(note=str(error))


def capture(run: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The graph of ``run``.

    Raises:
        NotCapturedError: whatever went wrong; streams, generator and later captures are as if it had not been tried.
    """
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    cause: Exception | None = None
    try:
        with _own_generator(), torch.cuda.graph(graph, stream=stream):
            try:
                run()
            except Exception as error:
                cause = error  # ending the capture may then fail with a less telling one
                raise
    except Exception as error:
        _broken.append(graph)
        torch.cuda.set_stream(before)
        told = cause or error
        raise NotCapturedError(f"{type(told).__name__}: {str(told).strip().partition(chr(10))[0]}") from error
    return graph


@contextmanager
def _own_generator() -> Iterator[None]:
    """Within the block the GPU's generator has a state of its own: a capture that is cut off leaves it unusable."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def timed(calls: Calls, flush: Callable[[], object], repeats: int) -> tuple[float, ...]:
    """Seconds of one forward, one backward and both, over ``repeats`` calls, ``flush`` not counted."""
    events = []
    for _ in range(repeats):
        for run in (calls.forward, calls.both):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            run()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    seconds = [1e-3 * start.elapsed_time(end) for start, end in events]
    forward, both = mean(seconds[::2]), mean(seconds[1::2])
    return forward, both - forward, both


def sample(
    variants: Mapping[str, Variant], given: Operands, rounds: int, budget: float
) -> tuple[Samples, dict[str, str]]:
    """Time the variants as ``mbf.run.bench.sample`` does; return why those that were not captured were not, too."""
    stream = torch.cuda.Stream()
    calls = {name: prepare(variant, given, stream) for name, variant in variants.items()}
    flush = flusher(given.x.device)

    def runs(repeats: int) -> dict[str, Callable[[], tuple[float, ...]]]:
        return {name: partial(timed, one, flush, repeats) for name, one in calls.items()}

    for run in runs(1).values():
        run()
    repeats = repeats_for(runs(1)["frozen"]()[-1])
    start = perf_counter()
    interleave(runs(repeats), 1, given.refresh)
    rounds = rounds_within(budget, perf_counter() - start, rounds)
    times = interleave(runs(repeats), rounds, given.refresh)
    return Samples(times, rounds, repeats), {name: one.note for name, one in calls.items() if one.note}


def flusher(device: torch.device) -> Callable[[], Any]:
    """A function that writes a buffer of at least twice the second-level cache."""
    size = max(_LEAST_FLUSH, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def peak_mb(variant: Variant, given: Operands) -> float:
    """The most that tensors of one forward and backward hold at a time; x, dy and the parameters aren't counted."""

    both = calls_of(variant, given).both
    both()  # what is allocated once, as the BLAS's workspace is, isn't counted either
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
