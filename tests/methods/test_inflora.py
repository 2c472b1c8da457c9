"""InfLoRA: A outside of what old tasks span, invariance there, the projected gradient, and the growing subspace."""

import math

import pytest
import torch

import mbf
from mbf.methods import get
from mbf.methods._passes import input_moments
from mbf.methods._subspaces import Subspace, from_state, root
from tests.continual.tiny import batches, logits, peft_model, train
from tests.methods.plain import WIDTHS, assert_same, begin, data, deltas, end, method

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def learn_B(rule, i, seed=0):
    """Task i with a random B over the A that the method chose."""
    begin(rule, i)
    A = [layer.A.detach().clone() for layer in rule.layers]
    generator = torch.Generator().manual_seed(100 * i + seed)
    for layer in rule.layers:
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator))
    end(rule, i)
    return A


def moments_of(i):
    """C = mean x xᵀ of task i for the layers' two widths, densely."""
    x = torch.cat([one["inputs"] for one in data(i)]).flatten(0, 1).double()
    return {d: x[:, :d].mT @ x[:, :d] / len(x) for d in (40, 17)}


def projectors(rule):
    """P of what is protected, a layer: ``of`` of the three layers is 0, 0, 1."""
    held = []
    for U, retain in zip(rule.state["basis"], rule.state["retain"], strict=True):
        P = U.double() @ U.double().mT
        held.append(torch.eye(len(P), dtype=torch.float64) - P if retain else P)
    return [held[0], held[0], held[1]]


def plain_growth(P, C, share):
    """GPM one vector after another: P + û ûᵀ until ‖P C‖² ≥ share ‖C‖²."""
    total = C.square().sum()
    U = torch.linalg.svd(C - P @ C).U
    for u in U.mT:
        if (P @ C).square().sum() >= share * total:
            break
        P = P + torch.outer(u, u)
    return P


# -- the start of a task -----------------------------------------------------------------------------------------------


def test_only_b_is_trained_in_every_task_and_it_starts_at_zero():
    rule = method("inflora")
    for i in (1, 2, 3):
        begin(rule, i)
        assert rule.trains(i) == (False, True)
        assert all(layer.B.requires_grad and not layer.A.requires_grad and not layer.B.any() for layer in rule.layers)
        end(rule, i)


def test_the_rows_of_a_are_orthogonal_and_of_length_one_over_root_three():
    """A Aᵀ = I/3."""
    rule = method("inflora")
    for i in (1, 2, 3):
        for A in learn_B(rule, i):
            torch.testing.assert_close(A @ A.mT, torch.eye(4) / 3, **CLOSE)


@pytest.mark.filterwarnings("ignore:method 'inflora'")
@pytest.mark.parametrize("eps", [0.6, 0.95])
def test_a_has_nothing_in_what_is_protected(eps):
    """A_i M = 0, whether M or its complement is stored."""
    rule = method("inflora", eps=eps, eps_last=eps)
    learn_B(rule, 1)
    for i in (2, 3, 4):
        P = projectors(rule)
        for A, p in zip(learn_B(rule, i), P, strict=True):
            assert torch.linalg.matrix_rank(p) > 0
            assert (A.double() @ p).norm() < 1e-5 * A.norm()


def test_a_holds_the_leading_left_singular_vectors_of_the_projected_moment():
    rule = method("inflora", eps=0.8, eps_last=0.8)
    for i in (1, 2, 3):
        P = projectors(rule) if i > 1 else [torch.zeros(d, d, dtype=torch.float64) for d in (40, 40, 17)]
        for A, p, (_, d) in zip(learn_B(rule, i), P, WIDTHS, strict=True):
            expected = torch.linalg.svd(moments_of(i)[d] - p @ moments_of(i)[d]).U[:, :4].mT / math.sqrt(3)
            torch.testing.assert_close(
                (A.double() @ expected.mT).abs(), torch.eye(4).double() / 3, rtol=1e-3, atol=1e-3
            )
            assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()


def test_layers_that_read_one_input_share_the_subspace_and_the_rows_of_a():
    rule = method("inflora")
    for i in (1, 2):
        A = learn_B(rule, i)
        assert_same([A[0]], [A[1]])
    assert [U.shape[0] for U in rule.state["basis"]] == [40, 17] and rule.state["retain"].shape == (2,)


