"""``rsvd``: the leading singular triples of matrices, randomised for dense ones, exact for low-rank products."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from mbf.ops._inputs import check_finite, check_matrix, equal_groups
from mbf.ops._library import define, reference_only

Factors = tuple[Tensor, Tensor]


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


def _fake_triples(matrix: Tensor, m: int, n: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = matrix.shape[:-2]
    return matrix.new_empty(*batch, m, rank), matrix.new_empty(*batch, rank), matrix.new_empty(*batch, rank, n)


def _rsvd_fake(matrix: Tensor, sketch: Tensor, rank: int, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_triples(matrix, matrix.shape[-2], matrix.shape[-1], rank)


def _svd_factors_fake(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_triples(B, B.shape[-2], A.shape[-1], rank)


# The sketch is an argument, so the operator is a pure function and the generator stays on the Python side.
define("rsvd(Tensor matrix, Tensor sketch, int rank, int n_iter) -> (Tensor, Tensor, Tensor)", rsvd_ref, _rsvd_fake)
define("svd_factors(Tensor B, Tensor A, int rank) -> (Tensor, Tensor, Tensor)", svd_factors_ref, _svd_factors_fake)


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
            either, whose equal shapes are computed as one batch.
        rank: how many triples, from 1 to min(m, n), for a product min(m, r, n).
        n_iter: power iterations, each re-orthonormalised.
        oversample: columns of the sketch beyond ``rank``.
        generator: source of the sketch, on the matrix's device; default: torch's own. A list draws in its order, so it
            gives what a loop over it would.

    Returns:
        ``SVD(U [..., m, rank], S [..., rank], Vh [..., rank, n])`` in the dtype of the input; a list for a list.

    Raises:
        TypeError: for anything but such tensors.
        ValueError: when shapes, dtypes or devices do not fit, ``rank`` is out of range, or the input holds NaN or
            infinity, with the index in the list.
    """
    if n_iter < 0 or oversample < 0:
        raise ValueError(f"n_iter and oversample are {n_iter} and {oversample}; neither can be negative")
    single = not isinstance(matrix_or_factors, list)
    inputs = [matrix_or_factors] if single else matrix_or_factors
    names = ["matrix_or_factors" if single else f"matrix_or_factors[{n}]" for n in range(len(inputs))]
    entries = [_parts(entry, name) for entry, name in zip(inputs, names, strict=True)]
    for entry, name in zip(entries, names, strict=True):
        _check(entry, rank, name)
    sketches = [_sketch(entry, rank + oversample, generator) for entry in entries]

    triples: dict[int, SVD] = {}
    for group in equal_groups(entries):
        stacked = [torch.stack(column) for column in zip(*(entries[n] for n in group), strict=True)]
        for part in stacked:
            check_finite(part, [names[n] for n in group])
        results = _decompose(stacked, [sketches[n] for n in group], rank, n_iter)
        triples.update(zip(group, map(SVD, *(result.unbind() for result in results)), strict=True))
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
            raise ValueError(f"{name}: B {tuple(B.shape)} and A {tuple(A.shape)} are not [..., m, r] and [..., r, n]")
        if (B.dtype, B.device) != (A.dtype, A.device):
            raise ValueError(f"{name}: B is {B.dtype} on {B.device}, A is {A.dtype} on {A.device}; they must agree")
        inner = min(inner, B.shape[-1])
    if not 1 <= rank <= inner:
        raise ValueError(f"rank is {rank}; {name} has {inner} singular triples, so 1 ≤ rank ≤ {inner}")


def _sketch(entry: tuple[Tensor, ...], columns: int, generator: torch.Generator | None) -> Tensor | None:
    """Normal Ω ``[..., n, min(columns, m, n)]`` for a dense matrix, in its dtype or fp32; None for a product."""
    if len(entry) == 2:
        return None
    (matrix,) = entry
    if generator is not None and generator.device.type != matrix.device.type:
        raise ValueError(f"generator: is on {generator.device}; the matrix is on {matrix.device}")
    *batch, m, n = matrix.shape
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return torch.randn(*batch, n, min(columns, m, n), generator=generator, dtype=dtype, device=matrix.device)


def _decompose(
    stacked: list[Tensor], sketches: list[Tensor | None], rank: int, n_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    if len(stacked) == 2:
        B, A = stacked
        return svd_factors_ref(B, A, rank) if reference_only() else torch.ops.mbf.svd_factors(B, A, rank)
    matrix, sketch = stacked[0], torch.stack([s for s in sketches if s is not None])
    if reference_only():
        return rsvd_ref(matrix, sketch, rank, n_iter)
    return torch.ops.mbf.rsvd(matrix, sketch, rank, n_iter)
