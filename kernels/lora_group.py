"""``mbf::lora_group`` on a GPU: one read of x for the branches of all layers, and one trip through dx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbf.kernels._accumulate import accumulate
from mbf.kernels._input_gradient import input_gradients
from mbf.kernels._operands import matrix, supported
from mbf.kernels._output_gradient import output_gradients
from mbf.kernels._project import project
from torch import Tensor
from torch.nn import functional as F

GRADIENTS = 6  # of a layer: of A, B, gate, mix, merged_B and merge_weight


def forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], branches: Sequence[Any]) -> Any:
    """Each layer's y and each layer's h, or NotImplemented for what the kernels don't compute."""
    if not supported(branches, x) or not x.numel():
        return NotImplemented
    ys, hs = [], []
    routed = project(x, branches)
    for weight, bias, branch, (h, z) in zip(weights, biases, branches, routed, strict=True):
        y = F.linear(x, weight, bias)
        accumulate(y, y, z, branch)
        ys.append(y)
        hs.append(h)
    return ys, hs


def backward(
    dys: Sequence[Tensor | None],
    hs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    branches: Sequence[Any],
    needs: Sequence[bool],
) -> Any:
    """``layers_backward`` of ``mbf/ops/_layers.py``, or NotImplemented."""
    given = [n for n, dy in enumerate(dys) if dy is not None]
    if not given or not hs[0].numel() or not supported(branches, x, *dys):
        return NotImplemented
    need_x, *of_branches = needs
    found: list[list[Tensor | None]] = [[None] * GRADIENTS for _ in dys]
    dhs: dict[int, Tensor] = {}
    dx = None
    for n in given:
        need = [need_x, *of_branches[GRADIENTS * n : GRADIENTS * (n + 1)]]
        rows = matrix(dys[n])  # type: ignore[arg-type]
        dh, found[n][1:] = output_gradients(rows, hs[n], branches[n], need)
        if dh is not None and (need_x or need[1]):
            dhs[n] = dh
        if need_x:
            dx = rows @ weights[n] if dx is None else dx.addmm_(rows, weights[n])
    need_As = [of_branches[GRADIENTS * n] for n in dhs]
    gradients = input_gradients(x, dx, list(dhs.values()), [branches[n] for n in dhs], need_As)
    for n, dA in zip(dhs, gradients, strict=True):
        found[n][0] = dA
    lead = hs[0].shape[:-1]
    dx = None if dx is None else dx.view(*lead, dx.shape[-1])
    return [dx, *(gradient for layer in found for gradient in layer)]
