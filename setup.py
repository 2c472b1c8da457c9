"""Builds what pyproject.toml cannot say: ``kernels/`` as ``mbf.kernels``, and the compiled extensions.

``mbf._C`` (C++, ``csrc/cpu``) needs a C++ compiler and ``mbf._cuda`` (CUDA C++, ``csrc/cuda``) nvcc 12 or newer, but no
GPU and no torch with CUDA. Both use only torch's stable ABI of 2.10 and nothing of Python, so one wheel serves every
later torch and every Python from 3.10, and, by ``csrc/portable.cpp``, every Linux that torch's own wheels serve.
Without a compiler mbf installs all the same, and computes with plain torch.

``MBF_BUILD_CPU=0`` leaves ``mbf._C`` out, ``MBF_BUILD_CPU=1`` makes a missing compiler an error.
``MBF_BUILD_CUDA=0`` leaves ``mbf._cuda`` out, ``MBF_BUILD_CUDA=1`` builds it or fails. ``auto``, the default, builds it
into wheels where there is an nvcc that works. It takes a minute or more, so an editable install has none unless told.
``MBF_SANITIZE=1`` builds ``mbf._C`` for AddressSanitizer and UBSan, into build/sanitize and never in its place; ``make
sanitize`` has mbf load it by ``MBF_NATIVE``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's own headers have them
    "-Wno-maybe-uninitialized",  # GCC 12 warns of every std::optional
    "-Wno-psabi",  # vectors are passed between inlined functions only
)
SANITIZE = os.environ.get("MBF_SANITIZE", "") not in ("", "0")
SANITIZER_FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10.0, in the layout of torch/headeronly/version.h

NVCC_FLAGS = (
    *("-std=c++20", "-O3"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90a,code=sm_90a"),
    *("-gencode", "arch=compute_90,code=compute_90"),  # what is newer compiles this when it loads it
    *("-Xptxas", "-v"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter"),
)


def torch_obstacle() -> str | None:
    """Why nothing can be built against this torch, or None."""
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError:
        return "torch cannot be imported by the build; install it first and use --no-build-isolation"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None


def obstacle() -> str | None:
    """Why ``mbf._C`` cannot be built here, or None."""
    if reason := torch_obstacle():
        return reason
    from torch.utils.cpp_extension import get_cxx_compiler

    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n")
        command = [get_cxx_compiler(), str(source), "-o", str(source.with_suffix(""))]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return f"the C++ compiler {command[0]!r} does not work; install one or set CXX"
    return None


def nvcc() -> str:
    """The CUDA compiler: that of CUDA_HOME, or of PATH, or where it is usually installed."""
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def cuda_obstacle() -> str | None:
    """Why ``mbf._cuda`` cannot be built here, or None."""
    if reason := torch_obstacle():
        return reason
    try:
        version = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"the CUDA compiler {nvcc()!r} does not work; install a CUDA toolkit or set CUDA_HOME"
    release = re.search(r"release (\d+)", version)
    if release is None or int(release[1]) < 12:
        return f"{nvcc()} is not of CUDA 12 or newer"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cu")
        source.write_text("#include <vector>\n__global__ void probe() {}\n")
        command = [nvcc(), "-std=c++20", "-arch=sm_80", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return f"{nvcc()} cannot compile; its host compiler may be missing or not suit it"
    return None


def requested(variable: str, what: str, why_not: Callable[[], str | None]) -> bool:
    """Whether an extension is to be built, as ``variable`` says; a line says why not."""
    wanted = os.environ.get(variable, "")
    if wanted not in ("", "auto", "0", "1"):
        raise SystemExit(f"{variable} is {wanted!r}; set it to 0 (leave out) or 1 (require), or leave it unset (auto)")
    reason = f"{variable}=0" if wanted == "0" else why_not()
    if reason is None:
        return True
    if wanted == "1":
        raise SystemExit(f"mbf: {variable}=1, but {what} cannot be built: {reason}")
    print(f"mbf: installing without {what}: {reason}", file=sys.stderr)
    return False


def extensions() -> list[Extension]:
    """``mbf._C`` and ``mbf._cuda``, as far as they are wanted and can be built."""
    found = [native()] if requested("MBF_BUILD_CPU", "the compiled extension", obstacle) else []
    if os.environ.get("MBF_BUILD_CUDA", "auto") not in ("", "auto") or "bdist_wheel" in sys.argv:
        found += [cuda()] if requested("MBF_BUILD_CUDA", "the CUDA extension", cuda_obstacle) else []
    return found


def portable(*flags: str) -> list[str]:
    """``flags`` and those with which ``csrc/portable.cpp`` takes effect, for the linker; GNU's, so on Linux only."""
    if not sys.platform.startswith("linux"):
        return []
    lines = re.findall(r"^wrap \S+, (.+)$", (ROOT / "csrc/portable.cpp").read_text(), re.MULTILINE)
    names = ", ".join(lines).split(", ") if sysconfig.get_platform() == "linux-x86_64" else []
    return [*flags, f"--version-script={ROOT / 'csrc/portable.map'}", *(f"--wrap={name}" for name in names)]


