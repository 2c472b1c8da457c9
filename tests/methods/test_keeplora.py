"""KeepLoRA: A in what W and old tasks leave of the gradient, exact invariance there, both variants, and the sketch."""

import itertools

import pytest
import torch

import mbf
from mbf.methods import get
from mbf.methods._passes import mean_gradients
from mbf.methods._subspaces import Subspace, root
from mbf.methods.keeplora import SketchedResidual, WholeResidual
from tests.continual.tiny import batch, batches, logits, peft_model, train
from tests.methods.plain import WIDTHS, assert_same, begin, data, deltas, end, method

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VARIANTS = ["llava", "clip"]
pytestmark = pytest.mark.filterwarnings("ignore:method 'keeplora'")


def learn_B(rule, i):
    """Task i with a random step of B over the A that the method chose; returns A and B − B_0."""
    begin(rule, i)
    A = [layer.A.detach().clone() for layer in rule.layers]
    generator, steps = torch.Generator().manual_seed(100 * i), []
    for layer in rule.layers:
        steps.append(torch.randn(layer.B.shape, generator=generator))
        layer.B.data.add_(steps[-1])
    end(rule, i)
    return A, steps


def projectors(rule):
    held = []
    for U, retain in zip(rule.state["basis"], rule.state["retain"], strict=True):
        P = U.double() @ U.double().mT
        held.append(torch.eye(len(P), dtype=torch.float64) - P if retain else P)
    return held


def dense_gradients(rule, loader):
    """G of every layer by autograd over W + s B A: the mean over batches."""
    W = [(layer.W + layer.delta()).requires_grad_() for layer in rule.layers]
    total = [torch.zeros_like(w) for w in W]
    for one in loader:
        x = one["inputs"]
        loss = sum((x[..., : w.shape[1]] @ w.mT).square().sum() for w in W) / (2 * len(x))
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, W), strict=True)]
    return [t.double() / len(loader) for t in total]


def plain_growth(P, X, share):
    """GPM one vector after another: P + û ûᵀ until ‖P X‖² ≥ share ‖X‖²."""
    X = X.double()
    for u in torch.linalg.svd(X - P @ X).U.mT:
        if (P @ X).square().sum() >= share * X.square().sum():
            break
        P = P + torch.outer(u, u)
    return P


def weights_parts(rule, share):
    """P of the leading left singular vectors of every Wᵀ."""
    zeros = [torch.zeros(d_in, d_in, dtype=torch.float64) for _, d_in in WIDTHS]
    return [plain_growth(zero, layer.W.mT, share) for zero, layer in zip(zeros, rule.layers, strict=True)]


# -- the start of a task -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gradient", ["full", "sketch"])
def test_a_has_orthonormal_rows_with_nothing_in_what_is_protected(variant, gradient):
    """A U = 0 and A Aᵀ = I, in task 1 against the weights' part alone."""
    rule = method("keeplora", r=3, variant=variant, gradient=gradient, weight_share=0.5, share=0.7)
    for i in (1, 2, 3):
        begin(rule, i)
        for layer, P in zip(rule.layers, projectors(rule), strict=True):
            assert P.trace() > 1 and not layer.A.requires_grad and layer.B.requires_grad
            torch.testing.assert_close(layer.A @ layer.A.mT, torch.eye(3), **CLOSE)
            assert (layer.A.double() @ P).norm() < 1e-5
        for layer in rule.layers:
            layer.B.data.add_(torch.randn_like(layer.B))
        end(rule, i)


def test_a_holds_the_leading_directions_of_the_residual_gradient():
    """Against autograd through dense weights that hold the sum of the earlier tasks."""
    rule = method("keeplora", weight_share=0.4, share=0.6)
    P = weights_parts(rule, 0.4)
    for i in (1, 2, 3):
        G = dense_gradients(rule, data(i))
        A, _ = learn_B(rule, i)
        for a, g, p in zip(A, G, P, strict=True):
            expected = torch.linalg.svd(g.mT - p @ g.mT).U[:, :4]
            torch.testing.assert_close((a.double() @ expected).abs(), torch.eye(4).double(), rtol=2e-3, atol=2e-3)
            assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
        P = projectors(rule)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_task_starts_as_the_function_before_it(variant):
    """Bit-close before the first step, though B is not zero in the variant for CLIP."""
    rule = method("keeplora", r=3, variant=variant, weight_share=0.3, share=0.5)
    for i in (1, 2, 3):
        before = [layer.delta() for layer in rule.layers]
        begin(rule, i)
        assert all(bool(layer.B.any()) == (variant == "clip") for layer in rule.layers)
        assert_same([layer.delta() for layer in rule.layers], before, rtol=1e-6, atol=1e-6)
        for layer in rule.layers:
            layer.B.data.add_(torch.randn_like(layer.B))
        end(rule, i)


