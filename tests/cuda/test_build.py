"""The kernels as nvcc compiles them, where there is an nvcc: without warnings, without spills, on the stable ABI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mbf.ops import _cuda

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = sorted(path.relative_to(ROOT / "csrc" / "cuda").as_posix() for path in (ROOT / "csrc" / "cuda").rglob("*.cu"))

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, the CUDA compiler, and there is none here")


class Kernel(NamedTuple):
    name: str
    architecture: str
    spilled: int  # bytes stored
    registers: int


def kernels_of(report: str) -> list[Kernel]:
    """What ptxas says of each kernel with -v."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return [Kernel(name, arch, int(spilled), int(registers)) for name, arch, spilled, registers in found]


@pytest.fixture(scope="session")
def built() -> Path:
    """``_cuda.abi3.so`` by setup.py's own rule, which compiles what changed since it last did."""
    from filelock import FileLock

    folder = ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder / "lib")]
    environment = {**os.environ, "MBF_BUILD_CPU": "0", "MBF_BUILD_CUDA": "1"}
    with FileLock(folder / "lock"):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "lib" / "mbf" / "_cuda.abi3.so"


def report_of(built: Path, source: str) -> str:
    (log,) = (ROOT / "build" / "cuda").glob(f"{Path(source).stem}-*.log")
    return log.read_text()


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_and_nothing_is_warned_of(built, source):
    report = report_of(built, source)
    assert [line for line in report.splitlines() if "warning" in line.lower()] == []
    kernels = kernels_of(report)
    assert len(kernels) == report.count("Compiling entry function")
    assert {kernel.architecture for kernel in kernels} in (set(ARCHITECTURES), set())  # some only call others' kernels
    for architecture in ARCHITECTURES:
        registers = [kernel.registers for kernel in kernels if kernel.architecture == architecture]
        print(f"{source} for {architecture}: {len(registers)} kernels, at most {max(registers, default=0)} registers")
    assert [kernel for kernel in kernels if kernel.spilled] == []


@needs_nvcc
def test_both_architectures_have_every_kernel(built):
    kernels = [kernel for source in SOURCES for kernel in kernels_of(report_of(built, source))]
    of_each = [{kernel.name for kernel in kernels if kernel.architecture == name} for name in ARCHITECTURES]
    assert of_each[0] == of_each[1] and len(of_each[0]) > 40


def test_a_spill_would_be_noticed():
    report = """ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 8 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers
"""
    assert kernels_of(report) == [("_Z1av", "sm_80", 8, 40), ("_Z1bv", "sm_90a", 0, 30)]


@needs_nvcc
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_extension_uses_stable_symbols_only(built):
    text = subprocess.check_output(["nm", "-D", "--undefined-only", "--demangle", str(built)], text=True)
    symbols = {line.split()[-1] for line in text.splitlines()}
    assert not re.findall(r".*\b(?:at|c10|torch)::.*", text), "C++ symbols of libtorch change from release to release"
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]
    assert not [symbol for symbol in symbols if symbol.startswith(("cuda", "__cuda"))], "the CUDA runtime is not inside"
    assert {"torch_library_impl", "aoti_torch_get_sizes", "aoti_torch_get_current_cuda_stream"} <= symbols


@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf of binutils")
def test_the_extension_needs_torch_and_no_toolkit(built):
    text = subprocess.check_output(["readelf", "-d", str(built)], text=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2", "librt.so.1"}
    assert needed - system - {"libpthread.so.0", "libdl.so.2"} == {"libtorch_cuda.so", "libtorch_cpu.so", "libc10.so"}
    assert "RUNPATH" not in text and "RPATH" not in text


@needs_nvcc
def test_it_loads_where_torch_has_its_cuda_side(built):
    """The stub that it was linked with stands in for that; without a driver it is not to be used."""
    code = f"""
import torch
from pathlib import Path
from mbf.ops import _cuda
_cuda._folder = lambda: Path({str(built.parent)!r})
torch.version.cuda = "13.0"
status = _cuda.cuda_status()
print(status.loaded, status.path, status.reason)
print(torch.ops.mbf_cuda.merge_.default._schema)
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(ROOT / "build" / "cuda"), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, cwd=ROOT).splitlines()
    usable, path, reason = said[0].split(" ", 2)
    assert path == str(built)
    assert (usable, reason) == ("True", "loaded") or reason.startswith(("built, but there is no", "built for CUDA "))
    assert said[1] == "mbf_cuda::merge_(Tensor(a!)[] merged, Tensor[] finetuned, Tensor weight) -> ()"


@pytest.fixture
def fresh():
    """A status that is not remembered from before, nor after."""
    _cuda.cuda_status.cache_clear()
    yield
    _cuda.cuda_status.cache_clear()


def test_the_status_says_why_it_is_not_loaded(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(_cuda, "_folder", lambda: tmp_path)
    assert _cuda.cuda_status() == (False, None, _cuda.cuda_status().reason)
    assert "MBF_BUILD_CUDA" in _cuda.cuda_status().reason and _cuda.library() is None

    broken = tmp_path / "_cuda.abi3.so"
    broken.write_bytes(b"no library")
    _cuda.cuda_status.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _cuda.cuda_status() == (False, broken, f"built, but torch {torch.__version__} has no CUDA")

    _cuda.cuda_status.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _cuda.cuda_status().path == broken and "does not load with torch" in _cuda.cuda_status().reason

    _cuda.cuda_status.cache_clear()
    monkeypatch.setenv("MBF_NO_NATIVE", "1")
    assert _cuda.cuda_status() == (False, None, "switched off by MBF_NO_NATIVE") and _cuda.library() is None
