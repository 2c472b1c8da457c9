"""``rsvd``: the leading singular triples of matrices, randomised for dense ones, exact for low-rank products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from mbf.ops import _cuda, _rsvd_cuda
from mbf.ops._gpu import with_cuda
from mbf.ops._inputs import by_device, check_matrix, whole
from mbf.ops._library import define, reference_only
from mbf.ops._status import given_up, matrix_at, status_of
from mbf.ops.philox import counters, philox_4x32

Factors = tuple[Tensor, Tensor]
_MOST_ITERATIONS, _MOST_OVERSAMPLE = 1 << 20, 1 << 40  # beyond any use, and far from where sums of sizes overflow


class SVD(NamedTuple):
    """``matrix ≈ U diag(S) Vh``: ``U [..., m, k]``, ``S [..., k]`` descending, ``Vh [..., k, n]``."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def rsvd_ref(matrix: Tensor, sketch: Tensor, rank: int, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised SVD (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), in fp32 or wider.

    ``matrix M [..., m, n]``, ``sketch Ω [..., n, k]`` with k ≥ rank: ``Q = qr(M Ω)``, ``n_iter`` times
    ``Q = qr(M qr(Mᵀ Q))``, then the SVD of ``Qᵀ M``.
    """
    M = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    Q = _qr(M @ sketch.to(M.dtype))
    for _ in range(n_iter):
        Q = _qr(M @ _qr(M.mT @ Q))
    U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return _leading(Q @ U, S, Vh, rank, matrix.dtype)


def svd_factors_ref(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of ``B A`` with ``B [..., m, r]``, ``A [..., r, n]``, in fp64 and without the product.

    ``B = Q_B R_B``, ``Aᵀ = Q_A R_A``, ``R_B R_Aᵀ = U S Vᵀ``; so ``B A = (Q_B U) S (Q_A V)ᵀ``.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return _leading(Q_B @ U, S, Vh @ Q_A.mT, rank, B.dtype)


def _qr(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _leading(U: Tensor, S: Tensor, Vh: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` triples in ``dtype``, signed so that the largest entry of each row of Vh is positive."""
    U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    largest = Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    U, Vh = U * sign.mT, Vh * sign
    return U.to(dtype).contiguous(), S.to(dtype).contiguous(), Vh.to(dtype).contiguous()