@pytest.mark.parametrize("gradient", ["full", "sketch"])
def test_b_of_clip_is_that_of_the_gradients_svd(gradient):
    """B_0ᵀ = S_r V̂_rᵀ, so that B_0 A is the best approximation of the projected gradient."""
    rule = method("keeplora", variant="clip", gradient=gradient, weight_share=0.4)
    G = dense_gradients(rule, data(1))
    begin(rule, 1)
    for layer, g, P in zip(rule.layers, G, projectors(rule), strict=True):
        U, S, Vh = torch.linalg.svd(g - g @ P, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close((layer.B @ layer.A).detach().double(), best, rtol=1e-3, atol=1e-3 * float(S[0]))


# -- what a task can change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_within_what_is_protected_are_mapped_as_before(variant):
    """Any x in span(U): the same output before and after the task."""
    rule = method("keeplora", r=3, variant=variant, weight_share=0.4, share=0.8)
    for i in (1, 2, 3):
        before = [layer.delta() for layer in rule.layers]
        begin(rule, i)
        P = projectors(rule)
        for layer in rule.layers:
            layer.B.data.add_(torch.randn_like(layer.B))
        end(rule, i)
        for layer, old, p in zip(rule.layers, before, P, strict=True):
            x = p.float() @ torch.randn(len(p), 5, generator=torch.Generator().manual_seed(i))
            change = layer.delta() - old
            assert (change @ x).norm() < 1e-5 * change.norm() * x.norm()
            assert change.norm() > 0.1 and x.norm() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("i", [1, 2])
def test_a_step_on_b_is_the_gradient_projected_on_the_rows_of_a(i, variant):
    """SGD on B: dW = −η s² G AᵀA."""
    rule, rate = method("keeplora", variant=variant, weight_share=0.4, share=0.6), 0.1
    if i == 2:
        learn_B(rule, 1)
    before = [layer.delta() for layer in rule.layers]
    loader = data(9)[:1]
    G = dense_gradients(rule, loader)
    parameters = begin(rule, i)
    optimizer = torch.optim.SGD(parameters, lr=rate)
    rule.model(loader[0]["inputs"]).loss.backward()
    optimizer.step()
    for layer, old, g in zip(rule.layers, before, G, strict=True):
        A = layer.A.detach().double()
        expected = -rate * layer.scale**2 * g @ A.mT @ A
        torch.testing.assert_close((layer.delta() - old).double(), expected, rtol=1e-3, atol=1e-4)
        assert expected.norm() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_shipped_is_the_sum_of_what_was_learnt(variant):
    """Σ (B_i − B_0) A_i: what B started from is not part of it; and it is what was computed inside the task."""
    rule, total = (
        method("keeplora", r=3, variant=variant, weight_share=0.3, share=0.5),
        [torch.zeros(w) for w in WIDTHS],
    )
    for i in (1, 2, 3):
        begin(rule, i)
        steps = [torch.randn_like(layer.B) for layer in rule.layers]
        for layer, step in zip(rule.layers, steps, strict=True):
            layer.B.data.add_(step)
        total = [t + step @ layer.A.detach() for t, step, layer in zip(total, steps, rule.layers, strict=True)]
        inside = [layer.delta() for layer in rule.layers]
        end(rule, i)
        assert "B_0" not in rule.state
        for layer, now, was, dW in zip(rule.layers, deltas(rule.current), inside, total, strict=True):
            torch.testing.assert_close(now, dW, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(was, layer.scale * dW, rtol=1e-4, atol=1e-4)
    assert [A.shape[0] for A in rule.current.A] == [9, 9, 9]


# -- how the subspace grows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.6, 0.99])
def test_the_first_subspace_is_the_weights(share):
    """Leading left singular vectors of Wᵀ: the input side."""
    rule = method("keeplora", weight_share=share)
    begin(rule, 1)
    for P, expected in zip(projectors(rule), weights_parts(rule, share), strict=True):
        torch.testing.assert_close(P, expected, rtol=1e-4, atol=1e-4)
        assert (expected.trace() > 0) == (share > 0)


@pytest.mark.parametrize("gradient", ["full", "sketch"])
def test_the_subspace_grows_by_the_trained_models_gradient(gradient):
    """Against plain GPM on autograd's gradients after the task; a sketch as wide as the layer finds the same."""
    rule = method("keeplora", weight_share=0.4, share=0.8, gradient=gradient)
    P = weights_parts(rule, 0.4)
    for i in (1, 2, 3):
        learn_B(rule, i)
        G = dense_gradients(rule, data(i))
        expected = [plain_growth(p, g.mT, 0.8) for p, g in zip(P, G, strict=True)]
        for found, p in zip(projectors(rule), expected, strict=True):
            torch.testing.assert_close(found, p, rtol=2e-3, atol=2e-3)
        P = projectors(rule)


def test_the_subspace_of_clip_grows_by_the_inputs():
    rule = method("keeplora", variant="clip", weight_share=0.4, share=0.8)
    begin(rule, 1)
    P = projectors(rule)
    end(rule, 1)
    x = torch.cat([one["inputs"] for one in data(1)]).flatten(0, 1)
    for layer, p, found in zip(rule.layers, P, projectors(rule), strict=True):
        cut = x[:, : layer.A.shape[1]].double()
        torch.testing.assert_close(found, plain_growth(p, cut.mT, 0.8), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found, plain_growth(p, root(cut.mT @ cut), 0.8), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gradient", ["full", "sketch"])
def test_the_basis_is_orthonormal_and_protects_no_less_than_before(variant, gradient):
    """Uᵀ U = I after every extension, k non-decreasing, and what was protected stays so."""
    rule, dimensions, before = (
        method("keeplora", variant=variant, gradient=gradient, weight_share=0.3, share=0.9),
        [],
        None,
    )
    for i in range(1, 6):
        learn_B(rule, i)
        for U in rule.state["basis"]:
            assert 2 * U.shape[1] <= U.shape[0]
            torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), **CLOSE)
        now = projectors(rule)
        dimensions.append([round(float(P.trace())) for P in now])
        for P, old in zip(now, before or now, strict=True):
            torch.testing.assert_close(P @ old, old, rtol=1e-4, atol=1e-4)
        before = now
    assert all(a <= b for old, new in itertools.pairwise(dimensions) for a, b in zip(old, new, strict=True))
    assert dimensions[-1] > dimensions[0] and bool(rule.state["retain"].any())


# -- the sketch --------------------------------------------------------------------------------------------------------


def gradient_of(d_out, d_in, decay, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d_out, d_out, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(d_in, d_out, generator=generator)).Q
    return (U * decay ** torch.arange(d_out)) @ V.mT


def sketch_of(space, G, columns, seed=1):
    Omega = torch.randn(len(G), columns + 8, generator=torch.Generator().manual_seed(seed))
    Y = G.mT @ Omega
    P = space.basis @ space.basis.mT
    Q = torch.linalg.svd(Y[:, :-8] - P @ Y[:, :-8], full_matrices=False).U
    U, S, _ = torch.linalg.svd(P @ Y[:, :-8], full_matrices=False)
    Q_P = U[:, S > 1e-5]
    return SketchedResidual(space, Y[:, -8:], Q, Q_P, Q.mT @ G.mT, Q_P.mT @ G.mT)


def test_a_sketch_as_wide_as_the_gradient_is_the_gradient():
    G = gradient_of(20, 32, 0.8)
    space = Subspace.empty(32, G.device).grown(gradient_of(20, 32, 0.8, seed=5).mT, 0.7)
    full, sketched = WholeResidual(space, G).leading(12), sketch_of(space, G, 20).leading(12)
    torch.testing.assert_close(sketched[0][:, :8], full[0][:, :8], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sketched[1].norm(dim=1), full[1].norm(dim=1), rtol=1e-3, atol=1e-4)


def test_a_narrow_sketch_finds_the_leading_directions_and_the_energies():
    G = gradient_of(60, 90, 0.93)
    X = G.double().mT
    space = Subspace.empty(90, G.device).grown(gradient_of(60, 90, 0.93, seed=5).mT, 0.9)
    outside = space.outside(X).square().sum()
    covered = X.square().sum() - outside
    best = torch.linalg.svdvals(space.outside(X))[:4].square().sum()
    estimates = []
    for seed in range(40):
        sketched = sketch_of(space, G, 16, seed)
        U, SV = sketched.leading(16)
        assert U.shape == (90, 16) and (space.basis.double().mT @ U).norm() < 1e-5
        torch.testing.assert_close(U.mT @ U, torch.eye(16).double(), **CLOSE)
        torch.testing.assert_close(SV, U.mT @ X, **CLOSE)
        assert (U[:, :4].mT @ X).square().sum() > 0.8 * best
        estimates.append([a / b for a, b in zip(sketched.energies(), (covered, outside), strict=True)])
        grown = sketched.grown(0.6)
        assert 0.55 < (grown.basis.double().mT @ X).square().sum() / X.square().sum() < 0.7
        assert torch.equal(grown.basis[:, : space.dimension], space.basis)
    estimates = torch.tensor(estimates).float()
    torch.testing.assert_close(estimates.mean(0), torch.ones(2), rtol=0.03, atol=0)
    assert (estimates.std(0) > 0).all() and (estimates.std(0) < 0.08).all()


def test_the_sketch_of_a_run_is_that_of_the_formula():
    """Two passes over the data of a method, against products with the whole gradient."""
    rule = method("keeplora", gradient="sketch", sketch=12, weight_share=0.4, r=3)
    rule.merged = rule.current.clone()
    rule.before_task(1, data(1))
    Omega = rule._sketch(7)
    assert [tuple(o.shape) for o in Omega] == [(24, 20), (24, 20), (33, 20)]
    assert abs(float(torch.cat([o.flatten() for o in Omega]).std()) - 1) < 0.1
    assert_same(rule._sketch(7), Omega)
    assert (rule._sketch(8)[0] - Omega[0]).norm() > 1
    found = list(rule._residuals(data(1), seed=7))
    loose = {"rtol": 1e-3, "atol": 1e-3}
    for one, P, o, G in zip(found, projectors(rule), Omega, mean_gradients(rule, data(1)), strict=True):
        Y = (G.mT @ o).double()
        torch.testing.assert_close(one.Y_2.double(), Y[:, 12:], **loose)
        for Q, Z, part in ((one.Q, one.Z, Y[:, :12] - P @ Y[:, :12]), (one.Q_P, one.Z_P, P @ Y[:, :12])):
            torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1]), **CLOSE)
            torch.testing.assert_close(Q.double() @ (Q.double().mT @ part), part, **loose)
            torch.testing.assert_close(Z, Q.mT @ G.mT, **loose)
        assert Q.shape[1] > 1


