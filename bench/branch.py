"""What the benchmarks of a branch alone share: operands, forward and backward in one call, and when that is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of peers, which are no more than to compute the same
SCALE, SEED = 2.0, 7
Results = dict[str, Tensor]  # "y" and the gradients, by operand


def both_ways(function: Callable[..., Tensor], operands: Mapping[str, Tensor], dy: Tensor, **terms: Any) -> Results:
    """Forward and backward: y and the gradients of all operands but y."""
    out = function(**operands, **terms)
    leaves = {name: value for name, value in operands.items() if value.requires_grad}
    gradients = torch.autograd.grad(out, list(leaves.values()), dy)
    return {"y": out.detach()} | dict(zip(leaves, gradients, strict=True))


def tracked(operands: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Leaves of these values; all but y need a gradient."""
    return {
        name: value.detach().to(dtype or value.dtype).requires_grad_(name != "y") for name, value in operands.items()
    }


def errors(found: Results, exact: Results, sizes: Mapping[str, float]) -> dict[str, float]:
    """‖found − exact‖ over ‖exact‖ or, of what may cancel to nothing, over the size given."""
    return {
        name: float((found[name].double() - truth).norm()) / (sizes.get(name) or float(truth.norm()))
        for name, truth in exact.items()
    }


def judge(
    name: str, found: Results, reference: Results, exact: Results, sizes: Mapping[str, float] | None = None
) -> list[str]:
    """What is wrong: mbf's errors may be twice the reference's and 1e-6; those of others are held to LOOSE.

    Args:
        name: of the variant.
        reference: the results of plain torch in the same dtypes.
        exact: in fp64.
        sizes: of results that may cancel, to measure errors by.
    """
    off, allowed = (errors(value, exact, sizes or {}) for value in (found, reference))
    dtype = found["y"].dtype
    slack = {n: 1e-6 + (torch.finfo(dtype).eps if value.dim() == 0 else 0.0) for n, value in exact.items()}
    limits = {n: 2 * allowed[n] + slack[n] if name == "mbf" else LOOSE[dtype] for n in off}
    return [f"{n} is off by {off[n]:.1e}, of at most {limits[n]:.1e}" for n in off if not off[n] <= limits[n]]
