"""Singular triples on a GPU: torch's products around the kernels of ``mbf._cuda`` for bases and small SVDs.

The mathematics is that of ``csrc/cpu``: power iterations ``V ← orth(Mᵀ (M V))`` from the sketch of Philox, orthonormal
rows in fp64 on both sides, and the SVD of what stands between them by Jacobi rotations. Nothing waits for the device:
the status of every matrix says in the end what went wrong on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbf.ops._status import DONE, GIVEN_UP, status_of

LARGEST = 1024  # k of the cores [k, k] that the kernel for small SVDs takes


def rsvd(kernels: Any, matrices: Sequence[Tensor], seeds: Tensor, rank: int, oversample: int, n_iter: int) -> Any:
    """What operator ``rsvd`` returns, by the operators of ``kernels``; NotImplemented for a core beyond ``LARGEST``."""
    if any(min(rank + oversample, *M.shape[-2:]) > LARGEST for M in matrices):
        return NotImplemented
    flat = [M.reshape(-1, *M.shape[-2:]) for M in matrices]
    wide = [M.to(torch.promote_types(M.dtype, torch.float32)) for M in flat]
    columns = [min(rank + oversample, *M.shape[-2:]) for M in flat]
    keys = seeds.split([len(M) for M in flat])
    V = [kernels.sketch(key, M.shape[-1], k).to(M.dtype) for key, M, k in zip(keys, wide, columns, strict=True)]
    failed = torch.zeros_like(seeds, dtype=torch.bool)
    for _ in range(n_iter):
        rows, bad = _orthonormal(kernels, [(M.mT @ (M @ v)).mT for M, v in zip(wide, V, strict=True)])
        V, failed = [row.mT for row in rows], failed | bad
    left, bad = _orthonormal(kernels, [(M @ v).mT.double() for M, v in zip(wide, V, strict=True)])
    B = [(Q.to(M.dtype) @ M).double() for Q, M in zip(left, wide, strict=True)]  # Qᵀ M
    right, worse = _orthonormal(kernels, B)
    cores = [rows @ Q.mT for rows, Q in zip(B, right, strict=True)]
    return _triples(kernels, left, cores, right, rank, failed | bad | worse, (matrices,))


def svd_factors(kernels: Any, B: Sequence[Tensor], A: Sequence[Tensor], rank: int) -> Any:
    """What operator ``svd_factors`` returns: of ``B A = Leftᵀ (L_Bᵀ L_A) Right``.

    NotImplemented for r > m, r > n or beyond ``LARGEST``.
    """
    if any(b.shape[-1] > min(b.shape[-2], a.shape[-1], LARGEST) for b, a in zip(B, A, strict=True)):
        return NotImplemented
    lefts = [b.reshape(-1, *b.shape[-2:]).mT.double() for b in B]
    rights = [a.reshape(-1, *a.shape[-2:]).double() for a in A]
    left, bad = _orthonormal(kernels, lefts)
    right, worse = _orthonormal(kernels, rights)
    cores = [
        (Q @ rows.mT) @ (other @ R.mT) for rows, Q, other, R in zip(lefts, left, rights, right, strict=True)
    ]  # L_Bᵀ = Q rowsᵀ and L_A = rows Rᵀ
    return _triples(kernels, left, cores, right, rank, bad | worse, (B, A))


def _orthonormal(kernels: Any, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Orthonormal rows ``[count, k, d]`` of every stack, and for every matrix whether the kernel gave it up."""
    Q = [torch.empty_like(stack, memory_format=torch.contiguous_format) for stack in rows]
    return Q, kernels.orthonormal_rows(rows, Q) != DONE


def _triples(
    kernels: Any,
    left: Sequence[Tensor],
    cores: Sequence[Tensor],
    right: Sequence[Tensor],
    rank: int,
    failed: Tensor,
    inputs: tuple[Sequence[Tensor], ...],
) -> list[Tensor]:
    """``U = Leftᵀ U_core``, ``Vh = V_core Right``, signed, in the inputs' shapes and dtypes; and the status."""
    count, found = len(cores), []
    *parts, status = kernels.svd(list(cores))
    for n, (U_core, S, V_core) in enumerate(
        zip(parts[:count], parts[count : 2 * count], parts[2 * count :], strict=True)
    ):
        U, Vh = left[n].mT @ U_core[..., :rank], V_core[:, :rank] @ right[n]
        largest = Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        batch, dtype = inputs[0][n].shape[:-2], inputs[0][n].dtype
        found.append([(U * sign.mT), S[:, :rank], Vh * sign])
        found[-1] = [part.to(dtype).reshape(*batch, *part.shape[1:]) for part in found[-1]]
    given_up = failed | (status != DONE)
    finite = status_of(*inputs)
    codes = torch.where(given_up & (finite == DONE), GIVEN_UP, finite).to(torch.int32)
    return [*(t[0] for t in found), *(t[1] for t in found), *(t[2] for t in found), codes]