def test_a_sketch_is_never_narrower_than_the_rank_needs_and_never_wider_than_the_layer():
    rule = method("keeplora", gradient="sketch", sketch=1, r=3)
    rule.merged = rule.current.clone()
    assert [o.shape[1] - 8 for o in rule._sketch(1)] == [11, 11, 11]
    rule = method("keeplora", gradient="sketch", sketch=500, r=3)
    rule.merged = rule.current.clone()
    assert [o.shape[1] - 8 for o in rule._sketch(1)] == [24, 24, 17]


def test_a_task_adds_at_most_the_width_of_the_sketch():
    rule = method("keeplora", gradient="sketch", sketch=1, r=3, weight_share=0.1, share=1.0)
    before = None
    for i in (1, 2):
        begin(rule, i)
        before = [P.trace() for P in projectors(rule)]
        end(rule, i)
    assert all(0 < float(P.trace() - old) < 11.01 for P, old in zip(projectors(rule), before, strict=True))


# -- on a Llama --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "clip"}, {"gradient": "sketch"}], ids=str)
def test_two_tasks_on_a_llama_ship_a_plain_adapter(options, tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, "keeplora", weight_share=0.3, share=0.6, **options)
    for i in (1, 2):
        before = logits(model)
        with learner.task(f"t{i}", batches(i)):
            torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
            first = model(**batch(100 * i)).loss
            train(model, i, steps=1, lr=0.05)
            train(model, i, steps=1, lr=0.05)
            assert model(**batch(100 * i)).loss < first - 0.01
            inside = logits(model)
            with learner.merged_view():
                torch.testing.assert_close(logits(model), inside)
        torch.testing.assert_close(logits(model), inside, rtol=1e-4, atol=1e-5)
    learner.save(tmp_path / "learner")
    loaded = mbf.ContinualLora.load(peft_model(), tmp_path / "learner")
    torch.testing.assert_close(logits(loaded.model), logits(model))
    assert_same(loaded.method.state["basis"], learner.method.state["basis"])


