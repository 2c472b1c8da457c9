"""Choosing how a kernel is launched: the shipped table or, with ``MBF_AUTOTUNE=1``, what is fastest on this GPU.

Tuning times the shipped configuration and its neighbours once for each kernel, dtype, rank and size (in powers of 2),
on the tensors of the first call, and keeps the answers in ``$MBF_CACHE`` or ``~/.cache/mbf``, under ``kernels/``, in a
file for this GPU, this Triton and these kernels. In graphs and where nothing is cached the table answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from mbf.kernels._configs import Config, family, multiprocessors, neighbours, programs, shipped
from mbf.kernels._launch import eager

Choice = TypeVar("Choice")
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
    kernel: str, ranks: int, like: torch.Tensor, size: tuple[int, ...], trial: Callable[[Config], Any]
) -> Config:
    """The configuration for a launch.

    Args:
        kernel: as in ``shipped``.
        ranks: of a tile.
        like: A or B, of which dtype and device count.
        size: what the speed depends on besides, rows and columns, in elements.
        trial: launches the kernel so, without lasting effect.
    """
    override = _forced.get() or {}
    if override.get(kernel) is not None:
        return override[kernel]
    default = shipped(kernel, ranks, like.element_size(), family_for(like.device))
    if not _tuning(like.device):
        return default
    key = _key(kernel, like.dtype, ranks, *size)
    return Config(*best(key, like.device, [default, *neighbours(default)], trial))


def family_for(device: torch.device) -> str:
    """The family whose table answers."""
    return (_forced.get() or {}).get("family") or family(device)


def programs_for(device: torch.device) -> int:
    """Into how many programs a kernel is parted at most: one for each multiprocessor."""
    named = (_forced.get() or {}).get("family")
    return programs(named) if named else multiprocessors(device)


def tier_for(name: str, like: torch.Tensor, size: tuple[int, ...], trial: Callable[[str], Any]) -> str:
    """``"base"``, the base by the BLAS and the branch on top of it or, where that proved faster, ``"epilogue"``."""
    override = _forced.get() or {}
    if override.get(name) is not None:
        return override[name]
    if not _tuning(like.device):
        return "base"
    return best(_key(name, like.dtype, *size), like.device, ["base", "epilogue"], trial)


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
    """The candidate whose trial is fastest: from the cache, or timed now and put there.

    A candidate that fails, for want of shared memory say, is out; should all fail, the first is taken.
    """
    path = cache_file(device)
    known = read(path)
    if key in known and known[key] in map(_plain, candidates):
        return candidates[[_plain(c) for c in candidates].index(known[key])]
    times = [_time_of(candidate, trial, time) for candidate in candidates]
    winner = min(range(len(times)), key=times.__getitem__)
    write(path, {**read(path), key: _plain(candidates[winner])})
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


def cache_file(device: torch.device) -> Path:
    """Where the answers for ``device`` are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    folder = Path(os.environ.get("MBF_CACHE") or "~/.cache/mbf").expanduser() / "kernels"
    return folder / f"{''.join(c if c.isalnum() else '-' for c in name)}_{triton.__version__}_{_sources()}.json"


def read(path: Path) -> dict[str, Any]:
    """The answers; none if there is no file, or one that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, answers: dict[str, Any]) -> None:
    """Put the answers there at once as a whole; where that cannot be done, say so once and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(answers, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"mbf: the kernels' timings cannot be kept in {path}: {error}", stacklevel=2)
