"""Protected subspaces: projections, growth to a share of energy, and the two ways to hold the same projector."""

import pytest
import torch

from mbf.methods._subspaces import (
    Subspace,
    complement,
    count_to_share,
    from_state,
    left_vectors,
    project_out,
    root,
    rows,
    signed,
    to_state,
    warn_if_exhausted,
)
from tests.methods.plain import method

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def matrix(d, n, seed=0, decay=0.7, rank=None):
    """[d, n] with singular values 1, decay, decay², .. and random vectors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(d, n) if rank is None else rank
    U = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    return ((U * decay ** torch.arange(rank)) @ V.mT).float()


def projector(space):
    """P of the protected subspace, whichever way it is held."""
    P = space.basis.double() @ space.basis.double().mT
    return torch.eye(len(P), dtype=torch.float64) - P if space.retain else P


def subspace(d, k, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Subspace(torch.linalg.qr(torch.randn(d, k, generator=generator)).Q)


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_left_vectors_are_those_of_the_svd_and_their_signs_are_settled():
    X = matrix(12, 9)
    U, S = left_vectors(X, 4)
    torch.testing.assert_close(S, 0.7 ** torch.arange(4, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(U.mT @ U, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((U.mT @ X.double()).norm(dim=1), S, **CLOSE)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(left_vectors(-X, 4)[0], U, **CLOSE)
    torch.testing.assert_close(signed(-U), U)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_an_error(value):
    X = matrix(5, 5)
    X[1, 2] = value
    with pytest.raises(ValueError, match=r"inf or NaN; look for batches"):
        left_vectors(X)


@pytest.mark.parametrize("k", [0, 1, 5, 11, 12])
def test_complement_is_the_rest_of_the_space(k):
    U = subspace(12, k).basis
    rest = complement(U)
    assert rest.shape == (12, 12 - k)
    both = torch.cat([U, rest], dim=1)
    torch.testing.assert_close(both.mT @ both, torch.eye(12), **CLOSE)


def test_project_out_is_the_dense_projection():
    U, X = subspace(12, 5).basis, matrix(12, 7)
    torch.testing.assert_close(project_out(X, U), (torch.eye(12) - U @ U.mT) @ X, **CLOSE)
    assert project_out(X.double(), U).dtype == torch.float64


def test_root_is_a_root_without_the_rounding_of_c():
    X = matrix(10, 40, decay=0.5)
    C = X @ X.mT
    R = root(C)
    torch.testing.assert_close(R @ R.mT, C.double(), **CLOSE)
    low = matrix(10, 3)
    assert torch.linalg.matrix_rank(root(low @ low.mT), rtol=1e-8) == 3
    assert not root(torch.zeros(4, 4)).any()


def test_the_count_is_the_smallest_that_reaches_the_share():
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    for share, expected in [(0.0, 0), (0.39, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.9, 3), (0.95, 4), (1.0, 4)]:
        assert count_to_share(energies, 0.0, 10.0, share) == expected
    assert count_to_share(energies, 10.0, 20.0, 0.5) == 0
    assert count_to_share(energies, 10.0, 20.0, 0.71) == 2
    assert count_to_share(energies, 0.0, 100.0, 0.99) == 4
    assert count_to_share(energies[:0], 0.0, 1.0, 0.5) == 0


# -- growth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 0.999])
def test_growth_is_the_least_that_holds_the_share(share, retain):
    """Against a dense evaluation that adds one vector after another."""
    d, X = 20, matrix(20, 50, seed=3, decay=0.8)
    space = subspace(d, 12)
    if retain:
        space = space.dual()
        assert space.retain
    grown = space.grown(X, share)
    P = projector(space)
    U = torch.linalg.svd((torch.eye(d, dtype=torch.float64) - P) @ X.double()).U
    m, total = 0, X.double().square().sum()
    while (P @ X.double()).square().sum() < share * total:
        P = P + torch.outer(U[:, m], U[:, m])
        m += 1
    assert grown.dimension == space.dimension + m and grown.retain == retain
    torch.testing.assert_close(projector(grown), P, **CLOSE)
    torch.testing.assert_close(grown.basis.mT @ grown.basis, torch.eye(grown.basis.shape[1]), **CLOSE)
    if not retain:
        assert torch.equal(grown.basis[:, :12], space.basis)


def test_removing_and_retaining_are_the_same_projector_through_many_tasks():
    """Grown task by task as a basis and as a complement, from the moment that it is held so."""
    plain = dual = Subspace.empty(24, torch.device("cpu"))
    switched = False
    for task in range(6):
        X = matrix(24, 60, seed=10 + task, decay=0.8)
        torch.testing.assert_close(dual.outside(X), plain.outside(X), **CLOSE)
        torch.testing.assert_close(dual.leading(X, 3), plain.leading(X, 3), rtol=1e-4, atol=1e-4)
        plain, dual = plain.grown(X, 0.9), dual.grown(X, 0.9).dual()
        switched |= dual.retain
        assert dual.dimension == plain.dimension and dual.basis.shape[1] <= 12
        torch.testing.assert_close(projector(dual), projector(plain), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dual.basis.mT @ dual.basis, torch.eye(dual.basis.shape[1]), **CLOSE)
    assert switched and not plain.retain and 12 < plain.dimension <= 24


def test_a_wide_basis_is_held_as_its_complement_and_a_narrow_one_is_not():
    assert not subspace(12, 6).dual().retain
    wide = subspace(12, 7)
    assert wide.dual().retain and wide.dual().basis.shape == (12, 5) and wide.dual().dimension == 7
    torch.testing.assert_close(projector(wide.dual()), projector(wide), **CLOSE)
    assert wide.dual().dual().retain


@pytest.mark.parametrize("retain", [False, True])
def test_leading_directions_are_outside_orthonormal_and_those_of_the_residual(retain):
    space, X = subspace(16, 9), matrix(16, 30, seed=5)
    space = space.dual() if retain else space
    U = space.leading(X, 3)
    expected = torch.linalg.svd(X.double() - projector(space) @ X.double()).U[:, :3]
    torch.testing.assert_close((U.mT @ expected).abs(), torch.eye(3, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(U.mT @ U, torch.eye(3, dtype=torch.float64))
    assert (projector(space) @ U).norm() < 1e-6


@pytest.mark.parametrize("retain", [False, True])
def test_rounding_is_never_taken_for_a_direction(retain):
    """X lies within what is protected: in fp32 its residual is not zero, but nothing in it is data."""
    space = subspace(16, 9)
    X = space.basis @ matrix(9, 40, seed=6)
    space = space.dual() if retain else space
    assert space.outside(X).abs().max() > 0
    assert space.leading(X, 4).shape == (16, 0)
    assert space.grown(X, 1.0) is space


@pytest.mark.parametrize("retain", [False, True])
def test_what_is_taken_is_outside_even_where_rounding_is_near(retain):
    """A direction with 3·10⁻⁶ of the norm, beside a residual of 10⁻⁷ that is rounding: orthogonal all the same."""
    torch.manual_seed(2)
    space = Subspace(torch.linalg.qr(torch.randn(200, 90)).Q)
    new = space.leading(torch.randn(200, 1))
    X = (space.basis @ torch.linalg.qr(torch.randn(90, 90)).Q[:, :30]).double()
    X = (X + 2e-5 * new @ torch.randn(1, 30).double() / 30**0.5).float()
    space = Subspace(complement(space.basis), retain=True) if retain else space
    found = space.leading(X, 1)
    assert found.shape == (200, 1) and abs(float(new.mT @ found)) > 0.9
    assert (projector(space) @ found).norm() < 2e-7
    grown = space.grown(X, 1.0)
    torch.testing.assert_close(grown.basis.mT @ grown.basis, torch.eye(grown.basis.shape[1]), rtol=0, atol=1e-6)


def test_a_share_of_one_takes_every_direction_of_the_data_and_no_other():
    X = matrix(16, 40, rank=5)
    space = Subspace.empty(16, torch.device("cpu")).grown(X, 1.0)
    assert space.dimension == 5
    assert space.outside(X).norm() < 1e-5 * X.norm()


def test_the_whole_space_is_held_as_nothing_left():
    space = Subspace.empty(8, torch.device("cpu")).grown(matrix(8, 30, decay=0.9), 1.0).dual()
    assert space.dimension == 8 and space.retain and space.basis.shape == (8, 0)
    X = matrix(8, 9, seed=2)
    assert not space.outside(X).any() and space.leading(X, 2).shape == (8, 0)
    assert space.grown(X, 0.99) is space and space.dual() is space


def test_state_keeps_both_forms():
    spaces = [subspace(12, 3), subspace(12, 9).dual(), Subspace.empty(5, torch.device("cpu"))]
    assert from_state({}) == []
    again = from_state({"other": 1, **to_state(spaces)})
    assert [space.retain for space in again] == [False, True, False]
    assert [space.dimension for space in again] == [3, 9, 0]
    assert all(torch.equal(a.basis, b.basis) for a, b in zip(again, spaces, strict=True))
    assert not spaces[1].opposite().retain and spaces[1].opposite().dimension == 3
    assert spaces[1].to(torch.device("meta")).basis.is_meta and spaces[1].to(torch.device("meta")).retain


# -- rows of A ---------------------------------------------------------------------------------------------------------


def test_rows_without_a_direction_are_zero_and_said_so():
    U = subspace(40, 3).basis.double()
    A = rows(U, 4)
    assert A.dtype == torch.float32 and A.shape == (4, 40)
    torch.testing.assert_close(A[:3], U.mT.float())
    assert not A[3].any()
    torch.testing.assert_close(rows(U, 2), U.mT[:2].float())
    rule = method("seqlora")
    full = [torch.ones(4, 40), torch.ones(4, 40), torch.ones(4, 17)]
    with pytest.warns(UserWarning, match=r"'seqlora', task 3: .* in 1 of 3 layers: layer1 \(3 of 4\)\..*\. Do it\."):
        warn_if_exhausted(rule, 3, [full[0], A, full[2]], "Do it.")


def test_nothing_is_said_while_there_is_room(recwarn):
    warn_if_exhausted(method("seqlora"), 1, [torch.ones(4, 40)] * 3, "Do it.")
    assert not recwarn.list
