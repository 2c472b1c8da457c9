"""Subspaces of a layer's inputs that methods protect: orthonormal bases, what lies outside of them, how they grow.

Gradient projection memory (GPM, arXiv 2103.09762, eqs. 5, 8 and 9). With U ``[d, k]``, Uᵀ U = I, and new statistics X
``[d, n]`` of the inputs or gradients of a layer::

    X' = X − U (Uᵀ X),   X' = Û S V̂ᵀ
    U ← [U, û_1 .. û_m],   m the smallest with ‖X‖² − ‖X'‖² + Σ_{j ≤ m} s_j² ≥ ε ‖X‖²

DualGPM (the authors' code of InfLoRA, arXiv 2404.00228): where U would be wider than d/2 its complement U⊥
``[d, d − k]`` is stored instead, X' = U⊥ (U⊥ᵀ X), and growing takes û_1 .. û_m out of U⊥. InfLoRA calls the two forms
"remove" and "retain"; both stand for the same projector.

Ours: directions in which X' has less than 10⁻⁶ of ‖X‖ are never taken, as they would be rounding of X, not data; what
is taken is made orthogonal to U once more. All of it is computed in fp64 and stored in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbf.methods.base import Factors, Method

NEGLIGIBLE = 1e-6
"""Singular values below this part of ‖X‖ are rounding: X is in fp32 as a rule."""


def signed(U: Tensor) -> Tensor:
    """The columns of U ``[d, k]``, each with its largest entry positive: one choice of sign for a singular vector."""
    if not U.numel():
        return U
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -U, U)


def left_vectors(X: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors of X.

    From X Xᵀ where X is wide, which is several times faster; in fp64 that settles S to 10⁻⁸ ‖X‖.

    Args:
        X: [d, n].
        rank: how many; None is all, min(d, n).

    Returns:
        U [d, rank] and S [rank], descending, in fp64; signed as by ``signed``.

    Raises:
        ValueError: X has inf or NaN.
    """
    if not bool(torch.isfinite(X).all()):
        raise ValueError(
            "the task's statistics of a layer have inf or NaN; look for batches without a label to learn, and run the "
            "model in a wider dtype"
        )
    X = X.double()
    if X.shape[0] <= X.shape[1]:
        eigenvalues, U = torch.linalg.eigh(X @ X.mT)
        U, S = U.flip(1), eigenvalues.flip(0).clamp_min(0).sqrt()
    else:
        U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return signed(U[:, :rank]), S[:rank]


def orthonormal(U: Tensor) -> Tensor:
    """Orthonormal columns with the nested spans of those of U ``[d, k]``, which are nearly so: QR with R_jj > 0."""
    Q, R = torch.linalg.qr(U)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def complement(U: Tensor) -> Tensor:
    """An orthonormal basis ``[d, d − k]`` of what is orthogonal to the orthonormal U ``[d, k]``."""
    return signed(torch.linalg.qr(U.double(), mode="complete").Q[:, U.shape[1] :]).to(U.dtype)


def project_out(X: Tensor, U: Tensor) -> Tensor:
    """X − U (Uᵀ X), for X ``[d, n]`` and orthonormal U ``[d, k]``, in the wider dtype of the two."""
    dtype = torch.promote_types(X.dtype, U.dtype)
    X, U = X.to(dtype), U.to(dtype)
    return X - U @ (U.mT @ X)


def root(C: Tensor) -> Tensor:
    """X with X Xᵀ = C ``[d, d]``, positive semi-definite: its singular values are those of the inputs themselves."""
    eigenvalues, V = torch.linalg.eigh(C.double())
    kept = torch.where(eigenvalues > NEGLIGIBLE * eigenvalues.norm(), eigenvalues, 0.0)
    return V * kept.sqrt()


def count_to_share(energies: Tensor, covered: float, total: float, share: float) -> int:
    """The smallest m with covered + Σ_{j ≤ m} energies_j ≥ share · total; all of them if that is never reached."""
    covered = max(covered, 0.0)  # as a difference it may be rounded below
    if covered >= share * total:
        return 0
    return min(int((covered + energies.cumsum(0) < share * total).sum()) + 1, len(energies))


