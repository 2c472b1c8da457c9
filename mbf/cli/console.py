"""Where the commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys

from rich.console import Console

# A width for files and pipes, in which nothing is cut that a terminal would show.
_FILE_WIDTH = 200


def out() -> Console:
    """The console of results. Made anew each time: sys.stdout may have been replaced since."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def err(line: str) -> None:
    """One line to stderr, as it is: paths and messages are not rich's markup."""
    print(line, file=sys.stderr)
