"""Several processes that train one adapter, as DDP and FSDP2 do: each begins and ends a task with the same LoRA.

The methods run on each process and compute the same there, as their inputs and random draws are the same; what they
wrote is then taken from the first process all the same, so that no rounding of another machine can drift in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A part in a thousand of a tensor's norm: processes that trained apart differ by more than that, DDP's by nothing.
_TOLERANCE = 1e-3


class Replicas:
    """The processes that train the adapter together.

    Args:
        group: those processes; None is all of torch.distributed, if it is in use, and False this process alone.
    """

    def __init__(self, group: ProcessGroup | Literal[False] | None = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """How many they are."""
        if self._group is False or not dist.is_available() or not dist.is_initialized():
            return 1
        return dist.get_world_size(self._pg)

    @property
    def first(self) -> bool:
        """Whether this process is the one whose values count and that writes files."""
        return self.size == 1 or dist.get_rank(self._pg) == 0

    @property
    def _pg(self) -> ProcessGroup | None:
        return self._group or None

    @property
    def _source(self) -> int:
        return 0 if self._pg is None else dist.get_global_rank(self._pg, 0)

    @contextmanager
    def same_randomness(self, device: torch.device) -> Iterator[None]:
        """Draw inside the block, on every process, what the first one draws; the others' generators are restored."""
        if self.size == 1:
            yield
            return
        gpus = [device] if device.type == "cuda" else []
        states = [[torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]]
        dist.broadcast_object_list(states, src=self._source, group=self._pg)
        with torch.random.fork_rng(devices=gpus, enabled=not self.first):
            if not self.first:
                torch.set_rng_state(states[0][0])
                for gpu, state in zip(gpus, states[0][1:], strict=True):
                    torch.cuda.set_rng_state(state, gpu)
            yield

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Overwrite ``tensors`` with those of the first process: one broadcast a dtype, from memory on ``device``.

        Raises:
            RuntimeError: on every process, where one has tensors of other shapes than the first.
        """
        if self.size == 1:
            return
        self._check_alike(tensors, device)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            here = [tensor for tensor in tensors if tensor.dtype is dtype]
            buffer = torch.cat([tensor.detach().reshape(-1).to(device) for tensor in here])
            dist.broadcast(buffer, src=self._source, group=self._pg)
            if not self.first:
                for tensor, values in zip(here, buffer.split([tensor.numel() for tensor in here]), strict=True):
                    tensor.copy_(values.view_as(tensor))

    def _check_alike(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """A broadcast into other sizes would end the process, or go on with what is shifted."""
        here = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        firsts = [here]
        dist.broadcast_object_list(firsts, src=self._source, group=self._pg)
        others = int(self.total(torch.tensor(float(firsts[0] != here), device=device)))
        if others:
            raise RuntimeError(
                f"{others} of the {self.size} processes that train together made an adapter or state of other shapes "
                "than the first one; give all of them the same method, options and model"
            )

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the processes; it stays as it is."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self._pg)
        return total

    def differing(self, tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        """(index of a tensor, rank in the group) wherever a process holds another tensor than the first one does.

        Compared by norm and sum, in fp64 and to a part in a thousand of the norm; equal places of inf and NaN count as
        equal. One small all-gather, whose result is the same on every process.
        """
        if self.size == 1:
            return []
        marks = torch.stack(
            [torch.stack([t.norm(dtype=torch.float64), t.sum(dtype=torch.float64)]) for t in tensors]
        ).nan_to_num(nan=torch.finfo(torch.float64).max)
        gathered = [torch.empty_like(marks) for _ in range(self.size)]
        dist.all_gather(gathered, marks, group=self._pg)
        wanted = gathered[0]
        allowed = _TOLERANCE * wanted[:, :1]
        return [
            (int(index), rank)
            for rank, found in enumerate(gathered)
            for index in ((found - wanted).abs() > allowed).any(1).nonzero()[:, 0]
        ]
