"""Parameters that FSDP2 (``torch.distributed.fsdp.fully_shard``) keeps in parts, one a process, as DTensors.

All processes of the mesh call these functions together; ``whole`` communicates, the others take their part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, without importing ``torch.distributed.tensor`` where nobody else did."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor`` without autograd, gathered from the processes where it is sharded, else its own data."""
    data: Any = tensor.detach()
    return data.full_tensor() if is_sharded(tensor) else tensor.data


def like_shard(parameter: Tensor, values: Tensor) -> Tensor:
    """``values``, which all processes hold, sharded as ``parameter`` is, on its device; nothing is communicated."""
    from torch.distributed.tensor import distribute_tensor

    target: Any = parameter
    here = values.detach().to(target.device)
    return distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def write_shard(parameter: Tensor, values: Tensor) -> None:
    """Copy this process's part of ``values``, which all processes hold, into the sharded ``parameter``."""
    parameter.copy_(like_shard(parameter, values))


def reshard(model: nn.Module) -> None:
    """Have every FSDP2 unit of ``model`` drop what it gathered for a forward, so that its parameters are the parts."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
