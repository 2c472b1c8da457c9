"""Compile a launch for a GPU that is not there, and read the result: registers, spills, instructions, widths."""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from mbf.kernels._launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages")
_SHARED = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}  # KiB that a block may have; others 99
HALVES = ("bf16", "fp16")  # dtypes of which all products are of half types
_TENSOR_CORES = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.M)
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")


class Report(NamedTuple):
    """What the compiler made of a launch.

    Attributes:
        registers: of a thread.
        spills: bytes of a thread's stack, and instructions that read or write it.
        shared: bytes of a block's shared memory.
        dots: products in Triton's last form, and how many of them are left to plain multiply-adds.
        tensor_cores: their instructions.
        loads: instructions that read global memory, by bits.
        stores: the same of writing.
        small_loads: how many of the instructions may be narrow: one for a scalar or a matrix with fewer bytes than 16
            for each thread, 16 for such a vector, of which every thread reads the parts that it needs.
        small_stores: the same of stores.
    """

    registers: int
    spills: int
    shared: int
    dots: int
    plain_dots: int
    tensor_cores: int
    loads: dict[int, int]
    stores: dict[int, int]
    small_loads: int
    small_stores: int


def shared_limit(target: GPUTarget) -> int:
    """Bytes of shared memory that a block may have."""
    return 1024 * (64 if target.backend == "hip" else _SHARED.get(target.arch, 99))


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """``triton.compile`` of what the launch would compile, pointers being aligned to 16 bytes as torch's are."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for n, parameter in enumerate(kernel.params):
        name = parameter.name
        value = launch.arguments[n] if n < len(launch.arguments) else launch.meta[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(n,)] = [["tt.divisibility", 16]]
    options = {name: launch.meta[name] for name in _OPTIONS if name in launch.meta}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def report(found: Any) -> Report:
    """Of a kernel compiled for an NVIDIA GPU, from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(found.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        instructions = Counter(_INSTRUCTION.findall(_cuobjdump("-sass", cubin)))
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if numbers is None or not instructions:
        raise RuntimeError(f"cuobjdump printed what cannot be read; take another triton: {usage[:500]!r}")
    registers, stack, _, local = map(int, numbers.groups())
    on_stack = sum(count for name, count in instructions.items() if name.startswith(("LDL", "STL")))
    ttgir = found.asm["ttgir"]
    dots = re.findall(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma)\b.*", ttgir)
    threads = 32 * found.metadata.num_warps
    return Report(
        registers,
        stack + local + on_stack,
        found.metadata.shared,
        len(dots),
        sum("tt.dot" in dot and "#blocked" in dot.rsplit("->", 1)[-1] for dot in dots),
        sum(count for name, count in instructions.items() if _TENSOR_CORES.match(name)),
        _by_width(instructions, ("LDG", "LDGSTS")),
        _by_width(instructions, ("STG",)),
        _small(ttgir, r"tt\.load|ttg\.async_copy_global_to_local", threads),
        _small(ttgir, r"tt\.store", threads),
    )


def _small(ttgir: str, operators: str, threads: int) -> int:
    """How many instructions of these operators may move fewer bytes than 16 for each thread."""
    small = 0
    for line in re.findall(rf"(?:{operators})\b.*", ttgir):
        tile = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<[a-z]*(\d+)>", line)
        if tile is None:
            small += 1
            continue
        extents = [int(extent) for extent in tile[1].rstrip("x").split("x")]
        if math.prod(extents) * max(8, int(tile[2])) // 8 < 16 * threads:
            small += 16 if len(extents) == 1 else 1
    return small


def _by_width(instructions: Counter[str], names: tuple[str, ...]) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for name, count in instructions.items():
        if name.split(".")[0] in names:
            width = _WIDTH.search(name)
            widths[int(width[1].strip("US")) if width else 32] += count
    return dict(sorted(widths.items()))


def _cuobjdump(option: str, file: Path) -> str:
    """Output of the cuobjdump in Triton's wheel, which finds its nvdisasm on the PATH."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tools / "cuobjdump", option, file],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout
