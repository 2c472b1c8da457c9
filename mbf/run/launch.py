"""``--nproc``: a command again, in several processes of this machine, by torchrun's own engine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence


class LaunchError(RuntimeError):
    """A process ended without having said why."""


def member() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def main_process() -> bool:
    """Whether this process is the one of them that reports."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``python -m mbf *arguments`` in ``processes`` processes and wait for them.

    Where OMP_NUM_THREADS is not set, each gets its share of the cores.

    Returns:
        The exit status: 0, or that of the process that failed first, which has reported its error.

    Raises:
        LaunchError: a signal ended a process.
        KeyboardInterrupt: this process was interrupted.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It would tell of every failure once more, with tracebacks of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mbf", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise LaunchError(
                f"process {rank} of {processes} was ended by {name}; mbf resume goes on with the run"
            ) from None
        return failure.exitcode
    except SignalException:
        raise KeyboardInterrupt from None
    return 0