# -- what a task can change --------------------------------------------------------------------------------------------


def test_inputs_within_what_is_protected_are_mapped_as_before():
    """x in M: dW_i x = 0."""
    rule = method("inflora", eps=0.9, eps_last=0.9)
    learn_B(rule, 1)
    for i in (2, 3, 4):
        before, P = [layer.delta() for layer in rule.layers], projectors(rule)
        learn_B(rule, i)
        for layer, old, p in zip(rule.layers, before, P, strict=True):
            x = p.float() @ torch.randn(len(p), 5, generator=torch.Generator().manual_seed(i))
            change = layer.delta() - old
            assert (change @ x).norm() < 1e-5 * change.norm() * x.norm()
            assert change.norm() > 0.1


def test_a_task_whose_inputs_are_all_protected_is_never_forgotten():
    """Inputs of rank 8, and ε = 1: whatever the next task learns, the model maps those inputs as it did."""
    rule = method("inflora", eps=1.0, eps_last=1.0)
    mixing = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    own = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(2)) @ mixing
    rule.merged = rule.current.clone()
    rule.before_task(1, [{"inputs": own}])
    rule.init_adapter(1)
    for layer in rule.layers:
        layer.B.data.normal_()
    rule.after_task(1, [{"inputs": own}])
    assert [U.shape[1] for U in rule.state["basis"]] == [8, 8]
    other = data(5)[0]["inputs"]
    before = [[y.detach() for y in rule.model(x).outputs] for x in (own, other)]
    learn_B(rule, 2)
    after = [[y.detach() for y in rule.model(x).outputs] for x in (own, other)]
    assert_same(after[0], before[0], rtol=1e-4, atol=1e-4)
    assert all((new - old).abs().max() > 0.1 for new, old in zip(after[1], before[1], strict=True))


@pytest.mark.parametrize("i", [1, 2])
def test_a_step_on_b_is_the_gradient_projected_on_the_rows_of_a(i):
    """SGD on B: dW = −η s² G AᵀA, and AᵀA is a third of the projector on the rows of A."""
    rule, rate = method("inflora"), 0.1
    if i == 2:
        learn_B(rule, 1)
    parameters = begin(rule, i)
    targets = [torch.randn(4, 5, d_out, generator=torch.Generator().manual_seed(3)) for d_out, _ in WIDTHS]
    inputs = data(9)[0]["inputs"]
    before = [layer.delta() for layer in rule.layers]
    W = [(layer.W + old).requires_grad_() for layer, old in zip(rule.layers, before, strict=True)]
    outputs = [inputs[..., : w.shape[1]] @ w.mT for w in W]
    loss = sum((y - t).square().sum() for y, t in zip(outputs, targets, strict=True)) / 8
    G = torch.autograd.grad(loss, W)
    optimizer = torch.optim.SGD(parameters, lr=rate)
    rule.model(inputs, targets).loss.backward()
    optimizer.step()
    for layer, old, g in zip(rule.layers, before, G, strict=True):
        A = layer.A.detach()
        expected = -rate * layer.scale**2 * g @ A.mT @ A
        torch.testing.assert_close(layer.delta() - old, expected, rtol=1e-3, atol=1e-5)
        rows = torch.linalg.qr(A.mT).Q
        torch.testing.assert_close(A.mT @ A, rows @ rows.mT / 3, **CLOSE)
        assert expected.norm() > 1e-3


