"""``mbf::lora_accumulate`` on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mbf.kernels._accumulate import accumulate
from mbf.kernels._input_gradient import input_gradients
from mbf.kernels._operands import supported
from mbf.kernels._output_gradient import output_gradients
from mbf.kernels._project import project
from torch import Tensor


def forward(y: Tensor, x: Tensor, branch: Any) -> Any:
    """The operator's outputs, or NotImplemented for what the kernels don't compute."""
    if not supported([branch], y, x) or not y.numel():
        return NotImplemented
    y = y.contiguous()
    out = torch.empty_like(y)
    ((h, z),) = project(x, [branch])
    accumulate(y, out, z, branch)
    return out, h


def backward(dy: Tensor, h: Tensor, x: Tensor | None, branch: Any, needs: Sequence[bool]) -> Any:
    """The operator's gradients, or NotImplemented."""
    if not supported([branch], dy, x) or not dy.numel():
        return NotImplemented
    dh, (dB, *others) = output_gradients(dy, h, branch, needs)
    dA = dx = None
    if dh is not None and (needs[0] or needs[1]):
        width = branch.A.shape[1]
        dx = dh.new_empty(dh.shape[0], width, dtype=(dy if x is None else x).dtype) if needs[0] else None
        (dA,) = input_gradients(x, dx, [dh], [branch], [needs[1]], add=False)
        dx = None if dx is None else dx.view(*dy.shape[:-1], width)
    return dx, dA, dB, *others