def native() -> Extension:
    """The one shared object ``mbf/_C.abi3.so`` of all of ``csrc/``'s C++."""
    from torch.utils.cpp_extension import CppExtension

    optimise = ("-O1", "-g1", *SANITIZER_FLAGS) if SANITIZE else ("-O3", "-g0")
    of_cpu = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").rglob("*.cpp"))
    return CppExtension(
        "mbf._C",
        ["csrc/ops.cpp", "csrc/portable.cpp", *of_cpu],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").rglob("*.h")),
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[*optimise, "-fvisibility=hidden", *WARNINGS],
        extra_link_args=[
            *(SANITIZER_FLAGS if SANITIZE else ()),
            *(f"-Wl,{flag}" for flag in portable("--gc-sections")),
        ],
    )


def cuda() -> Extension:
    """``mbf/_cuda.abi3.so`` of ``csrc/cuda``, whose emulated.cpp is for the stand-in without a GPU."""
    sources = [*(ROOT / "csrc/cuda").rglob("*.cu"), *(ROOT / "csrc/cuda").rglob("*.cpp"), ROOT / "csrc/portable.cpp"]
    return Extension(
        "mbf._cuda",
        sorted(str(path.relative_to(ROOT)) for path in sources if path.name != "emulated.cpp"),
        py_limited_api=True,
    )


def run(command: list[str]) -> str:
    """Run a compiler; returns what it says."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mbf: this failed: {' '.join(command)}\n{done.stdout}")
    return done.stdout


def compile_cuda(source: str, folder: Path) -> Path:
    """The object of ``source``, and beside it, in a .log, what nvcc said; unless they are there already."""
    import torch

    include = Path(torch.__file__).parent / "include"
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA"]
    command = [nvcc(), *NVCC_FLAGS, *defines, "-isystem", str(include), "-c", source]
    digest = hashlib.sha256(" ".join([torch.__version__, *command]).encode())
    for path in [*sorted((ROOT / "csrc/cuda").rglob("*.*h")), ROOT / source]:
        digest.update(path.read_bytes())
    target = folder / f"{Path(source).stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        for old in folder.glob(f"{Path(source).stem}-*"):
            old.unlink()
        said = run([*command, "-o", str(target.with_suffix(".partial"))])
        target.with_suffix(".log").write_text(said)
        target.with_suffix(".partial").rename(target)
    return target


def link_cuda(objects: list[Path], target: Path, folder: Path) -> None:
    """Link ``target`` with the CUDA runtime inside it and nothing undefined.

    torch's own library of its CUDA side is not there where torch is built for the CPU; one in its name stands in.
    """
    import torch

    stub = folder / "libtorch_cuda.so"
    source = folder / "stub.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    shared = [nvcc(), "-shared", "-Xcompiler", "-fPIC"]
    run([*shared, "-cudart", "none", str(source), "-Xlinker", f"-soname={stub.name}", "-o", str(stub)])
    libraries = [f"-L{folder}", "-ltorch_cuda", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    strict = ",".join(portable("--no-as-needed", "-z", "defs", "--exclude-libs", "ALL"))
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*shared, *map(str, objects), "-Xlinker", strict, *libraries, "-o", str(target)])


class AnyPython(bdist_wheel):
    """Tags a wheel whose shared objects know nothing of Python: for every one, free-threaded ones included."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def build_commands(modules: list[Extension]) -> dict[str, type]:
    if not modules:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's command for C++; nvcc by rules of our own, as torch's refuse where torch itself is without CUDA."""

        def finalize_options(self) -> None:
            if SANITIZE:
                self.inplace = False
                self.build_lib, self.build_temp = str(ROOT / "build/sanitize"), str(ROOT / "build/sanitize/objects")
            super().finalize_options()

        def build_extensions(self) -> None:
            ours = [extension for extension in self.extensions if extension.name == "mbf._cuda"]
            self.extensions = [extension for extension in self.extensions if extension not in ours]
            if self.extensions:
                super().build_extensions()
            for extension in ours:
                self.build_cuda(extension)
            self.extensions += ours

        def build_cuda(self, extension: Extension) -> None:
            folder = ROOT / "build" / "cuda"
            folder.mkdir(parents=True, exist_ok=True)
            jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(lambda source: compile_cuda(source, folder), extension.sources))
            link_cuda(objects, Path(self.get_ext_fullpath(extension.name)), folder)

    return {"build_ext": Build, "bdist_wheel": AnyPython}


modules = extensions()
setup(
    packages=[*find_packages(include=["mbf", "mbf.*"]), "mbf.kernels"],
    package_dir={"mbf.kernels": "kernels"},
    include_package_data=True,
    ext_modules=modules,
    cmdclass=build_commands(modules),
)
