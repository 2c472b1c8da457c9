"""MoRA's square matrix: ``v = u Mᵀ``, ``du = g M`` and ``dM = gᵀ u``, with u and g made of x and dy in registers.

In the symbols of ``mbf/ops/mora.py``. A tile of u is two tiles of x, half a chunk apart, whose numbers are turned in
pairs; of kind 1 the two are sums over all chunks, and nothing is turned. So every product comes in two, one for each
half of the depth or of the columns. Chunks lie side by side in x and y; what the last of them holds beyond x, or y
beyond all of them, is reached by a second read, so that each read is of consecutive numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mbf.kernels._tiles import inside, offsets, product
from mbf.kernels.philox import kept


@triton.jit
def _read(
    x, seed, rows, start, there, height, d_in, stride, least,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, WRAP: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Numbers ``start ..`` of the rows of drop(x) continued cyclically, as far as they are ``there``."""
    columns = start + tl.arange(0, COLUMNS)
    within = inside(rows, columns, height, d_in) & there[None, :]
    tile = tl.load(x + offsets(rows, columns, stride), mask=within, other=0.0).to(SUMS)
    if DROP:
        tile = tl.where(kept(seed, least, rows, start, d_in, COLUMNS, ALIGNED), tile, 0.0)
    if WRAP:  # noqa: SIM102  (compiled or not, and then run or not)
        if start + COLUMNS > d_in:
            again = columns - d_in
            within = (rows < height)[:, None] & (there & (again >= 0))[None, :]
            more = tl.load(x + offsets(rows, again, stride), mask=within, other=0.0).to(SUMS)
            if DROP:
                more = tl.where(kept(seed, least, rows, start - d_in, d_in, COLUMNS, ALIGNED), more, 0.0)
            tile += more
    return tile


