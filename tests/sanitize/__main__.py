"""``make sanitize``: the extension built by ``MBF_SANITIZE=1`` under its sanitizers, in three parts:

* tests of the operators, quick ones, and those of bad calls;
* random calls of every raw operator (``tests.sanitize.fuzz``), once for each instruction set that the processor has;
* some of these calls again with LeakSanitizer, of whose leaks those count that the extension has a part in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.sanitize.environment import ADDRESSES, EXTENSION, LEAKS, OURS, ROOT, environment, leaks_of

TESTS = ("test_bad_calls", "test_task_boundary", "test_frozen_linear", "test_philox")
QUICK = "not compile and not export and not drawn and not opcheck and not layers_size"
LOG = ROOT / "build/sanitize/last-call"
# As ATEN_CPU_CAPABILITY names them; the first is whatever the processor has, AMX included.
INSTRUCTION_SETS = {"the best": {}, "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"}, "none": {"ATEN_CPU_CAPABILITY": "default"}}


def run(arguments: list[str], options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A Python under the sanitizers, whose output goes on as it comes but for what LeakSanitizer says."""
    errors = subprocess.PIPE if options == LEAKS else None
    return subprocess.run(
        [sys.executable, *arguments], env=environment(options, **more), cwd=ROOT, stderr=errors, text=True, check=False
    )


def test(options: argparse.Namespace) -> bool:
    files = [f"tests/ops/{name}.py" for name in TESTS]
    arguments = ["-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-k", QUICK, *files]
    return run(arguments, ADDRESSES).returncode == 0


def fuzz(options: argparse.Namespace) -> bool:
    good = True
    for name, capability in INSTRUCTION_SETS.items():
        print(f"instruction set: {name}", flush=True)
        arguments = ["--calls", str(options.calls), "--seed", str(options.seed), "--log", str(LOG)]
        done = run(["-m", "tests.sanitize.fuzz", *arguments], ADDRESSES, **capability)
        if done.returncode:
            last = LOG.read_text().strip() if LOG.exists() else "none"
            print(f"failed; the last call: {' '.join(f'{k}={v}' for k, v in capability.items())} {last}", flush=True)
            good = False
    return good


def leaks(options: argparse.Namespace) -> bool:
    calls = max(1, options.calls // 10)
    done = run(["-m", "tests.sanitize.fuzz", "--calls", str(calls), "--seed", str(options.seed)], LEAKS)
    found = leaks_of(done.stderr, *OURS)
    looked = "LeakSanitizer" in done.stderr and "fatal error" not in done.stderr
    print("\n\n".join(found) if found else f"leaks of the extension: {'none' if looked else 'LeakSanitizer failed'}")
    if not looked:
        print(done.stderr[-3000:])
    return looked and not found


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {"test": test, "fuzz": fuzz, "leaks": leaks}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=100, help="random calls of each operator and instruction set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, action="append", help="one part alone; may be repeated")
    options = parser.parse_args()
    if not EXTENSION.exists():
        print(f"{Path(EXTENSION).relative_to(ROOT)} is not built: MBF_SANITIZE=1 python setup.py build_ext")
        return 1
    failed = []
    for name in options.part or PARTS:
        begun = time.perf_counter()
        good = PARTS[name](options)
        print(f"{name}: {'clean' if good else 'NOT CLEAN'}, {time.perf_counter() - begun:.0f} s", flush=True)
        failed += [] if good else [name]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