def test_clip_goes_on_from_a_checkpoint_inside_a_task():
    """B_0 is part of it."""
    ends = []
    for interrupted in (False, True):
        model = peft_model()
        torch.manual_seed(0)
        learner = mbf.ContinualLora(model, "keeplora", variant="clip")
        learner.begin_task("t1", batches(1))
        train(model, 1, steps=2)
        if interrupted:
            kept = {n: t.clone() for n, t in learner.method.state_dict().items()}
            factors = learner.method.current.clone()
            learner.abandon_task()
            assert learner.method.state == {}
            learner.begin_task("t1", batches(2))  # other data: another B_0, were it not part of the checkpoint
            learner.method.write(factors)
            learner.continue_task(kept, 2)
        train(model, 2, steps=2)
        learner.end_task(batches(1))
        ends.append((logits(model), learner.method.current.clone()))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert_same(ends[0][1].B, ends[1][1].B)


def test_a_limit_of_batches_holds():
    rule, whole = method("keeplora", batches=1), method("keeplora")
    for one, loader in ((rule, data(1)), (whole, data(1)[:1])):
        for n, layer in enumerate(one.layers):
            layer.W = torch.randn(layer.W.shape, generator=torch.Generator().manual_seed(n))
        one.merged = one.current.clone()
        one.before_task(1, loader)
        one.init_adapter(1)
        one.after_task(1, loader)
    assert_same(rule.state["basis"], whole.state["basis"])
    assert_same(rule.current.A, whole.current.A)


