"""What this installation has: versions, the compiled extension, the machine, the cache."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mbf.ops import native_status
from mbf.run.versions import versions
from mbf.streams.fetch import cache_dir

# The instruction sets between which kernels choose at run time, as Linux spells them.
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def diagnose() -> dict[str, dict[str, Any]]:
    """Everything that a report of a problem should say, by section.

    Returns:
        section → item → value, JSON-ready. Sizes are in bytes; None is something that is not there.
    """
    return {
        "versions": versions(),
        "compiled extension": _extension(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "cache": _cache(cache_dir()),
    }


def _extension() -> dict[str, Any]:
    status = native_status()
    return {
        "loaded": status.loaded,
        "path": str(status.path) if status.path else None,
        "reason": status.reason,
        "CPU kernels": status.kernels or None,
    }


def _cpu() -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "model": _cpuinfo("model name"),
        "features": [flag for flag in CPU_FLAGS if flag in (_cpuinfo("flags") or _cpuinfo("Features") or "").split()],
        "torch dispatches to": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpuinfo(key: str) -> str | None:
    """The first value of ``key`` in Linux's /proc/cpuinfo; None elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    lines = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)


def _gpu() -> dict[str, Any]:
    return {
        "torch is built for CUDA": torch.version.cuda,
        "driver": shutil.which("nvidia-smi"),
        "nvcc": shutil.which("nvcc"),
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
    }


def _cache(folder: Path) -> dict[str, Any]:
    """Size in bytes of each entry two levels down (``models/<name>``, ``packages/<file>``)."""
    entries = sorted(
        entry for part in folder.glob("*") if part.is_dir() for entry in part.iterdir() if entry.suffix != ".lock"
    )
    return {
        "folder": str(folder),
        "entries": {str(entry.relative_to(folder)): _size(entry) for entry in entries},
    }


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
