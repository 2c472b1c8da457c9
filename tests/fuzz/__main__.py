"""``python -m tests.fuzz READER [--inputs 1000000] [--seed S]``: many wrong inputs for one reader, or for all."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.harness import SECONDS, TooSlow, inputs, limit, names, target


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("reader", choices=[*names(), "all"])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each reader; default 1000000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finds", type=Path, default=Path("build/fuzz"), help="where inputs that fail are kept")
    arguments = parser.parse_args()
    readers = names() if arguments.reader == "all" else [arguments.reader]
    return int(any([fuzz(name, arguments.inputs, arguments.seed, arguments.finds) for name in readers]))


def fuzz(name: str, count: int, seed: int, finds: Path, most: int = 20, seconds: float = SECONDS) -> int:
    """The number of inputs on which the reader failed or took too long, at most ``most``; each is kept in ``finds``."""
    module, failures, done = target(name), 0, 0
    start = time.perf_counter()
    for done, data in enumerate(inputs(module, count, seed), 1):
        try:
            with limit(seconds):
                module.one(data)
        except (Exception, TooSlow):
            failures += 1
            finds.mkdir(parents=True, exist_ok=True)
            kept = finds / f"{name}-{seed}-{done}"
            kept.write_bytes(data)
            print(f"{name}: input {done} failed and is kept as {kept}\n{traceback.format_exc()}", flush=True)
            if failures == most:
                break
        if done % 50_000 == 0:
            print(f"{name}: {done} inputs, {done / (time.perf_counter() - start):.0f}/s", flush=True)
    print(f"{name}: {done} inputs, {done / (time.perf_counter() - start):.0f}/s, {failures} failures", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