@dataclass(frozen=True, eq=False)
class Subspace:
    """A protected subspace of R^d.

    Attributes:
        basis: orthonormal, [d, k]: of the subspace itself or, if ``retain``, of its complement.
        retain: whether ``basis`` spans what is *not* protected.
    """

    basis: Tensor
    retain: bool = False

    @staticmethod
    def empty(d: int, device: torch.device) -> Subspace:
        """Nothing of R^d is protected."""
        return Subspace(torch.zeros(d, 0, device=device))

    @property
    def dimension(self) -> int:
        """Of what is protected."""
        return self.basis.shape[0] - self.basis.shape[1] if self.retain else self.basis.shape[1]

    def to(self, device: torch.device) -> Subspace:
        return Subspace(self.basis.to(device), self.retain)

    def opposite(self) -> Subspace:
        """What is not protected, as if it were: ``outside`` of this is inside of that."""
        return Subspace(self.basis, not self.retain)

    def outside(self, X: Tensor) -> Tensor:
        """What X ``[d, n]`` has outside of the subspace, in fp64."""
        X, U = X.double(), self.basis.double()
        return U @ (U.mT @ X) if self.retain else project_out(X, U)

    def leading(self, X: Tensor, rank: int | None = None) -> Tensor:
        """Leading left singular vectors of what X has outside: fp64 ``[d, m]``, orthonormal, m ≤ rank.

        Fewer than ``rank`` where X has no more that is not negligible.
        """
        return self._clean(*left_vectors(self.outside(X), rank), X.double().norm())

    def extended(self, directions: Tensor) -> Subspace:
        """The subspace and ``directions`` [d, m], orthonormal and outside of it."""
        if not directions.shape[1]:
            return self
        if not self.retain:
            return Subspace(torch.cat([self.basis, directions.to(self.basis.dtype)], dim=1))
        within = orthonormal(self.basis.double().mT @ directions.double())
        return Subspace((self.basis.double() @ complement(within)).to(self.basis.dtype), retain=True)

    def grown(self, X: Tensor, share: float) -> Subspace:
        """The least extension by leading left singular vectors that holds ``share`` of the energy ‖X‖² of X [d, n]."""
        X = X.double()
        U, S = left_vectors(self.outside(X))
        total, energies = float(X.square().sum()), S.square()
        m = count_to_share(energies, total - float(energies.sum()), total, share)
        return self.extended(self._clean(U[:, :m], S[:m], X.norm()))

    def dual(self) -> Subspace:
        """The same, held as its complement if that is the narrower basis; never the other way round."""
        if self.retain or 2 * self.basis.shape[1] <= self.basis.shape[0]:
            return self
        return Subspace(complement(self.basis), retain=True)

    def _clean(self, U: Tensor, S: Tensor, norm: Tensor) -> Tensor:
        """The columns that are more than rounding, orthogonal to the subspace in fp64, too."""
        return orthonormal(self.outside(U[:, NEGLIGIBLE * norm < S]))


# -- between tasks: what a method keeps in its state -------------------------------------------------------------------


def to_state(spaces: Sequence[Subspace]) -> dict[str, Any]:
    """The entries ``basis`` and ``retain`` of a method's state."""
    retain = torch.tensor([space.retain for space in spaces], dtype=torch.int64)
    return {"basis": [space.basis for space in spaces], "retain": retain}


def from_state(state: Mapping[str, Any]) -> list[Subspace]:
    """The inverse of ``to_state``; none before there are any."""
    if "basis" not in state:
        return []
    return [Subspace(U, bool(retain)) for U, retain in zip(state["basis"], state["retain"].tolist(), strict=True)]


# -- and in a task: rows of A ------------------------------------------------------------------------------------------


def rows(U: Tensor, rank: int) -> Tensor:
    """Uᵀ as the rows of A ``[rank, d]`` in fp32; rows for which U ``[d, m]`` has no column are zero."""
    A = torch.zeros(rank, U.shape[0], device=U.device)
    A[: U.shape[1]] = U.mT[:rank]
    return A


def warn_if_exhausted(method: Method, i: int, A: Sequence[Tensor], way_out: str) -> None:
    """Say which layers learn with fewer rows than their rank in task i, or not at all."""
    lacking = [(layer.name, a.any(1).sum().item(), len(a)) for layer, a in zip(method.layers, A, strict=True)]
    lacking = [(name, found, r) for name, found, r in lacking if found < r]
    if lacking:
        listed = ", ".join(f"{name} ({found} of {r})" for name, found, r in lacking[:3])
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        warnings.warn(
            f"method {method.name!r}, task {i}: the task has fewer directions outside of what is protected than the "
            f"rank in {len(lacking)} of {len(A)} layers: {listed}{more}. The rest of A is zero and learns nothing. "
            f"{way_out}",
            stacklevel=2,
        )


def without_zero_rows(factors: Factors) -> Factors:
    """The same B A without the rows of A that are zero, nor the columns of B beside them."""
    kept = [A.any(1) for A in factors.A]
    return Factors(
        [A[rows] for A, rows in zip(factors.A, kept, strict=True)],
        [B[:, columns] for B, columns in zip(factors.B, kept, strict=True)],
    )
