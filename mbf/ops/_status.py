"""What the batched operators say of every matrix, as numbers on its device, so that they never wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DONE, GIVEN_UP, NOT_FINITE = 0, 1, 2  # GIVEN_UP: its result is NaN, and left to the reference
NOT_FINITE_MESSAGE = "{}: holds NaN or infinity; look for the step of training that made it so"


def status_of(*stacks: Sequence[Tensor]) -> Tensor:
    """DONE or NOT_FINITE, int32, for every matrix of ``stacks [..., r, d]`` in order; matrices of several lists go
    together."""
    finite = [torch.cat([stack.isfinite().flatten(-2).all(-1).flatten() for stack in one]) for one in stacks]
    return torch.where(torch.stack(finite).all(0), DONE, NOT_FINITE).to(torch.int32)


def given_up(status: Sequence[int], stacks: Sequence[Tensor], name: Callable[[int], str]) -> list[tuple[int, int]]:
    """What to compute anew by the ``status`` of every matrix of ``stacks [..., r, d]``, read to the host: the places of
    the stack and of the matrix in it.

    Raises:
        ValueError: a matrix is not finite; the message has the stack's name.
    """
    if not any(status):
        return []
    rest, found = iter(status), []
    for n, stack in enumerate(stacks):
        here = [next(rest) for _ in range(stack.shape[:-2].numel())]
        if NOT_FINITE in here:
            raise ValueError(NOT_FINITE_MESSAGE.format(name(n)))
        found += [(n, place) for place, code in enumerate(here) if code == GIVEN_UP]
    return found


def matrix_at(stack: Tensor, place: int) -> Tensor:
    """Matrix ``place`` of a stack ``[..., r, d]``, counted in order."""
    return stack.reshape(-1, *stack.shape[-2:])[place]