def test_what_is_shipped_is_the_sum_of_all_loras():
    rule, total = method("inflora"), [torch.zeros(width) for width in WIDTHS]
    for i in (1, 2, 3):
        begin(rule, i)
        for layer in rule.layers:
            layer.B.data.normal_()
        total = [t + dW for t, dW in zip(total, deltas(rule.current), strict=True)]
        inside = [layer.delta() for layer in rule.layers]
        end(rule, i)
        for layer, now, before, dW in zip(rule.layers, deltas(rule.current), inside, total, strict=True):
            torch.testing.assert_close(now, dW, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(before, layer.scale * dW, rtol=1e-4, atol=1e-4)
    assert [A.shape[0] for A in rule.current.A] == [12, 12, 12]


# -- how the subspace grows --------------------------------------------------------------------------------------------


def test_epsilon_grows_linearly_and_stays():
    rule = method("inflora", eps=0.9, eps_last=1.0, tasks=4)
    assert [rule.share(i) for i in (1, 2, 3, 4, 5, 9)] == pytest.approx([0.9, 0.925, 0.95, 0.975, 1.0, 1.0])
    rule = method("inflora")
    assert rule.share(1) == 0.95 and rule.share(2) == pytest.approx(0.955) and rule.share(11) == 1.0
    with pytest.raises(ValueError, match="eps"):
        get("inflora")(eps=1.5)


@pytest.mark.parametrize("energy", ["C", "C^1/2"])
def test_the_subspace_is_that_of_gpm(energy):
    """Against plain GPM, of C or of a root of it; the share of C is one of fourth powers and takes fewer directions."""
    rule = method("inflora", eps=0.7, eps_last=0.9, tasks=2, energy=energy)
    expected = {d: torch.zeros(d, d, dtype=torch.float64) for d in (40, 17)}
    for i, share in ((1, 0.7), (2, 0.8), (3, 0.9)):
        learn_B(rule, i)
        for d, P in expected.items():
            C = moments_of(i)[d]
            expected[d] = plain_growth(P, C if energy == "C" else root(C), share)
        for found, (_, d) in zip(projectors(rule), WIDTHS, strict=True):
            torch.testing.assert_close(found, expected[d], rtol=1e-3, atol=1e-3)
    sizes = {round(float(P.trace())) for P in projectors(rule)}
    assert min(sizes) >= (3 if energy == "C" else 8)


@pytest.mark.filterwarnings("ignore:method 'inflora'")
def test_the_basis_is_orthonormal_and_never_wider_than_half_the_layer():
    """Mᵀ M = I after every task; where dim M > d/2, its complement is what is stored."""
    rule, dimensions = method("inflora", eps=0.97, eps_last=0.97), []
    for i in range(1, 7):
        learn_B(rule, i)
        for U in rule.state["basis"]:
            assert 2 * U.shape[1] <= U.shape[0]
            torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), **CLOSE)
        dimensions.append([round(float(P.trace())) for P in projectors(rule)])
    assert dimensions == sorted(dimensions) and bool(rule.state["retain"].any())


def test_removing_and_retaining_give_the_same_tasks(monkeypatch):
    """The LoRAs of a run that stores complements, and of one that never does."""
    runs = []
    for dual in (True, False):
        if not dual:
            monkeypatch.setattr(Subspace, "dual", lambda self: self)
        rule = method("inflora", eps=0.9, eps_last=0.9)
        runs.append((rule, [learn_B(rule, i) for i in (1, 2, 3, 4)]))
    (rule, own), (plain, others) = runs
    assert bool(rule.state["retain"].any()) and not bool(plain.state["retain"].any())
    for one, other in zip(own, others, strict=True):
        assert_same(one, other, rtol=1e-3, atol=1e-3)
    assert_same(projectors(rule), projectors(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [0, 1])
def test_the_subspace_is_taken_from_the_trained_model(skip):
    """On a Llama, whose later layers read other inputs once earlier ones have learnt; with and without first tokens."""
    torch.manual_seed(0)
    model = peft_model()
    learner = mbf.ContinualLora(model, "inflora", eps=0.7, eps_last=0.7, skip=skip)
    method, held = learner.method, [Subspace.empty(d, torch.device("cpu")) for d in (48, 32, 48, 32)]
    for i in (1, 2):
        learner.begin_task(f"t{i}", batches(i))
        before = input_moments(method, batches(i), skip=skip)
        train(model, i, steps=8, lr=0.3)
        learner.end_task(batches(i))
        after = input_moments(method, batches(i), skip=skip)  # of the sum of all tasks
        found, changed = from_state(method.state), 0
        for space, old, C, C_before in zip(found, held, after.C, before.C, strict=True):
            expected, other = old.grown(C, 0.7).dual().basis, old.grown(C_before, 0.7).dual().basis
            torch.testing.assert_close(space.basis, expected, rtol=1e-3, atol=1e-3)
            changed += other.shape != expected.shape or not torch.allclose(other, expected, atol=1e-2)
        assert changed > 1
        held = found


def test_a_limit_of_batches_holds_before_and_after():
    rule, whole = method("inflora", batches=1), method("inflora")
    A, A_whole = learn_B(rule, 1), learn_B(whole, 1)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(A, A_whole, strict=True))
    x = data(1)[0]["inputs"].flatten(0, 1)[:, :17]
    expected = Subspace.empty(17, x.device).grown(x.mT @ x / len(x), 0.95).dual().basis
    assert_same([rule.state["basis"][1]], [expected], rtol=1e-4, atol=1e-4)


