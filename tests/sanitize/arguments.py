"""Random arguments for the raw operators: right ones, wherever they may lie in memory, and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from mbf.ops.lora_mlp import _forward as mlp_ref

SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 129)
LARGE = (128, 256, 301, 513, 1100, 2112)
RANKS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65)
LEADS = ((), (0,), (1,), (2,), (7,), (47,), (49,), (65,), (130,), (300,), (2, 3), (0, 2), (3, 1, 2), (1, 1))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def seeded(random: Random) -> torch.Generator:
    return torch.Generator().manual_seed(random.getrandbits(60))


def normal(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers, laid out somehow."""
    size = max(1, shape[-1] if shape else 1)
    return laid_out(random, torch.randn(shape, generator=seeded(random), dtype=torch.float64) * size**-0.5, dtype)


def laid_out(random: Random, values: Tensor, dtype: torch.dtype, distinct: bool = False) -> Tensor:
    """The values at random strides in a storage that ends with the last of them, so that one read beyond is noticed.

    What lies between is NaN. Sometimes an axis is expanded, unless elements must be ``distinct``.
    """
    values = values.to(dtype)
    if random.random() < 0.5:
        return values.clone(memory_format=torch.contiguous_format)
    if values.dim() and not distinct and random.random() < 0.15:
        axis = random.randrange(values.dim())
        if values.shape[axis] > 1:
            return laid_out(random, values.narrow(axis, 0, 1), dtype, True).expand(values.shape)
    strides, step = [0] * values.dim(), random.choice((1, 1, 1, 2, 3))
    axes = list(range(values.dim()))
    if random.random() < 0.5:
        random.shuffle(axes)
    for axis in reversed(axes):
        strides[axis] = step
        step = step * max(1, values.shape[axis]) + random.choice((0, 0, 1, 5))
    first = random.choice((0, 0, 1, 3, 16))
    last = (
        sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) if values.numel() else -1
    )
    memory = torch.full((first + last + 1,), torch.nan, dtype=dtype)
    return memory.as_strided(values.shape, strides, first).copy_(values)


# -- right arguments ---------------------------------------------------------------------------------------------------


def sizes(random: Random, lead: tuple[int, ...], *of: tuple[int, ...]) -> list[int]:
    """A size of each kind; small ones where there are many rows, so that a call stays quick."""
    rows = math.prod(lead)
    if rows < 10 and random.random() < 0.05:
        return [random.choice(LARGE if some is SIZES else some) for some in of]
    return [random.choice([size for size in some if size <= (4096 if rows < 100 else 70)]) for some in of]


def types(random: Random) -> tuple[torch.dtype, torch.dtype]:
    """Of activations and of the branch, which may be wider."""
    base = random.choice(FLOATS)
    return base, base if random.random() < 0.6 else random.choice((torch.float32, torch.float64))


def a_seed(random: Random) -> Tensor:
    return torch.tensor(random.choice((0, 1, -1, 2**63 - 1, -(2**63), random.getrandbits(40))))


def branch(random: Random, lead: tuple[int, ...], d_in: int, d_out: int, dtype: torch.dtype) -> list[Any]:
    """The nine operands of ``mbf.ops._operands.SCHEMA``."""
    (r,) = sizes(random, lead, RANKS)
    A, B = normal(random, (r, d_in), dtype), normal(random, (d_out, r), dtype)
    gate = mix = seed = merged_B = weight = None
    if random.random() < 0.5:
        full = (*lead, r)
        shape = tuple(random.choice((1, size)) for size in full[random.randint(0, len(full)) :])
        gate = normal(random, shape, random.choice((dtype, torch.float32, torch.float64)))
    if random.random() < 0.3:
        mix = normal(random, (r, r), random.choice((dtype, torch.float32)))
    if random.random() < 0.3:
        merged_B = normal(random, (d_out, r), dtype)
        weight = torch.tensor(random.choice((0.0, 0.37, 1.0)), dtype=random.choice(FLOATS))
    p = random.choice((0.0, 0.0, 0.1, 0.5, 0.99))
    if p or random.random() < 0.1:
        seed = a_seed(random)
    return [A, B, random.choice((0.0, 1.0, 1.3, -2.0)), gate, mix, p, seed, merged_B, weight]


def needs(random: Random, operands: list[Any], x: Tensor | None) -> list[bool]:
    """Of A, B, gate, mix, merged_B and merge_weight: what is there, all or some."""
    there = [x is not None, True, *(operands[n] is not None for n in (3, 4, 7, 8))]
    every = random.random() < 0.5
    return [is_there and (every or random.random() < 0.5) for is_there in there]


