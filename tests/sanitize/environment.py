"""Processes under the sanitizers, and their reports of leaks."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "build/sanitize/mbf/_C.abi3.so"
OURS = ("/csrc/", str(EXTENSION))  # what frames of the extension are named by, with symbols and without
ADDRESSES = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024"
# By frame pointers, which the extension has: the tables of the unwinder would take minutes for what torch allocates
# while it is imported. tests/sanitize/test_memory.py sees the tensors that torch allocates for the extension.
LEAKS = "detect_leaks=1:malloc_context_size=20:allocator_may_return_null=1:max_allocation_size_mb=1024"


def flags() -> list[str]:
    """Those of the extension, from setup.py, which cannot be imported without being run."""
    text = re.search(r"^SANITIZER_FLAGS = \((.*?)^\)", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert text is not None
    return re.findall(r'"(-f[^"]+)"', text[1])


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def preloaded() -> str:
    """The sanitizers' library, which must be the first of the process, and libstdc++, which it looks for its exceptions
    in."""
    ask = [compiler(), "-print-file-name=libasan.so"], [compiler(), "-print-file-name=libstdc++.so"]
    return " ".join(subprocess.check_output(one, text=True).strip() for one in ask)


def environment(options: str, **more: str) -> dict[str, str]:
    """For a Python whose mbf loads the sanitized extension."""
    return os.environ | {
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LD_PRELOAD": preloaded(),
        "MBF_NATIVE": str(EXTENSION),
        **more,
    }


def leaks_of(report: str, *marks: str) -> list[str]:
    """The leaks of LeakSanitizer's ``report`` in whose stacks one of ``marks`` is: a source file or a library of ours.

    Python and torch have leaks of their own, and are left alone.
    """
    found = re.split(r"\n(?=(?:Direct|Indirect) leak of )", report)[1:]
    stacks = [leak.split("\n\n")[0].strip() for leak in found]
    return [stack for stack in stacks if any(mark in stack for mark in marks)]
