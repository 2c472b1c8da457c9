"""``mbf::mora_accumulate`` on a GPU; the kernels are in ``_square.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mbf.kernels._configs import Config
from mbf.kernels._launch import cdiv, interpreted, launch, spans
from mbf.kernels._operands import DTYPES, Dropout, matrix, precision
from mbf.kernels._reduce import reduced
from mbf.kernels._square import square_gradient_kernel, square_input_gradient_kernel, square_kernel
from mbf.kernels._tune import config_for, launched, programs_for
from torch import Tensor

LEAST_STEPS = 8  # of a part of dM's sum
_DEPTH = 32


class Shape(NamedTuple):
    """The sizes of a call, as kernels take them.

    Attributes:
        chunks: of the padded input, of which kind 1 sums all; kind 6 reads the first ``applied``.
        applied: those that M is applied to, 1 of kind 1.
        repeats: how often the result stands in the output.
    """

    height: int
    d_in: int
    d_out: int
    q: int
    rotate: bool

    @property
    def half(self) -> int:
        return cdiv(self.q, 2)

    @property
    def chunks(self) -> int:
        return cdiv(self.d_in, self.q)

    @property
    def applied(self) -> int:
        return min(self.chunks, cdiv(self.d_out, self.q)) if self.rotate else 1

    @property
    def read(self) -> int:
        """Numbers of the padded input that are read."""
        return (self.applied if self.rotate else self.chunks) * self.q

    @property
    def period(self) -> int:
        return self.applied * self.q

    @property
    def repeats(self) -> int:
        return cdiv(self.d_out, self.period)

    @property
    def pad(self) -> int:
        return max(0, self.read - self.d_in)

    @property
    def runtime(self) -> tuple[int, ...]:
        return self.height, self.d_in, self.d_out, self.q, self.half, self.chunks, self.period, self.repeats

    def meta(self, terms: Any) -> dict[str, Any]:
        aligned = self.d_in % 8 == 0 and self.q % 16 == 0
        return {
            "ROTATE": self.rotate,
            "WRAP": self.pad > 0,
            "ONCE": self.repeats == 1,
            "DROP": terms.dropout_p > 0,
            "ALIGNED": aligned,
            "PRECISION": precision(terms.M.device),
        }


def supported(terms: Any, d_in: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels compute with these dtypes and sizes: a chunk goes once around x at most."""
    dtypes = (*DTYPES, torch.float64) if interpreted() else DTYPES
    return d_in >= terms.M.shape[0] and all(t is None or (t.dtype in dtypes and t.numel() > 0) for t in tensors)


def sums_dtype(terms: Any) -> torch.dtype:
    return torch.float64 if terms.M.dtype == torch.float64 else torch.float32


def _config(kernel: str, terms: Any, shape: Shape, dtype: torch.dtype, trial: Any) -> Config:
    """By the columns of M, as other kernels' by their ranks; dtype is that of the activations that are read."""
    key = min(256, max(16, 1 << (shape.q - 1).bit_length()))
    size, form = (shape.height, shape.d_in, shape.d_out, shape.q), (shape.rotate, terms.dropout_p > 0)
    return config_for(kernel, key, terms.M, dtype, size, form, trial)


def _common(config: Config) -> dict[str, Any]:
    return {"ROWS": config.rows, "num_warps": config.warps, "num_stages": config.stages}


def forward(y: Tensor, x: Tensor, terms: Any, cos: Tensor, sin: Tensor) -> Any:
    """The operator's output, or NotImplemented for what the kernels don't compute.

    Args:
        terms: M, whether it is turned (``rotates``), scale, dropout_p, seed, least, keep_scale.
        cos, sin: ``[applied, q/2]`` in fp32, or fp64 for M of that; of kind 1 any tensor.
    """
    if not supported(terms, x.shape[-1], terms.M, y, x):
        return NotImplemented
    y, rows, M, dropout = y.contiguous(), matrix(x), terms.M.contiguous(), Dropout.of(terms)
    shape = Shape(rows.shape[0], rows.shape[1], y.shape[-1], M.shape[0], terms.rotates)

    def run(config: Config, out: Tensor) -> Tensor:
        grid = (cdiv(shape.height, config.rows), cdiv(shape.q, config.columns), shape.applied)
        launch(
            square_kernel,
            grid,
            *(y, out, rows, M, cos, sin, terms.seed if dropout.on else rows),
            *shape.runtime,
            rows.stride(0),
            dropout.least,
            terms.scale * dropout.factor,
            COLUMNS=config.columns,
            DEPTH=_DEPTH,
            **shape.meta(terms),
            **_common(config),
        )
        return out

    out = torch.empty_like(y)
    config = _config("square", terms, shape, rows.dtype, lambda one: run(one, torch.empty_like(y)))
    return launched(config, lambda one: run(one, out))


