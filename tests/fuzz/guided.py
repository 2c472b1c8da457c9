"""``python -m tests.fuzz.guided READER [--inputs 1000000]``: Atheris (libFuzzer for Python) on a target of the harness.

mbf's modules are instrumented while they are imported, and inputs that reach new branches are kept and built upon, in
``build/fuzz/READER``, from one call to the next. A find ends the call; its input is kept beside the corpus.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.fuzz.harness import LONGEST, WORDS, names, target
from tests.fuzz.targets._files import folder

SECONDS = 30  # for one input
MEMORY = 2048  # MiB of the process


def main() -> None:
    import atheris

    parser = argparse.ArgumentParser("python -m tests.fuzz.guided", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reader", choices=names())
    parser.add_argument("--inputs", type=int, default=1_000_000, help="default 1000000")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer; default 1")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="and finds; default build/fuzz")
    arguments = parser.parse_args()
    with atheris.instrument_imports(include=["mbf"]):
        module = target(arguments.reader)
    corpus = arguments.corpus / arguments.reader
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(module.seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    words = corpus.with_suffix(".words")
    words.write_text("".join(f'"{escaped(word)}"\n' for word in [*WORDS, *getattr(module, "WORDS", [])]))
    options = {
        "runs": arguments.inputs,
        "seed": arguments.seed,
        "max_len": LONGEST,
        "timeout": SECONDS,
        "rss_limit_mb": MEMORY,
        "dict": words,
        "artifact_prefix": f"{corpus}-",
        "print_final_stats": 1,
    }
    folder()
    child = os.fork()
    if child:  # what is left to do when the child is gone, which libFuzzer ends with no clearing up: folder's atexit
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)], module.one)
    atheris.Fuzz()


def escaped(word: bytes) -> str:
    """As a dictionary of libFuzzer writes it."""
    return "".join(f"\\x{byte:02X}" for byte in word)


if __name__ == "__main__":
    main()
