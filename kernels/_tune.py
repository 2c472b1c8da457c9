"""Choosing how a kernel is launched: the shipped table or, with ``MBF_AUTOTUNE=1``, what is fastest on this GPU.

Tuning times the shipped configuration and its neighbours once for each kernel, form, rank and size (in powers of 2),
on the tensors of the first call, and keeps the answers for the process and in ``$MBF_CACHE`` or ``~/.cache/mbf``, under
``kernels/``, in a file for this GPU, this Triton and these kernels. In graphs and where nothing is cached the table
answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from mbf.kernels._configs import Config, family, multiprocessors, neighbours, programs, shipped, smaller
from mbf.kernels._launch import eager

Choice = TypeVar("Choice")
Result = TypeVar("Result")
_known: dict[Path | None, dict[str, Any]] = {}  # the answers, by the file that they are kept in
_forced: ContextVar[dict[str, Any] | None] = ContextVar("mbf_kernels_forced", default=None)


@contextmanager
def forced(choices: dict[str, Any]) -> Iterator[None]:
    """Within the block the kernels named, such as ``"project"``, are launched so; ``"family"`` names a table."""
    token = _forced.set({**(_forced.get() or {}), **choices})
    try:
        yield
    finally:
        _forced.reset(token)


def config_for(
    kernel: str,
    ranks: int,
    like: torch.Tensor,
    dtype: torch.dtype,
    size: tuple[int, ...],
    form: tuple[Any, ...],
    trial: Callable[[Config], Any],
) -> Config:
    """The configuration for a launch.

    Args:
        kernel: as in ``shipped``.
        ranks: of a tile.
        like: A or B, of which dtype and device count.
        dtype: of the activations.
        size: what the speed depends on besides, rows and columns, in elements.
        form: what else makes another binary of the launch: the kernel's flags.
        trial: launches the kernel so, without lasting effect.
    """
    override = _forced.get() or {}
    if override.get(kernel) is not None:
        return override[kernel]
    default = shipped(kernel, ranks, max(like.element_size(), dtype.itemsize), family_for(like.device))
    if not _tuning(like.device):
        return default
    key = _key(kernel, like.dtype, dtype, ranks, *size, *map(str, form))
    return Config(*best(key, like.device, [default, *neighbours(default)], trial))


def launched(config: Config, run: Callable[[Config], Result]) -> Result:
    """``run(config)`` or, on a GPU that has not the room for it, of the first smaller configuration that fits.

    Triton refuses a binary before it is launched, so what failed has had no effect.
    """
    while True:
        try:
            return run(config)
        except triton.runtime.errors.OutOfResources:
            less = smaller(config)
            if less is None:
                raise
            config = less


def family_for(device: torch.device) -> str:
    """The family whose table answers."""
    return (_forced.get() or {}).get("family") or family(device)


def programs_for(device: torch.device) -> int:
    """Into how many programs a kernel is parted at most: one for each multiprocessor."""
    named = (_forced.get() or {}).get("family")
    return programs(named) if named else multiprocessors(device)


def tier_for(
    name: str, like: torch.Tensor, size: tuple[int, ...], form: tuple[Any, ...], trial: Callable[[str], Any]
) -> str:
    """``"base"``, the base by the BLAS and the branch on top of it or, where that proved faster, ``"epilogue"``."""
    override = _forced.get() or {}
    if override.get(name) is not None:
        return override[name]
    if not _tuning(like.device):
        return "base"
    return best(_key(name, like.dtype, *size, *map(str, form)), like.device, ["base", "epilogue"], trial)


def _key(*parts: Any) -> str:
    return " ".join(str(1 << (part - 1).bit_length() if isinstance(part, int) else part) for part in parts)


def _tuning(device: torch.device) -> bool:
    wanted = os.environ.get("MBF_AUTOTUNE", "") not in ("", "0")
    return wanted and device.type == "cuda" and eager() and not torch.cuda.is_current_stream_capturing()


# -- measuring ---------------------------------------------------------------------------------------------------------


def best(
    key: str,
    device: torch.device,
    candidates: list[Choice],
    trial: Callable[[Choice], Any],
    time: Callable[[Callable[[], Any]], float] = triton.testing.do_bench,
) -> Choice:
    """The candidate whose trial is fastest: as the process or the cache knows it, or timed now and put into both.

    A candidate that fails, for want of shared memory say, is out; should all fail, the first is taken.
    """
    path = cache_file(device)
    if path not in _known:
        _known[path] = read(path)
    known = _known[path]
    if key in known and known[key] in map(_plain, candidates):
        return candidates[[_plain(c) for c in candidates].index(known[key])]
    times = [_time_of(candidate, trial, time) for candidate in candidates]
    winner = min(range(len(times)), key=times.__getitem__)
    known[key] = _plain(candidates[winner])
    write(path, {**read(path), key: known[key]})
    return candidates[winner]


def _time_of(candidate: Choice, trial: Callable[[Choice], Any], time: Callable[[Callable[[], Any]], float]) -> float:
    try:
        return time(lambda: trial(candidate))
    except (RuntimeError, triton.runtime.errors.OutOfResources, triton.compiler.CompilationError):
        return float("inf")


def _plain(choice: Any) -> Any:
    return list(choice) if isinstance(choice, tuple) else choice


# -- the cache ---------------------------------------------------------------------------------------------------------


@cache
def _sources() -> str:
    """A digest of the kernels' code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def cache_file(device: torch.device) -> Path | None:
    """Where the answers for ``device`` are kept; None where ``MBF_CACHE`` names no folder and the user has no home."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _file(name, os.environ.get("MBF_CACHE") or "~/.cache/mbf")


@cache
def _file(name: str, folder: str) -> Path | None:
    try:
        kernels = Path(folder).expanduser() / "kernels"
    except RuntimeError:
        return None
    return kernels / f"{''.join(c if c.isalnum() else '-' for c in name)}_{triton.__version__}_{_sources()}.json"


def read(path: Path | None) -> dict[str, Any]:
    """The answers; none if there is no file, or one that cannot be read."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path | None, answers: dict[str, Any]) -> None:
    """Put the answers there at once as a whole; where that cannot be done, say so once and go on."""
    if path is None:
        return
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(answers, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        warnings.warn(f"mbf: the kernels' timings cannot be kept in {path}: {error}", stacklevel=2)
