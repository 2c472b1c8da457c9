"""Functions run by several processes of one gloo group, on this machine."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that imported everything forks the processes: none pays for the imports again.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["mbf.run.workbench", "mbf.run.cell", "datasets", "tests.continual.tiny"])
_TIMEOUT = 240


def together(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """What ``function(*arguments)`` returns on each process, by rank; an exception of any of them is raised here.

    A single process is none of a group.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = _PROCESSES.SimpleQueue()
        store = Path(folder) / "store"
        members = [
            _PROCESSES.Process(target=_member, args=(rank, processes, store, queue, function, arguments), daemon=True)
            for rank in range(processes)
        ]
        for member in members:
            member.start()
        results: dict[int, Any] = {}
        try:
            for _ in members:
                rank, result, error = _receive(queue, members)
                if error is not None:
                    raise AssertionError(f"process {rank}:\n{error}")
                results[rank] = torch.load(io.BytesIO(result), weights_only=False)
        finally:
            for member in members:
                member.join(5 if len(results) == processes else 0)
                member.kill()
        return [results[rank] for rank in range(processes)]


def _receive(queue: Any, members: list[Any]) -> tuple[int, Any, str | None]:
    if not queue._reader.poll(_TIMEOUT):
        states = [member.exitcode for member in members]
        raise AssertionError(f"no answer within {_TIMEOUT} s; exit codes {states}")
    return queue.get()


def _member(rank: int, size: int, store: Path, queue: Any, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        # By value: a tensor in shared memory is gone with the process that made it.
        result = io.BytesIO()
        torch.save(function(*arguments), result)
        queue.put((rank, result.getvalue(), None))
        if size > 1:
            dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
