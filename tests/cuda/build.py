"""The emulated library: csrc/cuda/*.cu and ops.cpp against the stand-in of csrc/emulation, built by the host compiler.

An object is named for its compiler, flags and every file that it includes, so what has not changed is not built again;
a lock keeps the workers of pytest-xdist from building the same thing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"
DIGEST = 16  # digits in a file's name
TORCH_TARGET_VERSION = "0x020a000000000000"  # that of setup.py

FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DMBF_EMULATION"),
    *("-ffp-contract=off", "-fno-strict-aliasing"),  # as nvcc takes casts of pointers
)
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


class Mode(NamedTuple):
    """Flags that compile kernels, that compile the stand-in, and that link them."""

    name: str
    kernels: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
_WATCH = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
_WHOLE = ("-Wl,-z,defs",)

PLAIN = Mode("plain", link=_WHOLE)
# Every access of a kernel is told to csrc/emulation/races.cpp; the sanitizer itself is not linked.
RACES = Mode("races", kernels=_WATCH, link=_WHOLE)
SANITIZE = Mode("sanitize", _SANITIZE, _SANITIZE, _SANITIZE)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def missing_compiler() -> str | None:
    """Why nothing can be built here, or None."""
    return None if shutil.which(compiler()) else f"the C++ compiler {compiler()!r} is not there"


@cache
def included(source: Path) -> frozenset[Path]:
    """``source`` and the files of csrc that it includes, at any depth."""
    found = {source}
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.MULTILINE):
        path = (source.parent / name).resolve()
        if path.exists() and path not in found:
            found |= included(path)
    return frozenset(found)


def named_for(source: Path, command: list[str]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(included(source)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST]


def run(command: list[str]) -> None:
    # What the tests run under is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def made(target: Path, command: list[str]) -> Path:
    """``target`` (name-digest.suffix) by ``command -o target``, in place of others of its name; unless it is there."""
    if not target.exists():
        partial = target.with_suffix(".partial")
        run([*command, "-o", str(partial)])
        for old in target.parent.glob(f"{target.stem.rpartition('-')[0]}-{'?' * DIGEST}{target.suffix}"):
            old.unlink()
        partial.rename(target)
    return target


def compile_all(sources: Iterable[Path], mode: str, flags: tuple[str, ...]) -> list[Path]:
    def compile_one(source: Path) -> Path:
        command = [compiler(), *FLAGS, *WARNINGS, *flags, "-x", "c++", "-c", str(source)]
        return made(BUILD / f"{source.stem}-{mode}-{named_for(source, command)}.o", command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: list[Path], name: str, flags: tuple[str, ...]) -> Path:
    command = [compiler(), *map(str, objects), *flags]
    digest = hashlib.sha256(" ".join(command).encode()).hexdigest()[:DIGEST]
    return made(BUILD / f"{name}-{digest}{'.so' if '-shared' in flags else ''}", command)


def torch_flags() -> tuple[str, ...]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return ("-isystem", str(include), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")


def torch_links() -> tuple[str, ...]:
    import torch

    return (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10")


def compile_runtime(mode: Mode) -> list[Path]:
    return compile_all((ROOT / "csrc" / "emulation").glob("*.cpp"), mode.name, mode.runtime)


def library(mode: Mode = RACES) -> Path:
    """The shared object that registers ``torch.ops.mbf_emulation``."""
    csrc = ROOT / "csrc" / "cuda"
    others = [path for path in csrc.rglob("*.cpp") if path.name != "versions.cpp"]
    with locked():
        objects = [
            *compile_all(csrc.rglob("*.cu"), mode.name, (*mode.kernels, *torch_flags())),
            *compile_all(others, mode.name, (*mode.runtime, *torch_flags())),
            *compile_runtime(mode),
        ]
        return link(sorted(objects), f"mbf_emulation-{mode.name}", ("-shared", *mode.link, *torch_links()))


def program(source: Path, mode: Mode = RACES) -> Path:
    """An executable of one file without torch and the stand-in."""
    with locked():
        objects = [*compile_all([source], mode.name, mode.kernels), *compile_runtime(mode)]
        return link(sorted(objects), f"{source.stem}-{mode.name}", mode.link)


def locked() -> FileLock:
    BUILD.mkdir(parents=True, exist_ok=True)
    return FileLock(BUILD / "lock", timeout=550)