def backward(
    dy: Tensor, x: Tensor | None, terms: Any, d_in: int, cos: Tensor, sin: Tensor, needs: Sequence[bool]
) -> Any:
    """The operator's gradients, or NotImplemented."""
    if not supported(terms, d_in, terms.M, dy, x):
        return NotImplemented
    rows = matrix(dy)
    shape = Shape(rows.shape[0], d_in, rows.shape[1], terms.M.shape[0], terms.rotates)
    dx = dM = None
    if needs[0]:
        dx = _input_gradient(rows, terms, shape, cos, sin, (dy if x is None else x).dtype)
        dx = dx.view(*dy.shape[:-1], d_in)
    if needs[1] and x is not None:
        dM = _gradient(rows, matrix(x), terms, shape, cos, sin)
    return dx, dM


def _input_gradient(dy: Tensor, terms: Any, shape: Shape, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    M, dropout = terms.M.contiguous(), Dropout.of(terms)
    # What is not read has no gradient.
    make = dy.new_zeros if shape.read < shape.d_in else dy.new_empty
    dx = make((shape.height, shape.d_in), dtype=dtype)
    beyond = dy.new_empty((shape.height, shape.pad), dtype=sums_dtype(terms)) if shape.pad else dx

    def run(config: Config, dx: Tensor) -> None:
        pairs = max(16, config.columns // 2)
        across = cdiv(shape.half, pairs)
        tail = [(True, shape.chunks - 1, 1)] if shape.pad else []
        for is_tail, chunk, chunks in (*tail, (False, 0, shape.applied)):
            launch(
                square_input_gradient_kernel,
                (cdiv(shape.height, config.rows), across, chunks),
                *(dy, dx, beyond, M, cos, sin, terms.seed if dropout.on else dy),
                *shape.runtime,
                dy.stride(0),
                chunk,
                shape.pad,
                dropout.least,
                terms.scale * dropout.factor,
                COLUMNS=pairs,
                DEPTH=_DEPTH,
                TAIL=is_tail,
                **shape.meta(terms),
                **_common(config),
            )

    config = _config("square_input_gradient", terms, shape, dy.dtype, lambda one: run(one, torch.empty_like(dx)))
    launched(config, lambda one: run(one, dx))
    return dx


def _gradient(dy: Tensor, x: Tensor, terms: Any, shape: Shape, cos: Tensor, sin: Tensor) -> Tensor:
    dropout, q = Dropout.of(terms), shape.q

    def run(config: Config) -> Tensor:
        pairs = max(16, config.columns // 2)
        grid = cdiv(q, config.columns), cdiv(shape.half, pairs)
        down = cdiv(shape.height, config.rows)
        steps = down * shape.applied
        span, parts = spans(steps, 1, grid[0] * grid[1], programs_for(dy.device), LEAST_STEPS)
        sums = dy.new_empty(parts * q * q, dtype=sums_dtype(terms))
        launch(
            square_gradient_kernel,
            (*grid, parts),
            *(dy, x, terms.M, sums, cos, sin, terms.seed if dropout.on else dy),
            *shape.runtime,
            *(dy.stride(0), x.stride(0), steps, span, down, dropout.least),
            COLUMNS=config.columns,
            PAIRS=pairs,
            **shape.meta(terms),
            **_common(config),
        )
        return sums

    sums = launched(_config("square_gradient", terms, shape, dy.dtype, run), run)
    return reduced(sums, torch.empty((q, q), dtype=terms.M.dtype, device=dy.device), terms.scale * dropout.factor)
