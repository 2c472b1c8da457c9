"""OPCM: orthogonality of the projection, the norm rule, and its link to 1/√t."""

import math

import pytest
import torch

from mbf.methods.opcm import project_out
from tests.methods.plain import assert_same, learn, method


def stacked(factors, origin):
    return torch.cat([(t - o).flatten() for t, o in zip([*factors.A, *factors.B], [*origin.A, *origin.B], strict=True)])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_projection_is_orthogonal_to_the_merged_vector(shape, alpha):
    torch.manual_seed(3)
    D = torch.randn(shape[0], 5) @ torch.randn(5, shape[1])  # rank deficient: the null space must not matter
    tau = torch.randn(shape)
    projected = project_out(tau, D, alpha)
    assert abs((D * projected).sum()) <= 1e-4 * D.norm() * tau.norm()
    assert 0.1 * tau.norm() < projected.norm() < tau.norm()
    U, _, Vh = torch.linalg.svd(D, full_matrices=False)
    k = 5 if alpha == 1 else 1
    assert (U[:, :k].mT @ projected @ Vh[:k].mT).norm() < 1e-4 * tau.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [128, 1024])
def test_half_precision_is_projected_too(dtype, width):
    D, tau = torch.randn(8, width).to(dtype), torch.randn(8, width) / width**0.5
    tau = (tau + D.float() / width).to(dtype)
    before, after = (
        torch.nn.functional.cosine_similarity(D.double().flatten(), one.double().flatten(), dim=0)
        for one in (tau, project_out(tau, D, 0.5))
    )
    assert abs(before) > 0.02 and abs(after) < 2e-3


def test_zero_merged_vector_projects_nothing():
    tau = torch.randn(3, 4)
    assert torch.equal(project_out(tau, torch.zeros(3, 4), 0.5), tau)


def test_first_task_is_kept_and_norms_follow_their_mean():
    rule = method("opcm")
    origin = rule.current.clone()
    norms = []
    for i in range(1, 6):
        start, finetuned, merged = learn(rule, i)
        assert_same(start.A, origin.A)
        assert_same(start.B, origin.B)
        norms.append(stacked(finetuned, origin).norm())
        if i == 1:
            assert_same(merged.B, finetuned.B, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stacked(merged, origin).norm(), torch.stack(norms).mean(), rtol=1e-4, atol=1e-4)


def test_orthogonal_tasks_of_equal_norm_give_the_square_root_of_t():
    rule = method("opcm", r=2)
    for layer in rule.layers:
        layer.A.data.zero_()
    for i in range(1, 4):
        finetuned = rule.current.clone()
        for A, B in zip(finetuned.A, finetuned.B, strict=True):
            A.zero_()
            B.zero_()
            A[0, i] = A[1, i + 8] = 1.0
            B[i, 0] = B[i + 8, 1] = 1.0
        learn(rule, i, finetuned)
        assert rule.state["lam"] == pytest.approx(math.sqrt(i), rel=1e-5)
