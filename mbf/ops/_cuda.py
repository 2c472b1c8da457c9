"""``mbf._cuda``, the CUDA C++ kernels of ``csrc/cuda``: loaded where torch itself has CUDA."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class CudaStatus(NamedTuple):
    """Whether the CUDA extension is loaded, and why not."""

    loaded: bool
    path: Path | None
    reason: str


@cache
def cuda_status() -> CudaStatus:
    """Load ``mbf._cuda`` at the first call; return whether it is there, from where, and otherwise why not.

    ``MBF_NO_NATIVE=1``, set before, switches it off, as it does ``mbf._C``.
    """
    if os.environ.get("MBF_NO_NATIVE", "") not in ("", "0"):
        return CudaStatus(False, None, "switched off by MBF_NO_NATIVE")
    path = next(iter(sorted(_folder().glob("_cuda*.so"))), None)
    if path is None:
        return CudaStatus(False, None, "not built: the install found no working nvcc, or MBF_BUILD_CUDA was not 1")
    if torch.version.cuda is None:
        return CudaStatus(False, path, f"built, but torch {torch.__version__} has no CUDA")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return CudaStatus(False, path, f"does not load with torch {torch.__version__}: {error}")
    runtime, driver = torch.ops.mbf_cuda.versions()
    if driver == 0:
        return CudaStatus(False, path, "built, but there is no CUDA driver")
    if driver // 1000 < runtime // 1000:
        built, found = (f"CUDA {version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
        return CudaStatus(
            False, path, f"built for {built}, but the driver is of {found}: update it, or build with {found}"
        )
    return CudaStatus(True, path, "loaded")


def library() -> Any:
    """``torch.ops.mbf_cuda``, or None where it is not loaded."""
    return torch.ops.mbf_cuda if cuda_status().loaded else None


def _folder() -> Path:
    return Path(__file__).resolve().parents[1]