# -- where nothing is left ---------------------------------------------------------------------------------------------


def test_a_task_without_room_learns_nothing_and_says_so():
    rule = method("inflora", eps=1.0, eps_last=1.0)
    learn_B(rule, 1)
    assert [U.shape[1] for U in rule.state["basis"]] == [0, 0] and rule.state["retain"].tolist() == [1, 1]
    before = [layer.delta() for layer in rule.layers]
    with pytest.warns(UserWarning, match=r"task 2: .* in 3 of 3 layers: layer0 \(0 of 4\).*Lower eps"):
        parameters = begin(rule, 2)
    rule.model(data(2)[0]["inputs"]).loss.backward()
    assert all(not p.grad.any() for p in parameters)
    end(rule, 2)
    assert_same([layer.delta() for layer in rule.layers], before)
    assert [A.shape[0] for A in rule.current.A] == [4, 4, 4]
    twin = method("inflora", eps=1.0, eps_last=1.0)
    twin.load_state_dict(rule.state_dict())
    assert [U.shape for U in twin.state["basis"]] == [(40, 0), (17, 0)]


def test_a_task_with_little_room_learns_in_what_there_is():
    """Two directions are left of 17: two rows of A, the others zero and not kept."""
    rule = method("inflora")
    learn_B(rule, 1)
    free = torch.linalg.qr(torch.randn(17, 2, generator=torch.Generator().manual_seed(4))).Q
    rule.state = {**rule.state, "basis": [rule.state["basis"][0], free], "retain": torch.tensor([0, 1])}
    with pytest.warns(UserWarning, match=r"in 1 of 3 layers: layer2 \(2 of 4\)"):
        A = learn_B(rule, 2)
    assert A[2].any(1).tolist() == [True, True, False, False]
    torch.testing.assert_close(A[2][:2] @ free @ free.mT, A[2][:2], **CLOSE)
    assert [factor.shape[0] for factor in rule.current.A] == [8, 8, 6]


def test_a_full_basis_survives_saving(tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, "inflora", eps=1.0)
    with learner.task("t1", batches(1, count=6)):
        train(model, 1)
    assert any(U.shape[1] == 0 for U in learner.method.state["basis"])
    learner.save(tmp_path / "learner")
    loaded = mbf.ContinualLora.load(peft_model(), tmp_path / "learner")
    assert_same(loaded.method.state["basis"], learner.method.state["basis"])
    torch.testing.assert_close(logits(loaded.model), logits(model))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_other_layers_than_before_are_an_error():
    rule = method("inflora")
    learn_B(rule, 1)
    rule.state = {key: value[:1] for key, value in rule.state.items()}
    rule.state["ranks"] = torch.tensor([4, 4, 4])
    with pytest.raises(
        ValueError, match=r"protects 1 layer inputs of widths \[40\].*read 2 of widths \[17, 40\]; go on"
    ):
        begin(rule, 2)


def test_the_end_of_a_task_goes_through_the_batches_that_it_began_with():
    ends = []
    for given in ((), (batches(1),)):
        model = peft_model()
        learner = mbf.ContinualLora(model, "inflora")
        with pytest.raises(Exception, match="takes statistics of the task: call task"):
            learner.begin_task("t1")
        torch.manual_seed(1)
        learner.begin_task("t1", batches(1))
        train(model, 1, steps=1)
        learner.end_task(*given)
        ends.append(learner.method.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
