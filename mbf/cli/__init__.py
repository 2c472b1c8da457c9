"""The command ``mbf``: parses and prints; what it does is in ``mbf.run``, ``mbf.report`` and ``mbf.continual``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The entry point; without the packages of the command line one line says what to install."""
    # The commands draw their own bars; those of transformers and the hub would run through them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from mbf.cli.app import app
    except KeyboardInterrupt:  # what is imported takes seconds; later ones are the commands'
        print("mbf: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "mbf":
            raise
        print(f'mbf: the command line needs the package {error.name}: pip install "mbf[run]"', file=sys.stderr)
        sys.exit(2)
    app()