def sketch_ref(seed: Tensor, n: int, columns: int) -> Tensor:
    """Ω ``[n, columns]`` in fp32 on the seed's device, mean 0 and variance 1, the same on every backend.

    Philox 4x32-10 (``mbf.ops.philox``) at counter ``(j mod 2³², j div 2³², 1, 0)`` makes elements 2 j and 2 j + 1 (flat
    index): the sum of the four half-words of words 0 and 1, or 2 and 3. A sum of four uniform numbers is near enough to
    normal for a sketch, and exact in integers; made odd, it is never zero.
    """
    size = n * columns
    low, high, _, zero = counters(0, -(-size // 2), seed.device)
    words = philox_4x32((low, high, torch.ones_like(low), zero), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    halves = torch.stack([(word & 0xFFFF) + (word >> 16) for word in words], -1)
    sums = halves.view(-1, 2, 2).sum(-1).flatten()[:size]
    return ((2 * sums - 262139).float() * torch.tensor(1 / 75674, dtype=torch.float32)).view(n, columns)


def _rsvd_operator_ref(
    matrices: Sequence[Tensor], seeds: Tensor, rank: int, oversample: int, n_iter: int
) -> list[Tensor]:
    rest, triples = list(seeds.unbind()), []
    for matrix in matrices:
        *batch, m, n = matrix.shape
        columns = min(rank + oversample, m, n)
        here = [sketch_ref(rest.pop(0), n, columns) for _ in range(math.prod(batch))]
        sketch = torch.stack(here).view(*batch, n, columns) if here else matrix.new_empty(*batch, n, columns)
        triples.append(rsvd_ref(_finite(matrix), sketch, rank, n_iter))
    return _flat(triples, matrices)


def _svd_factors_operator_ref(B: Sequence[Tensor], A: Sequence[Tensor], rank: int) -> list[Tensor]:
    return _flat([svd_factors_ref(_finite(b), _finite(a), rank) for b, a in zip(B, A, strict=True)], B, A)


def _finite(matrix: Tensor) -> Tensor:
    """Zero for NaN and infinity, with which LAPACK raises; the status tells."""
    return torch.where(matrix.isfinite(), matrix, 0.0)


def _flat(triples: Sequence[tuple[Tensor, Tensor, Tensor]], *inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the operators return: all U, all S, all Vh, and the status of every matrix."""
    return [*(t[0] for t in triples), *(t[1] for t in triples), *(t[2] for t in triples), status_of(*inputs)]


def _fake(lefts: Sequence[Tensor], rights: Sequence[Tensor], rank: int) -> list[Tensor]:
    shapes = [(left.shape[:-2], left.shape[-2], right.shape[-1]) for left, right in zip(lefts, rights, strict=True)]
    U = [t.new_empty(*batch, m, rank) for t, (batch, m, _) in zip(lefts, shapes, strict=True)]
    S = [t.new_empty(*batch, rank) for t, (batch, _, _) in zip(lefts, shapes, strict=True)]
    Vh = [t.new_empty(*batch, rank, n) for t, (batch, _, n) in zip(lefts, shapes, strict=True)]
    return [*U, *S, *Vh, lefts[0].new_empty(sum(batch.numel() for batch, _, _ in shapes), dtype=torch.int32)]


# Seeds are an argument, so the operator is a pure function and the generator stays on the Python side.
define(
    "rsvd(Tensor[] matrices, Tensor seeds, int rank, int oversample, int n_iter) -> Tensor[]",
    _rsvd_operator_ref,
    lambda matrices, seeds, rank, oversample, n_iter: _fake(matrices, matrices, rank),
    cuda=with_cuda(lambda *inputs: _rsvd_cuda.rsvd(_cuda.library(), *inputs)),
)
define(
    "svd_factors(Tensor[] B, Tensor[] A, int rank) -> Tensor[]",
    _svd_factors_operator_ref,
    _fake,
    cuda=with_cuda(lambda *inputs: _rsvd_cuda.svd_factors(_cuda.library(), *inputs)),
)


@overload
def rsvd(
    matrix_or_factors: Tensor | Factors,
    rank: int,
    *,
    n_iter: int = 2,
    oversample: int = 8,
    generator: torch.Generator | None = None,
) -> SVD: ...
@overload
def rsvd(
    matrix_or_factors: list[Tensor] | list[Factors],
    rank: int,
    *,
    n_iter: int = 2,
    oversample: int = 8,
    generator: torch.Generator | None = None,
) -> list[SVD]: ...
def rsvd(
    matrix_or_factors: Tensor | Factors | list[Tensor] | list[Factors],
    rank: int,
    *,
    n_iter: int = 2,
    oversample: int = 8,
    generator: torch.Generator | None = None,
) -> SVD | list[SVD]:
    """The ``rank`` leading singular triples: ``matrix ≈ U diag(S) Vh``.

    A dense matrix is sketched at random: exact for a matrix of rank ``rank + oversample`` or less, and otherwise the
    nearer to the best approximation the faster its singular values decay and the more ``n_iter``. A product ``(B, A)``
    is computed exactly from QR of both factors, never formed, and draws no random number. U and Vh are orthonormal
    also beyond the matrix's own rank; signs are such that the entry of largest magnitude of each row of Vh is
    positive. The results carry no gradient.

    Args:
        matrix_or_factors: ``[..., m, n]``; or a tuple ``(B [..., m, r], A [..., r, n])`` of one dtype; or a list of
            either, computed in one call; they may differ in shape, dtype and device.
        rank: how many triples, from 1 to min(m, n), for a product min(m, r, n).
        n_iter: power iterations, each re-orthonormalised; at most 2²⁰.
        oversample: columns of the sketch beyond ``rank``; as many as there are where it is more.
        generator: source of the sketch's seeds, one a matrix, on the matrix's device; default: torch's own. They are
            drawn in order, so a list or a stack gives what a loop over it would.

    Returns:
        ``SVD(U [..., m, rank], S [..., rank], Vh [..., rank, n])`` in the dtype of the input; a list for a list.

    Raises:
        TypeError: for anything but such tensors.
        ValueError: when shapes, dtypes or devices do not fit, ``rank`` is out of range, or the input holds NaN or
            infinity, with the index in the list.
    """
    whole(n_iter, "n_iter", most=_MOST_ITERATIONS)
    whole(oversample, "oversample", most=_MOST_OVERSAMPLE)
    whole(rank, "rank", 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}; pass a torch.Generator")
    single = not isinstance(matrix_or_factors, list)
    inputs = [matrix_or_factors] if single else matrix_or_factors
    names = ["matrix_or_factors" if single else f"matrix_or_factors[{n}]" for n in range(len(inputs))]
    entries = [_parts(entry, name) for entry, name in zip(inputs, names, strict=True)]
    for entry, name in zip(entries, names, strict=True):
        _check(entry, rank, name)
    dense = [n for n, entry in enumerate(entries) if len(entry) == 1]
    seeds = {n: _seeds(entries[n][0], generator) for n in dense}
    triples: dict[int, SVD] = {}
    for group in by_device([entries[n][0] for n in dense]):
        here = [dense[n] for n in group]
        matrices, keys = [entries[n][0] for n in here], [seeds[n] for n in here]
        found = _dense(matrices, keys, [names[n] for n in here], rank, oversample, n_iter)
        triples.update(zip(here, found, strict=True))
    products = [n for n, entry in enumerate(entries) if len(entry) == 2]
    for group in by_device([entries[n][0] for n in products]):
        here = [products[n] for n in group]
        lefts, rights = [entries[n][0] for n in here], [entries[n][1] for n in here]
        triples.update(zip(here, _products(lefts, rights, [names[n] for n in here], rank), strict=True))
    return triples[0] if single else [triples[n] for n in range(len(entries))]


def _parts(entry: Tensor | Factors, name: str) -> tuple[Tensor, ...]:
    """``(matrix,)`` or ``(B, A)``, detached."""
    if not isinstance(entry, tuple):
        check_matrix(entry, name)
        return (entry.detach(),)
    if len(entry) != 2:
        raise TypeError(f"{name}: is a tuple of {len(entry)}; pass a matrix, a pair (B, A), or a list of either")
    B, A = entry
    check_matrix(B, f"B of {name}")
    check_matrix(A, f"A of {name}")
    return B.detach(), A.detach()


def _check(entry: tuple[Tensor, ...], rank: int, name: str) -> None:
    m, n = entry[0].shape[-2], entry[-1].shape[-1]
    inner = min(m, n)
    if len(entry) == 2:
        B, A = entry
        if B.shape[:-2] != A.shape[:-2] or B.shape[-1] != A.shape[-2]:
            raise ValueError(
                f"{name}: has B {tuple(B.shape)} and A {tuple(A.shape)}; they must be [..., m, r] and [..., r, n]"
            )
        if (B.dtype, B.device) != (A.dtype, A.device):
            raise ValueError(f"{name}: B is {B.dtype} on {B.device}, A is {A.dtype} on {A.device}; they must agree")
        inner = min(inner, B.shape[-1])
    if not 1 <= rank <= inner:
        raise ValueError(f"rank is {rank}; {name} has {inner} singular triples, so 1 ≤ rank ≤ {inner}")


def _seeds(matrix: Tensor, generator: torch.Generator | None) -> Tensor:
    """One seed for each matrix of a stack, drawn one after another so that lists, stacks and loops agree."""
    if generator is not None and generator.device.type != matrix.device.type:
        raise ValueError(f"generator: is on {generator.device}; the matrix is on {matrix.device}")
    draws = [
        torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=matrix.device, generator=generator)
        for _ in range(matrix.shape[:-2].numel())
    ]
    return torch.stack(draws) if draws else torch.empty(0, dtype=torch.int64, device=matrix.device)


def _dense(
    matrices: list[Tensor], seeds: list[Tensor], names: list[str], rank: int, oversample: int, n_iter: int
) -> list[SVD]:
    """Dense matrices of one device; what the kernel gives up is computed anew in fp64 by the reference."""
    operator = _rsvd_operator_ref if reference_only() else torch.ops.mbf.rsvd.default
    *flat, status = operator(matrices, torch.cat(seeds), rank, oversample, n_iter)
    found = _triples(flat)
    for n, place in given_up(status.tolist(), matrices, names.__getitem__):
        matrix = matrix_at(matrices[n], place).double()
        sketch = sketch_ref(seeds[n][place], matrix.shape[1], min(rank + oversample, *matrix.shape))
        _replace(found[n], place, rsvd_ref(matrix, sketch, rank, n_iter))
    return found


def _products(B: list[Tensor], A: list[Tensor], names: list[str], rank: int) -> list[SVD]:
    """The same for products of factors."""
    operator = _svd_factors_operator_ref if reference_only() else torch.ops.mbf.svd_factors.default
    *flat, status = operator(B, A, rank)
    found = _triples(flat)
    for n, place in given_up(status.tolist(), A, names.__getitem__):
        _replace(found[n], place, svd_factors_ref(matrix_at(B[n], place), matrix_at(A[n], place), rank))
    return found


def _triples(flat: list[Tensor]) -> list[SVD]:
    count = len(flat) // 3
    return [SVD(*flat[n::count]) for n in range(count)]


def _replace(stack: SVD, place: int, found: tuple[Tensor, Tensor, Tensor]) -> None:
    for into, part in zip(stack, found, strict=True):
        into.view(-1, *part.shape)[place] = part
