"""Builds what pyproject.toml cannot say: ``kernels/`` as ``mbf.kernels``, and the compiled extension ``mbf._C``.

The extension uses only torch's stable ABI of 2.10 and nothing of Python, so one wheel serves every later torch and
every Python from 3.10. It needs a C++ compiler; without one mbf installs all the same and computes with plain torch.
``MBF_BUILD_CPU=0`` leaves the extension out, ``MBF_BUILD_CPU=1`` makes a missing compiler an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's own headers have them
    "-Wno-maybe-uninitialized",  # GCC 12 warns of every std::optional
    "-Wno-psabi",  # vectors are passed between inlined functions only
)
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10.0, in the layout of torch/headeronly/version.h


def obstacle() -> str | None:
    """Why the extension cannot be built here, or None."""
    try:
        import torch
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError:
        return "torch cannot be imported by the build; install it first and use --no-build-isolation"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n")
        command = [get_cxx_compiler(), str(source), "-o", str(source.with_suffix(""))]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return f"the C++ compiler {command[0]!r} does not work; install one or set CXX"
    return None


def extensions() -> list[Extension]:
    """``[mbf._C]``, or nothing, with a line that says why, where it is not wanted or cannot be built."""
    wanted = os.environ.get("MBF_BUILD_CPU", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MBF_BUILD_CPU is {wanted!r}; set it to 0 (leave out) or 1 (require), or leave it unset")
    reason = "MBF_BUILD_CPU=0" if wanted == "0" else obstacle()
    if reason is None:
        return [native()]
    if wanted == "1":
        raise SystemExit(f"mbf: MBF_BUILD_CPU=1, but the compiled extension cannot be built: {reason}")
    print(f"mbf: installing without the compiled extension: {reason}", file=sys.stderr)
    return []


def native() -> Extension:
    """The one shared object ``mbf/_C.abi3.so`` of all of ``csrc/``'s C++."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "mbf._C",
        ["csrc/ops.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").rglob("*.cpp"))],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").rglob("*.h")),
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", *WARNINGS],
    )


def build_commands(modules: list[Extension]) -> dict[str, type]:
    if not modules:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


modules = extensions()
setup(
    packages=[*find_packages(include=["mbf", "mbf.*"]), "mbf.kernels"],
    package_dir={"mbf.kernels": "kernels"},
    include_package_data=True,
    ext_modules=modules,
    cmdclass=build_commands(modules),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
