"""What this installation has: versions, the compiled extension, the machine, its GPUs, the cache."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mbf.ops import native_status
from mbf.ops._cuda import cuda_status
from mbf.ops._gpu import obstacle
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
    found = gpus()
    return {
        "torch is built for CUDA": torch.version.cuda,
        "torch sees": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "nvidia-smi sees": [f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory}" for gpu in found],
        "driver": found[0].driver if found else None,
        "clocks": [gpu.clocks for gpu in found],
        "nvcc": shutil.which("nvcc"),
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "Triton kernels": _triton_kernels(),
        "CUDA kernels": cuda_status().reason,
    }


class Gpu(NamedTuple):
    """A GPU in the words of nvidia-smi."""

    name: str
    capability: str
    memory: str
    driver: str
    clocks: str


_QUERY = (
    *("name", "compute_cap", "memory.total", "driver_version"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit"),
)


def gpus(uuid: str | None = None) -> list[Gpu]:
    """The GPUs that nvidia-smi lists, or that of ``uuid``; none where there is no nvidia-smi or it fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    if uuid is not None:
        command.append(f"--id={uuid}")
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_QUERY):
            continue
        name, capability, memory, driver, sm, max_sm, mem, max_mem, power = values
        clocks = f"SM {sm} of {max_sm}, memory {mem} of {max_mem}, power limit {power}"
        found.append(Gpu(name, capability, memory, driver, clocks))
    return found


def _triton_kernels() -> str:
    """Whether the kernels can be used, said here and not in a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = obstacle()
    return f"cannot be used: {reason}" if reason else "can serve a GPU"


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