@triton.jit
def _pair(
    x, cos, sin, seed, rows, chunk, first, height, d_in, stride, q, half, chunks, least,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, ROTATE: tl.constexpr, WRAP: tl.constexpr, DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Columns ``first ..`` and ``half + first ..`` of the rows of u."""
    columns = first + tl.arange(0, COLUMNS)
    low, high = columns < half, columns + half < q
    begin = chunk * q + first
    a = _read(x, seed, rows, begin, low, height, d_in, stride, least, COLUMNS, SUMS, WRAP, DROP, ALIGNED)
    b = _read(x, seed, rows, begin + half, high, height, d_in, stride, least, COLUMNS, SUMS, WRAP, DROP, ALIGNED)
    if ROTATE:
        c = tl.load(cos + chunk * half + columns, mask=low, other=0.0)[None, :]
        s = tl.load(sin + chunk * half + columns, mask=low, other=0.0)[None, :]
        a, b = a * c - b * s, b * c + a * s
    else:
        for i in range(1, chunks):
            start = i * q + first
            a += _read(x, seed, rows, start, low, height, d_in, stride, least, COLUMNS, SUMS, WRAP, DROP, ALIGNED)
            b += _read(
                x, seed, rows, start + half, high, height, d_in, stride, least, COLUMNS, SUMS, WRAP, DROP, ALIGNED
            )
    return a, b


@triton.jit
def _gathered(
    dy, rows, columns, chunk, height, d_out, q, period, repeats, stride,
    SUMS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """The rows of g at these columns: dy summed over the repetitions of the output."""
    there = columns < q
    at = chunk * q + columns
    within = inside(rows, at, height, d_out) & there[None, :]
    tile = tl.load(dy + offsets(rows, at, stride), mask=within, other=0.0).to(SUMS)
    if not ONCE:
        for _ in range(1, repeats):
            at += period
            within = inside(rows, at, height, d_out) & there[None, :]
            tile += tl.load(dy + offsets(rows, at, stride), mask=within, other=0.0).to(SUMS)
    return tile


@triton.jit(do_not_specialize=["height", "least"])
def square_kernel(
    y, out, x, M, cos, sin, seed, height, d_in, d_out, q, half, chunks, period, repeats, stride, least, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ROTATE: tl.constexpr, WRAP: tl.constexpr,
    ONCE: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = y + scale · v`` where one chunk goes, y and out ``[height, d_out]``, contiguous."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(2)
    dtype: tl.constexpr = M.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    key = tl.load(seed) if DROP else 0
    total = tl.zeros((ROWS, COLUMNS), sums)
    of_M = columns.to(tl.int64)
    for first in range(0, half, DEPTH):
        a, b = _pair(
            x, cos, sin, key, rows, chunk, first, height, d_in, stride, q, half, chunks, least,
            DEPTH, sums, ROTATE, WRAP, DROP, ALIGNED,
        )  # fmt: skip
        deep = first + tl.arange(0, DEPTH)
        m = tl.load(M + offsets(of_M, deep, q), mask=inside(columns, deep, q, half), other=0.0)
        total = product(a.to(dtype), tl.trans(m), total, PRECISION)
        deep += half
        m = tl.load(M + offsets(of_M, deep, q), mask=inside(columns, deep, q, q), other=0.0)
        total = product(b.to(dtype), tl.trans(m), total, PRECISION)
    total *= scale
    at = chunk * q + columns
    for _ in range(0, repeats):
        there = inside(rows, at, height, d_out) & (columns < q)[None, :]
        before = tl.load(y + offsets(rows, at, d_out), mask=there, other=0.0).to(sums)
        tl.store(out + offsets(rows, at, d_out), (before + total).to(out.dtype.element_ty), mask=there)
        at += period


@triton.jit
def _write(
    dx, beyond, value, seed, rows, start, there, height, d_in, pad, least, factor,
    COLUMNS: tl.constexpr, WRAP: tl.constexpr, TAIL: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Numbers ``start ..`` of the padded rows of dx; of the TAIL what lies beyond them, for who comes to the first."""
    columns = start + tl.arange(0, COLUMNS)
    if TAIL:
        again = columns - d_in
        within = (rows < height)[:, None] & (there & (again >= 0))[None, :]
        tl.store(beyond + offsets(rows, again, pad), value, mask=within)
    else:
        if WRAP:
            more = inside(rows, columns, height, pad) & there[None, :]
            value += tl.load(beyond + offsets(rows, columns, pad), mask=more, other=0.0)
        value *= factor
        if DROP:
            value = tl.where(kept(seed, least, rows, start, d_in, COLUMNS, ALIGNED), value, 0.0)
        within = inside(rows, columns, height, d_in) & there[None, :]
        tl.store(dx + offsets(rows, columns, d_in), value.to(dx.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["height", "least"])
def square_input_gradient_kernel(
    dy, dx, beyond, M, cos, sin, seed, height, d_in, d_out, q, half, chunks, period, repeats, stride, chunk, pad, least,
    factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ROTATE: tl.constexpr, WRAP: tl.constexpr,
    TAIL: tl.constexpr, ONCE: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx ``[height, d_in]``, contiguous, of the chunks from ``chunk`` on; ``beyond [height, pad]`` in the sums' dtype.

    ``factor``, the scale and that of dropout, goes into dx only.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    low, high = columns < half, columns + half < q
    chunk += tl.program_id(2)
    dtype: tl.constexpr = M.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    key = tl.load(seed) if DROP and not TAIL else 0
    a = tl.zeros((ROWS, COLUMNS), sums)
    b = a
    end = q
    if TAIL:  # of pairs that both lie within x nothing is wanted
        end = tl.where(chunk * q + half + first + COLUMNS > d_in, q, 0)
    for start in range(0, end, DEPTH):
        deep = start + tl.arange(0, DEPTH)
        of_dy = chunk if ROTATE else 0
        g = _gathered(dy, rows, deep, of_dy, height, d_out, q, period, repeats, stride, sums, ONCE).to(dtype)
        deep = deep.to(tl.int64)
        m = tl.load(M + offsets(deep, columns, q), mask=inside(deep, columns, q, half), other=0.0)
        a = product(g, m, a, PRECISION)
        m = tl.load(M + offsets(deep, columns + half, q), mask=inside(deep, columns + half, q, q), other=0.0)
        b = product(g, m, b, PRECISION)
    if ROTATE:
        c = tl.load(cos + chunk * half + columns, mask=low, other=0.0)[None, :]
        s = tl.load(sin + chunk * half + columns, mask=low, other=0.0)[None, :]
        a, b = a * c + b * s, b * c - a * s
    many = 1 if ROTATE or TAIL else chunks
    for i in range(chunk, chunk + many):
        at = i * q + first
        _write(dx, beyond, a, key, rows, at, low, height, d_in, pad, least, factor, COLUMNS, WRAP, TAIL, DROP, ALIGNED)
        _write(
            dx, beyond, b, key, rows, at + half, high, height, d_in, pad, least, factor,
            COLUMNS, WRAP, TAIL, DROP, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["height", "least", "steps", "span", "down"])
def square_gradient_kernel(
    dy, x, M, dM, cos, sin, seed, height, d_in, d_out, q, half, chunks, period, repeats, dy_stride, stride, steps, span,
    down, least,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ROTATE: tl.constexpr, WRAP: tl.constexpr,
    ONCE: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dM ``[parts, q, q]`` in the sums' dtype, without the factors; M tells the dtype of the products.

    A step is ROWS rows of one chunk; ``down`` of them go down a chunk.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * PAIRS
    part = tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = M.dtype.element_ty
    sums: tl.constexpr = dM.dtype.element_ty
    key = tl.load(seed) if DROP else 0
    low = tl.zeros((COLUMNS, PAIRS), sums)
    high = low
    for step in range(part * span, min(part * span + span, steps)):
        chunk = step // down if ROTATE else 0
        rows = (step % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        g = _gathered(dy, rows, columns, chunk, height, d_out, q, period, repeats, dy_stride, sums, ONCE)
        a, b = _pair(
            x, cos, sin, key, rows, chunk, first, height, d_in, stride, q, half, chunks, least,
            PAIRS, sums, ROTATE, WRAP, DROP, ALIGNED,
        )  # fmt: skip
        left = tl.trans(g.to(dtype))
        low = product(left, a.to(dtype), low, PRECISION)
        high = product(left, b.to(dtype), high, PRECISION)
    pairs = first + tl.arange(0, PAIRS)
    at = part * q * q + offsets(columns.to(tl.int64), pairs, q)
    tl.store(dM + at, low, mask=inside(columns, pairs, q, half))
    tl.store(dM + at + half, high, mask=inside(columns, pairs + half, q, q))
