"""Compile every kernel for GPUs that are not there, and check what the compiler made of it.

``python -m mbf.kernels.compile --target sm_80,sm_90,sm_100`` compiles each kernel in each dtype, rank and form as the
operators launch it on that GPU, prints registers, spills, shared memory, instructions of tensor cores and the widths of
loads and stores, and exits with 1 if one of them breaks a rule:

* no spills, and no more shared memory than a block may have;
* every product of half types on tensor cores;
* loads and stores 16 bytes wide, but of scalars, of tiles that have fewer bytes than 16 for each thread, and of
  matrices whose rows don't allow it.

For gfx942, whose machine code cannot be read here, it says that the kernel compiles, and its shared memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from mbf.kernels._configs import of_capability
from mbf.kernels._launch import interpreted
from mbf.kernels._sass import HALVES, compiled, report, shared_limit
from mbf.kernels._specimens import DTYPES, FORMS, RANKS, specimens
from mbf.kernels._tune import forced
from triton.backends.compiler import GPUTarget

TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass
class Row:
    """One kernel, compiled for one GPU."""

    kernel: str
    dtype: str
    rank: int
    form: str
    target: str
    config: str
    hash: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_cores: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def gpu(target: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton has it."""
    if target.startswith("sm_") and target[3:].isdigit():
        return GPUTarget("cuda", int(target[3:]), 32)
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    raise argparse.ArgumentTypeError(f"target is {target!r}; it must be such as sm_90 or gfx942")


def family_of(target: GPUTarget) -> str:
    """Whose table the launches are from."""
    if target.backend == "hip":
        return "gfx942"
    return of_capability(*divmod(target.arch, 10))


def rows(target: str, dtype: str, rank: int, forms: Sequence[str] = FORMS) -> list[Row]:
    """All that the operators launch with this dtype and rank in these forms; what compiles to the same binary once."""
    found: dict[str, Row] = {}
    chip = gpu(target)
    with forced({"family": family_of(chip)}):
        given = list(specimens([dtype], [rank], forms))
    for one in given:
        meta = one.launch.meta
        shape = f"{meta.get('ROWS', meta.get('BLOCK'))}x{meta.get('COLUMNS', 1)} w{meta.get('num_warps', 4)}"
        row = Row(one.launch.kernel.__name__.removesuffix("_kernel"), dtype, one.rank or rank, one.form, target, shape)
        try:
            binary = compiled(one.launch, chip)
        except Exception as error:
            row.broken.append(f"does not compile: {str(error).strip().splitlines()[0]}")
            found[f"{row.kernel} {row.form}"] = row
            continue
        if binary.hash not in found:
            found[binary.hash] = row
            row.hash = binary.hash
            _judge(row, binary, chip, one.narrow)
    return list(found.values())


def _judge(row: Row, binary: Any, chip: GPUTarget, narrow_rows: bool) -> None:
    row.shared = binary.metadata.shared
    if row.shared > shared_limit(chip):
        row.broken.append(f"{row.shared} bytes of shared memory, of {shared_limit(chip)}")
    if chip.backend == "hip":
        return
    found = report(binary)
    row.registers, row.spills, row.tensor_cores = found.registers, found.spills, found.tensor_cores
    row.loads, row.stores = found.loads, found.stores
    if found.spills:
        row.broken.append(f"spills {found.spills}")
    if row.dtype in HALVES and (found.plain_dots or (found.dots and not found.tensor_cores)):
        row.broken.append("a product of half types without tensor cores")
    if narrow_rows:
        return
    for what, widths, small in (("load", found.loads, found.small_loads), ("store", found.stores, found.small_stores)):
        narrow = sum(count for width, count in widths.items() if width < 128)
        if narrow > small:
            row.broken.append(f"{narrow} {what}s narrower than 16 bytes, of {small} that may be")


def all_rows(
    targets: Sequence[str], dtypes: Sequence[str], ranks: Sequence[int], forms: Sequence[str], jobs: int
) -> Iterator[Row]:
    """As they are finished; a binary that several ranks or dtypes share comes once."""
    seen: set[tuple[str, str]] = set()
    with ProcessPoolExecutor(jobs) as pool:
        tasks = [pool.submit(rows, t, dtype, rank, forms) for t in targets for dtype in dtypes for rank in ranks]
        for task in tasks:
            for row in task.result():
                if not row.hash or (row.target, row.hash) not in seen:
                    seen.add((row.target, row.hash))
                    yield row


def line(row: Row) -> str:
    widths = [" ".join(f"{width}:{count}" for width, count in part.items()) for part in (row.loads, row.stores)]
    return (
        f"{row.target:7s} {row.kernel:21s} {row.dtype:13s} r{row.rank:<4d} {row.form:12s} {row.config:12s} "
        f"{row.registers:4d} {row.spills:6d} {row.shared:7d} {row.tensor_cores:6d}  {widths[0]:20s} {widths[1]:16s}"
        f"{'  BROKEN: ' + '; '.join(row.broken) if row.broken else ''}"
    ).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mbf.kernels.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", default=",".join(TARGETS), help="sm_80, sm_90, sm_100, gfx942 and others, commas between them")
    add("--dtype", action="append", choices=[*DTYPES], help="of A and B, on that of x; repeatable (default: all)")
    add("--rank", action="append", type=int, choices=RANKS, help="repeatable (default: all)")
    add("--form", action="append", choices=FORMS, help="repeatable (default: all)")
    add("--jobs", type=int, default=2, help="processes that compile (default: 2)")
    add("--json", action="store_true", help="print a list of objects instead of a table")
    args = parser.parse_args(argv)
    targets = args.target.split(",")
    try:
        for target in targets:
            gpu(target)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if interpreted():
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled; unset it")
    started, found = time.monotonic(), []
    if not args.json:
        print(
            f"{'target':7s} {'kernel':21s} {'dtype':13s} {'rank':5s} {'form':12s} {'tile':12s} "
            f"{'regs':>4s} {'spills':>6s} {'shared':>7s} {'tensor':>6s}  {'loads, bits:n':20s} stores"
        )
    for row in all_rows(targets, args.dtype or [*DTYPES], args.rank or RANKS, args.form or FORMS, args.jobs):
        found.append(row)
        if not args.json:
            print(line(row), flush=True)
    broken = [row for row in found if row.broken]
    if args.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        print(f"{len(found)} binaries in {time.monotonic() - started:.0f} s, {len(broken)} of them against the rules")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
