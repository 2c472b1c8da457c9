"""Running what cannot run in this process, where kernels are interpreted: code that compiles or traces them."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python arguments`` with kernels that are compiled, on one thread."""
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=surroundings, timeout=550)