def saved(random: Random, lead: tuple[int, ...], A: Tensor) -> Tensor:
    """h: a sum over d_in numbers, so zero where there are none."""
    h = normal(random, (*lead, A.shape[0]), A.dtype)
    return h if A.shape[1] else torch.zeros_like(h)


def flag(random: Random) -> bool:
    return random.random() < 0.7


def layer(random: Random) -> tuple[tuple[int, ...], int, int, torch.dtype, torch.dtype]:
    lead = random.choice(LEADS)
    d_in, d_out = sizes(random, lead, SIZES, SIZES)
    return lead, d_in, d_out, *types(random)


def bias(random: Random, d_out: int, dtype: torch.dtype) -> Tensor | None:
    return normal(random, (d_out,), dtype) if flag(random) else None


def lora_linear(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    x, weight = normal(random, (*lead, d_in), base), normal(random, (d_out, d_in), base)
    return [x, weight, bias(random, d_out, base), *branch(random, lead, d_in, d_out, dtype)]


def lora_linear_backward(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    operands = branch(random, lead, d_in, d_out, dtype)
    x = normal(random, (*lead, d_in), base) if flag(random) else None
    dy, h = normal(random, (*lead, d_out), base), saved(random, lead, operands[0])
    asked = [flag(random), x is not None and flag(random), flag(random), *needs(random, operands, x)]
    return [dy, h, x, normal(random, (d_out, d_in), base), *operands, asked]


def lora_accumulate(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    y, x = normal(random, (*lead, d_out), base), normal(random, (*lead, d_in), random.choice((base, dtype)))
    return [y, x, *branch(random, lead, d_in, d_out, dtype)]


def lora_accumulate_backward(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    operands = branch(random, lead, d_in, d_out, dtype)
    x = normal(random, (*lead, d_in), random.choice((base, dtype))) if flag(random) else None
    dy, h = normal(random, (*lead, d_out), base), saved(random, lead, operands[0])
    return [dy, h, x, *operands, [flag(random), *needs(random, operands, x)]]


def columns(branches: list[list[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*branches, strict=True)]


def group(random: Random) -> tuple[tuple[int, ...], int, list[int], torch.dtype, list[list[Any]]]:
    lead, d_in, _, base, _ = layer(random)
    d_outs = [sizes(random, lead, SIZES)[0] for _ in range(random.choice((1, 2, 3)))]
    return lead, d_in, d_outs, base, [branch(random, lead, d_in, d, wider(random, base)) for d in d_outs]


def wider(random: Random, base: torch.dtype) -> torch.dtype:
    return base if random.random() < 0.7 else random.choice((torch.float32, torch.float64))


def lora_group(random: Random) -> list[Any]:
    lead, d_in, d_outs, base, branches = group(random)
    x, weights = normal(random, (*lead, d_in), base), [normal(random, (d, d_in), base) for d in d_outs]
    return [x, weights, [bias(random, d, base) for d in d_outs], *columns(branches)]


def lora_group_backward(random: Random) -> list[Any]:
    lead, d_in, d_outs, base, branches = group(random)
    x = normal(random, (*lead, d_in), base) if flag(random) else None
    dys: list[Any] = [normal(random, (*lead, d), base) if flag(random) else None for d in d_outs]
    if all(dy is None for dy in dys):
        dys[0] = normal(random, (*lead, d_outs[0]), base)
    hs = [saved(random, lead, one[0]) for one in branches]
    asked = [flag(random)]
    for dy, one in zip(dys, branches, strict=True):
        asked += [need and dy is not None for need in needs(random, one, x)]
    return [dys, hs, x, [normal(random, (d, d_in), base) for d in d_outs], *columns(branches), asked]


def mlp(random: Random) -> tuple[Tensor, list[Tensor], list[Any], list[list[Any]], int]:
    lead, d_in, d_out, base, dtype = layer(random)
    (d_ff,) = sizes(random, lead, SIZES)
    shapes = ((d_ff, d_in), (d_ff, d_in), (d_out, d_ff))
    weights = [normal(random, shape, base) for shape in shapes]
    biases = [bias(random, rows, base) for rows, _ in shapes]
    return (
        normal(random, (*lead, d_in), base),
        weights,
        biases,
        [branch(random, lead, of, to, dtype) for to, of in shapes],
        d_ff,
    )


def lora_mlp(random: Random) -> list[Any]:
    x, weights, biases, branches, _ = mlp(random)
    return [x, weights, biases, *columns(branches), random.randrange(2), flag(random)]


def lora_mlp_backward(random: Random) -> list[Any]:
    x, weights, biases, branches, _ = mlp(random)
    activation = random.randrange(2)
    lists = columns(branches)
    # Where g and u are to be made again, each h is made with them or taken: it must be what forward gave.
    y, *kept, h1, h2, h3 = (
        laid_out(random, one, one.dtype, True) for one in mlp_ref(x, weights, biases, *lists, activation, False)
    )
    g, u = kept if flag(random) else (None, None)
    hs = [h1, h2, h3]
    asked = [flag(random), *(need for one in branches for need in needs(random, one, x))]
    return [normal(random, tuple(y.shape), x.dtype), x, g, u, hs, weights, biases, *lists, activation, asked]


def frozen_linear(random: Random) -> list[Any]:
    return lora_linear(random)[:3]


def frozen_linear_backward(random: Random) -> list[Any]:
    lead, d_in, d_out, base, _ = layer(random)
    return [normal(random, (*lead, d_out), base), normal(random, (d_out, d_in), base)]


def lilora(random: Random, lead: tuple[int, ...], d_in: int, d_out: int, dtype: torch.dtype) -> list[Any]:
    r, inner = sizes(random, lead, RANKS, RANKS)
    p = random.choice((0.0, 0.0, 0.3))
    shapes = ((r, d_in), (d_out, r), (inner, r), (d_out, inner))
    numbers = [torch.tensor(random.choice((0.0, 0.4, 1.0, 2.0)), dtype=random.choice(FLOATS)) for _ in range(2)]
    return [*(normal(random, shape, dtype) for shape in shapes), *numbers, p, a_seed(random) if p else None]


def lilora_accumulate(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    y, x = normal(random, (*lead, d_out), base), normal(random, (*lead, d_in), random.choice((base, dtype)))
    return [y, x, *lilora(random, lead, d_in, d_out, dtype)]


def lilora_accumulate_backward(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    operands = lilora(random, lead, d_in, d_out, dtype)
    x = normal(random, (*lead, d_in), random.choice((base, dtype))) if flag(random) else None
    dy, h = normal(random, (*lead, d_out), base), saved(random, lead, operands[0])
    return [dy, h, x, *operands, [flag(random), x is not None and flag(random), *(flag(random) for _ in range(5))]]


def mora(random: Random, dtype: torch.dtype) -> list[Any]:
    kind = random.choice((1, 6))
    q = random.choice((1, 2, 3, 5, 8, 16, 17, 33) if kind == 1 else (2, 4, 6, 8, 16, 34, 66))
    p = random.choice((0.0, 0.0, 0.3))
    return [normal(random, (q, q), dtype), kind, random.choice((1.0, -0.7)), p, a_seed(random) if p else None]


def mora_accumulate(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    y, x = normal(random, (*lead, d_out), base), normal(random, (*lead, d_in), random.choice((base, dtype)))
    return [y, x, *mora(random, dtype)]


def mora_accumulate_backward(random: Random) -> list[Any]:
    lead, d_in, d_out, base, dtype = layer(random)
    x = normal(random, (*lead, d_in), random.choice((base, dtype))) if flag(random) else None
    M, *rest = mora(random, dtype)
    asked = [flag(random), x is not None and flag(random)]
    return [normal(random, (*lead, d_out), base), x, M, d_in, *rest, asked]


def dropout_mask(random: Random) -> list[Any]:
    return [a_seed(random), list(random.choice((*LEADS, (5000,)))), random.choice((0.0, 0.1, 0.5, 0.999))]


def pairs(random: Random, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """What is written and what it comes from; dtypes may differ."""
    merged = [
        laid_out(random, torch.randn(shape, generator=seeded(random)), random.choice(FLOATS), True) for shape in shapes
    ]
    return merged, [normal(random, shape, random.choice(FLOATS)) for shape in shapes]


def merge_(random: Random) -> list[Any]:
    shapes = [(*random.choice(LEADS), random.choice(SIZES)) for _ in range(random.randint(0, 5))]
    weight = torch.tensor(random.choice((0.0, 0.3, 0.7, 1.0, -1.0)), dtype=torch.float64)
    return [*pairs(random, shapes), weight]


def matrix_shape(random: Random) -> tuple[int, int]:
    r, d = sorted((random.choice(SIZES[1:]), random.choice((*SIZES[1:], 700))))
    return r, d


def orthonormal_rows(random: Random) -> list[Any]:
    shapes = [(*random.choice(((), (0,), (1,), (3,))), *matrix_shape(random)) for _ in range(random.randint(1, 3))]
    return [[normal(random, shape, random.choice(FLOATS)) for shape in shapes]]


def empty_like_all(random: Random) -> list[Any]:
    together = [(random.choice((1, 3, 64)), random.choice((17, 4096)))] * random.choice((0, 70))
    shapes = [tuple(random.choice(SIZES) for _ in range(random.randint(0, 3))) for _ in range(random.randint(1, 3))]
    return [[normal(random, shape, random.choice(FLOATS)) for shape in (*together, *shapes)]]


def task_boundary_(random: Random) -> list[Any]:
    shapes = [matrix_shape(random) for _ in range(random.randint(1, 3))]
    merged_A, A = pairs(random, shapes)  # type: ignore[arg-type]
    merged_B, B = pairs(random, [(random.choice(SIZES), r) for r, _ in shapes])
    Q = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in A]
    return [merged_A, merged_B, Q, A, B, torch.tensor(0.4, dtype=torch.float64)]


def rsvd(random: Random) -> list[Any]:
    batches = [random.choice(((), (0,), (2,), (2, 2))) for _ in range(random.randint(1, 3))]
    matrices = [
        normal(random, (*batch, random.choice(SIZES[2:]), random.choice(SIZES[2:])), random.choice(FLOATS))
        for batch in batches
    ]
    rank = random.randint(1, min(min(matrix.shape[-2:]) for matrix in matrices))
    seeds = torch.randint(0, 2**62, (sum(math.prod(batch) for batch in batches),), generator=seeded(random))
    return [matrices, seeds, rank, random.choice((0, 1, 8)), random.choice((0, 1, 2))]


def svd_factors(random: Random) -> list[Any]:
    B, A, ranks = [], [], []
    for _ in range(random.randint(1, 3)):
        batch, dtype = random.choice(((), (0,), (2,))), random.choice(FLOATS)
        m, r, n = random.choice(SIZES[2:]), random.choice(RANKS[1:9]), random.choice(SIZES[2:])
        B.append(normal(random, (*batch, m, r), dtype))
        A.append(normal(random, (*batch, r, n), dtype))
        ranks.append(min(m, r, n))
    return [B, A, random.randint(1, min(ranks))]


VALID: dict[str, Callable[[Random], list[Any]]] = {
    **{
        make.__name__: make
        for make in (
            *(dropout_mask, empty_like_all, frozen_linear, frozen_linear_backward),
            *(lilora_accumulate, lilora_accumulate_backward),
            *(lora_accumulate, lora_accumulate_backward, lora_group, lora_group_backward, lora_linear),
            *(lora_linear_backward, lora_mlp, lora_mlp_backward, merge_, mora_accumulate, mora_accumulate_backward),
            *(orthonormal_rows, rsvd, svd_factors, task_boundary_),
        )
    },
    "merge_with_norms_": merge_,
}


# -- wrong ones --------------------------------------------------------------------------------------------------------

_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t[..., :-1] if t.dim() else t.view(1),
    lambda t: t[1:] if t.dim() else t.view(1, 1),
    lambda t: t[:1] if t.dim() else t.expand(0),
    lambda t: torch.cat([t, t], -1) if t.dim() else t.expand(3),
    lambda t: torch.cat([t, t]) if t.dim() else t.expand(2, 2),
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1),
    lambda t: t.flatten(),
    lambda t: t.mT.contiguous() if t.dim() > 1 else t.unsqueeze(0),
    lambda t: t.flatten()[:0],
    lambda t: t.flatten()[0] if t.numel() else t,
    lambda t: t.new_empty((0, 2**33)),
    lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] > 1 else t,
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in (*FLOATS, torch.int64, torch.int8, torch.bool)),
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in (torch.complex64, torch.float8_e4m3fn)),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: torch._neg_view(t) if t.dtype.is_floating_point else t,
    lambda t: None,
    lambda t: t.tolist() if t.numel() < 100 else None,
    lambda t: "a string",
)
_HUGE: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.new_empty((1,)).expand(2**31 + 5),
    lambda t: t.new_empty((1, 1)).expand(2**33, t.shape[-1] if t.dim() else 1),
)
_NUMBERS = (-1, 0, 2, 7, 2**62, -(2**63), 2**63 - 1, math.nan, math.inf, -0.1, 1.0, 1e30, "1", None)


def wrong(random: Random, value: Any, huge: bool = True) -> Any:
    """Something else in its place, which may by chance be right.

    ``huge`` tensors have more than 2³¹ elements in next to no memory; where one is computed with, it must be by a
    process that cannot have as much.
    """
    if isinstance(value, Tensor):
        return random.choice(_TENSORS + _HUGE if huge else _TENSORS)(value)
    if isinstance(value, list):
        how = random.random()
        if how < 0.15 or not value:
            return random.choice(([], [*value, *value[-1:]], None, [None]))
        if how < 0.3:
            return value[:-1]
        at = random.randrange(len(value))
        return [*value[:at], wrong(random, value[at], huge), *value[at + 1 :]]
    if isinstance(value, bool):
        return random.choice((not value, 2, None, "True"))
    if value is None:
        return random.choice((torch.ones(()), torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(0)))
    return random.choice(_NUMBERS)
