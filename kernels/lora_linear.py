"""``mbf::lora_linear`` on a GPU: the base by the BLAS and the branch by kernels on top of it.

Where tuning finds it faster, the branch is in the epilogue of a product of our own instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbf.kernels import _epilogue
from mbf.kernels._accumulate import accumulate
from mbf.kernels._input_gradient import input_gradients
from mbf.kernels._operands import matrix, supported
from mbf.kernels._output_gradient import output_gradients
from mbf.kernels._project import project, route
from mbf.kernels._tune import tier_for
from torch import Tensor
from torch.nn import functional as F


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Any) -> Any:
    """The operator's outputs, or NotImplemented for what the kernels don't compute."""
    if not supported([branch], x) or not x.numel():
        return NotImplemented
    ((h, z),) = project(x, [branch])
    return output(x, weight, bias, branch, z), h


def recomputed(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Any, h: Tensor) -> Tensor:
    """y once more, h being there, with the bits that ``lora_group`` gave it."""
    return _on_the_base(x, weight, bias, branch, route(h, branch))


def output(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Any, z: Tensor) -> Tensor:
    """``x Wᵀ + b + s z B̂ᵀ``."""

    def run(tier: str) -> Tensor:
        if tier == "epilogue":
            return _epilogue.forward(x, weight, bias, z, branch)
        return _on_the_base(x, weight, bias, branch, z)

    return run(_tier("forward", x, weight, branch, run))


def _on_the_base(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Any, z: Tensor) -> Tensor:
    y = F.linear(x, weight, bias)
    accumulate(y, y, z, branch)
    return y


def backward(dy: Tensor, h: Tensor, x: Tensor | None, weight: Tensor, branch: Any, needs: Sequence[bool]) -> Any:
    """The operator's gradients, or NotImplemented."""
    if not supported([branch], dy, x) or not dy.numel():
        return NotImplemented
    need_x, need_weight, need_bias, *need_branch = needs
    rows = matrix(dy)
    dh, (dB, *others) = output_gradients(rows, h, branch, [need_x, *need_branch])
    dx = dA = None
    if dh is not None and need_x:
        dx, dA = _input_gradients(rows, x, dh, weight, branch, need_branch[0])
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    elif dh is not None and need_branch[0]:
        (dA,) = input_gradients(x, None, [dh], [branch], [True])
    dweight = rows.t() @ matrix(x) if need_weight and x is not None else None
    dbias = rows.sum(0) if need_bias else None
    return dx, dweight, dbias, dA, dB, *others


def _input_gradients(
    dy: Tensor, x: Tensor | None, dh: Tensor, weight: Tensor, branch: Any, need_A: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x ``[rows, d_in]`` and, if asked, of A."""

    def run(tier: str) -> tuple[Tensor, Tensor | None]:
        if tier == "epilogue":
            dx = _epilogue.input_gradient(dy, weight, dh, branch)
            return dx, input_gradients(x, None, [dh], [branch], [need_A])[0]
        dx = dy @ weight
        return dx, input_gradients(x, dx, [dh], [branch], [need_A])[0]

    return run(_tier("backward", dy, weight, branch, run))


def _tier(name: str, x: Tensor, weight: Tensor, branch: Any, run: Any) -> str:
    if not _epilogue.possible(x, weight, branch):
        return "base"
    form = (branch.A.dtype, branch.merged_B is not None, branch.dropout_p > 0)
    return tier_for(name, x, (x.numel() // x.shape[-1], *weight.shape, branch.A.shape[0]), form, run)
