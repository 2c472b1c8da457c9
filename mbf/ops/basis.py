"""``orthonormal_rows``: the orthonormal start of a task, Q of every A (SLAO, Algorithm 1, step 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from mbf.ops._cuda import library
from mbf.ops._gpu import with_cuda
from mbf.ops._inputs import by_device, check_matrix
from mbf.ops._library import define, native_serves, reference_only
from mbf.ops._status import given_up, matrix_at, status_of
from mbf.ops.empty_like_all import empty_like_all_ref


def orthonormal_rows_ref(A: Tensor) -> Tensor:
    """``Aᵀ = Qᵀ R`` by Householder QR in fp64, signed so that ``R_jj > 0``; returns Q ``[..., r, d]`` in A's dtype.

    Scaling a row of A by a positive number does not change Q, so rows are scaled to max-norm 1 first: nothing
    overflows, and R_jj is the part of row j that is independent of the rows before it.
    """
    rows = A.double()
    largest = rows.abs().amax(-1, keepdim=True)
    rows = rows / torch.where(largest == 0, 1.0, largest)
    Qt, R = torch.linalg.qr(rows.mT)
    R_jj = R.diagonal(dim1=-2, dim2=-1)
    Q = (Qt * torch.where(R_jj < 0, -1.0, 1.0).unsqueeze(-2)).mT.contiguous()

    dependent = (R_jj.abs() <= _rounding(rows)).any(-1)
    for index in dependent.nonzero().tolist():
        Q[tuple(index)] = _complete(rows[tuple(index)])
    return Q.to(A.dtype)


def _rounding(rows: Tensor) -> Tensor:
    """The length below which what is left of a row ``[..., d]`` is rounding error: d ε of its norm."""
    return torch.linalg.vector_norm(rows, dim=-1) * (rows.shape[-1] * torch.finfo(rows.dtype).eps)


def _complete(rows: Tensor) -> Tensor:
    """Gram-Schmidt, every projection twice; a dependent row of ``rows [r, d]`` gives way to the unit vector that is
    furthest from the rows before it (the first of equals)."""
    Q = torch.zeros_like(rows)
    rounding = _rounding(rows)
    for j, row in enumerate(rows):
        rest = row - (Q @ row) @ Q
        if torch.linalg.vector_norm(rest) <= rounding[j]:
            distance = 1 - Q.square().sum(0)
            furthest = (distance >= distance.max() - 1e-9).nonzero()[0]  # so that equals are equal despite rounding
            unit = torch.zeros_like(row).index_fill_(0, furthest, 1.0)
            rest = unit - (Q @ unit) @ Q
        rest = rest - (Q @ rest) @ Q
        Q[j] = rest / torch.linalg.vector_norm(rest)
    return Q


def _operator_ref(A: Sequence[Tensor]) -> list[Tensor]:
    return [*(orthonormal_rows_ref(matrix) for matrix in A), status_of(A)]


def _fake(A: Sequence[Tensor]) -> list[Tensor]:
    return [*empty_like_all_ref(A), A[0].new_empty(sum(t.shape[:-2].numel() for t in A), dtype=torch.int32)]


def _cuda(A: Sequence[Tensor]) -> list[Tensor]:
    Q = empty_like_all_ref(A)
    return [*Q, library().orthonormal_rows(A, Q)]


# Q of every A, and in the end the status of every matrix.
define("orthonormal_rows(Tensor[] A) -> Tensor[]", _operator_ref, _fake, cuda=with_cuda(_cuda))


@overload
def orthonormal_rows(A: Tensor) -> Tensor: ...
@overload
def orthonormal_rows(A: Sequence[Tensor]) -> list[Tensor]: ...
def orthonormal_rows(A: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Orthonormalise the rows of A by QR: ``A = Rᵀ Q`` with R upper triangular, ``R_jj > 0`` and ``Q Qᵀ = I``.

    With that sign rule Q is unique: Householder QR of Aᵀ and Cholesky QR (``A Aᵀ = Rᵀ R``) agree, and orthonormal rows
    come back unchanged. A row that depends on the rows before it to within rounding, a zero row among them, has
    ``R_jj = 0`` and leaves its row of Q open. It becomes the part of a unit vector (the one furthest from the rows
    before it) that is orthogonal to them, so Q is orthonormal and still spans every row of A.

    All matrices are one call of a kernel: Cholesky QR with the Gram matrix in fp64 (on the CPU from sums of products in
    fp32, where the rows are far from dependent), a second round of it where the condition asks for that, and
    Householder QR in fp64 (the reference) for matrices beyond a condition of about 1e6. The result is as near to the
    exact one as torch's QR in A's dtype, and carries no gradient.

    Args:
        A: ``[..., r, d]`` with 1 ≤ r ≤ d in fp64, fp32, bf16 or fp16; or a list of them, which may differ in shape,
            dtype and device.

    Returns:
        Q with A's shape, dtype and device; a list for a list, whose tensors may be parts of one allocation.

    Raises:
        TypeError: for anything but such tensors.
        ValueError: for less than a matrix, r > d, NaN or infinity, with the index in the list.
    """
    if isinstance(A, Tensor):
        return _orthonormal_rows([A], lambda n: "A")[0]
    if not isinstance(A, (list, tuple)):
        raise TypeError(f"A: got {type(A).__name__}; pass a tensor or a list of tensors")
    return _orthonormal_rows(list(A), lambda n: f"A[{n}]")


def _orthonormal_rows(A: list[Tensor], name: Callable[[int], str]) -> list[Tensor]:
    def check() -> None:
        for n, matrix in enumerate(A):
            check_rows(matrix, name(n))

    if native_serves(A):
        try:
            return _on_one_device(A, name) if A else []
        except (RuntimeError, TypeError):
            check()
            raise
    check()
    found: dict[int, Tensor] = {}
    for here in by_device(A):
        Q = _on_one_device([A[n] for n in here], [name(n) for n in here].__getitem__)
        found.update(zip(here, Q, strict=True))
    return [found[n] for n in range(len(A))]


def _on_one_device(A: list[Tensor], name: Callable[[int], str]) -> list[Tensor]:
    with torch.no_grad():
        *Q, status = _operator_ref(A) if reference_only() else torch.ops.mbf.orthonormal_rows.default(A)
        settle(A, Q, status.tolist(), name)
    return Q


def check_rows(matrix: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless ``matrix [..., r, d]`` can have orthonormal rows."""
    check_matrix(matrix, name)
    r, d = matrix.shape[-2:]
    if not 1 <= r <= d:
        raise ValueError(f"{name}: has shape {tuple(matrix.shape)}; only 1 ≤ r ≤ d rows can be orthonormal, r is {r}")


def settle(A: Sequence[Tensor], Q: Sequence[Tensor], status: Sequence[int], name: Callable[[int], str]) -> None:
    """Raise ValueError where the ``status`` of a matrix says that it isn't finite; write into Q what was given up."""
    for n, place in given_up(status, A, name):
        matrix_at(Q[n], place).copy_(orthonormal_rows_ref(matrix_at(A[n], place)))  # Q is contiguous: a view