# -- where nothing is left, and errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_task_without_room_learns_nothing_and_says_so(variant):
    """A rank above what is left over: the rest of A is zero, its B learns nothing, and it is not kept."""
    rule = method("keeplora", variant=variant, weight_share=0.3, share=0.6)
    learn_B(rule, 1)
    free = [torch.linalg.qr(torch.randn(d, k)).Q for d, k in ((40, 0), (40, 2), (17, 5))]
    rule.state = {**rule.state, "basis": free, "retain": torch.ones(3, dtype=torch.int64)}
    before = [layer.delta() for layer in rule.layers]
    with pytest.warns(UserWarning, match=r"in 2 of 3 layers: layer0 \(0 of 4\), layer1 \(2 of 4\)\..*Lower share"):
        begin(rule, 2)
    assert [layer.A.any(1).sum() for layer in rule.layers] == [0, 2, 4]
    assert_same([layer.delta() for layer in rule.layers], before, rtol=1e-6, atol=1e-6)
    rule.model(data(2)[0]["inputs"]).loss.backward()
    assert [int(layer.B.grad.any(0).sum()) for layer in rule.layers] == [0, 2, 4]
    for layer in rule.layers:
        layer.B.data.add_(torch.randn_like(layer.B))
    end(rule, 2)
    assert [A.shape[0] for A in rule.current.A] == [4, 6, 8]
    torch.testing.assert_close(rule.layers[0].delta(), before[0])


def test_wrong_options_are_errors():
    for wrong in ({"variant": "bert"}, {"share": 1.5}, {"gradient": "half"}, {"sketch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            get("keeplora")(**wrong)


def test_an_adapter_that_was_trained_elsewhere_is_refused():
    model = peft_model()
    for layer in mbf.ContinualLora(model, "seqlora").layers:
        layer.B.data.normal_()
    with pytest.raises(ValueError, match="'keeplora' cannot go on from an adapter that was trained elsewhere"):
        mbf.ContinualLora(model, "keeplora")
