"""The processes of a run: one, or those that torchrun, ``accelerate launch`` or ``mbf run --nproc`` started.

They all compute; the main one alone writes, shows progress and reports errors. What one of them cannot go on from ends
all of them, so that nobody is left waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

T = TypeVar("T")

# A launcher stops all processes when the first ends, and that should be the one that has an error to report.
_GRACE = 5.0


class Processes:
    """Those of this run.

    Args:
        sharded: keep the model in parts, one a process (FSDP2), instead of a replica each (DDP). ``accelerate launch
            --use_fsdp`` asks for the same.

    Attributes:
        device: of this process.
        rank: of this process, from 0.
        size: how many there are.
        sharded: whether they share one model; never with one process.
    """

    def __init__(self, sharded: bool = False) -> None:
        on_cpu = not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu)
        self.device: torch.device = state.device
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.sharded = (sharded or _accelerate_asks()) and self.size > 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def together(self, function: Callable[[], T]) -> T:
        """``function()`` of this process, once all went well; an error on one of them ends the others quietly."""
        return self._settle(True, function)

    def on_main(self, function: Callable[[], T]) -> T:
        """``function()`` of the main process, on all of them; its error there ends the others quietly."""
        result = self._settle(self.main, function)
        if self.size == 1:
            return result
        box = [result]
        dist.broadcast_object_list(box, src=0, device=self._object_device)
        return box[0]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        if self.size == 1:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu()

    def _settle(self, here: bool, function: Callable[[], T]) -> T:
        result: Any = None
        error: BaseException | None = None
        if here:
            try:
                result = function()
            except Exception as caught:
                if self.size == 1:
                    raise
                error = caught
        if self.size > 1:
            failed: list[Any] = [None] * self.size
            dist.all_gather_object(failed, error is not None)
            if any(failed):
                if error is not None and failed.index(True) == self.rank:
                    raise error
                time.sleep(_GRACE)
                raise SystemExit(1)
        return result

    @property
    def _object_device(self) -> torch.device | None:
        return self.device if self.device.type != "cpu" else None

    def shard(self, model: Any) -> None:
        """Keep the parameters of ``model``, a PEFT model on ``device``, in parts: one FSDP2 unit a decoder layer.

        The base model is the root, so that forward and generate, of it and of PEFT's wrapper, find it.
        """
        from torch.distributed.fsdp import fully_shard

        base: nn.Module = model.get_base_model()
        names = set(getattr(base, "_no_split_modules", None) or [])
        units = [module for module in base.modules() if type(module).__name__ in names]
        for unit in units:
            fully_shard(unit)
        fully_shard(base)


@cache
def _accelerate_asks() -> bool:
    """Whether ``accelerate launch`` wants FSDP. It is not told so again: its own would wrap what is sharded already."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
