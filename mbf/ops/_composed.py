"""Layers that share an input, one after another by operator ``lora_linear``: for backends that have only that one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mbf.ops._gpu import entrance
from mbf.ops._operands import Branch
from mbf.ops.lora_linear import lora_linear  # noqa: F401  (defines the operators)

GRADIENTS = 6  # of a layer: of A, B, gate, mix, merged_B and merge_weight
_linear = entrance("lora_linear")
_linear_backward = entrance("lora_linear_backward")


def composed_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``layer_forward`` by operator ``lora_linear``, which makes h again, the same bits."""
    return _linear(x, weight, bias, *branch)


def composed_backward(
    dys: Sequence[Tensor | None],
    hs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    of_layers: Sequence[Branch],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """``layers_backward`` by operator ``lora_linear_backward`` of each layer."""
    need_x, *of_branches = needs
    dx = None
    found: list[Tensor | None] = []
    for n, (dy, h, weight, branch) in enumerate(zip(dys, hs, weights, of_layers, strict=True)):
        if dy is None:
            found += [None] * GRADIENTS
            continue
        need = [need_x, False, False, *of_branches[GRADIENTS * n : GRADIENTS * (n + 1)]]
        more, _, _, *gradients = _linear_backward(dy, h, x, weight, *branch, need)
        found += gradients
        if more is not None:
            dx = more if dx is None else dx.add_(more)
    return [dx, *found]
