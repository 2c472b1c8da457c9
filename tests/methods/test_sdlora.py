"""SD-LoRA: normalised directions, their α, the hand-over, falling ranks and absorption."""

import pytest
import torch

import mbf
from mbf.methods import Factors
from mbf.methods.sdlora import combination, products
from tests.continual.tiny import logits, peft_model, train
from tests.methods.plain import WIDTHS, begin, end, learn, method


def in_task(i, **options):
    """Task i has begun, every LoRA so far random and every α its own."""
    rule = method("sdlora", **options)
    for task in range(1, i):
        begin(rule, task)
        randomise(rule)
        end(rule, task)
    begin(rule, i)
    randomise(rule)
    return rule


def randomise(rule):
    with torch.no_grad():
        for layer in rule.layers:
            layer.A.normal_()
            layer.B.normal_()
        for alpha in rule.learned["alpha"]:
            alpha.copy_(torch.rand_like(alpha) + 0.5)


def direction(A, B):
    return B @ A / (B.norm() * A.norm())


def parts(rule, n):
    """The old tasks' (A_k, B_k) in layer n as they were trained."""
    sizes = rule.state["sizes"][n].tolist()
    return list(zip(rule.merged.A[n].split(sizes), rule.state["B"][n].split(sizes, 1), strict=True))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("handover", ["rescale", "jump"])
def test_the_function_is_that_of_the_formula(handover, shared):
    rule = in_task(3, handover=handover, shared=shared)
    for n, layer in enumerate(rule.layers):
        alpha = rule.learned["alpha"][0 if shared else n].detach()
        old = zip(alpha[:-1], rule.state["c"][n], parts(rule, n), strict=True)
        wanted = sum(a * c * direction(*pair) for a, c, pair in old) + alpha[-1] * layer.B @ layer.A
        torch.testing.assert_close(layer.delta(), layer.scale * wanted.detach(), rtol=1e-4, atol=1e-4)
        lengths = torch.stack([B.norm() * A.norm() for A, B in parts(rule, n)])
        torch.testing.assert_close(rule.state["c"][n], lengths if handover == "rescale" else torch.ones(2))


@pytest.mark.parametrize("handover", ["rescale", "jump"])
def test_i_the_length_of_an_old_pair_does_not_matter(handover):
    rule = in_task(3, handover=handover)
    before = [layer.delta() for layer in rule.layers]
    now = rule.current.clone()
    rule.merged = Factors([torch.cat([3 * A[:4], A[4:]]) for A in rule.merged.A], rule.merged.B)
    rule.state = {**rule.state, "B": [torch.cat([B[:, :4] * 0.2, B[:, 4:]], 1) for B in rule.state["B"]]}
    alpha = rule.learned["alpha"][0].detach().clone()
    rule.learned = {}
    rule.init_adapter(3)
    rule.write(now)
    rule.learned["alpha"][0].data.copy_(alpha)
    for layer, wanted in zip(rule.layers, before, strict=True):
        torch.testing.assert_close(layer.delta(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_ii_the_gradient_of_alpha_is_the_loss_along_the_direction(shared):
    rule = in_task(3, handover="jump", shared=shared)
    wanted = torch.zeros(len(rule.layers), 3)
    for n, layer in enumerate(rule.layers):
        x, dy = torch.randn(7, layer.A.shape[1]), torch.randn(7, layer.B.shape[0])
        layer(x).backward(dy)
        dW = layer.scale * dy.T @ x
        directions = [direction(*pair) for pair in parts(rule, n)] + [(layer.B @ layer.A).detach()]
        wanted[n] = torch.stack([(dW * D).sum() for D in directions])
    found = torch.stack([alpha.grad for alpha in rule.learned["alpha"]])
    torch.testing.assert_close(found, wanted.sum(0, keepdim=True) if shared else wanted, rtol=1e-3, atol=1e-3)


def test_iii_the_first_task_with_an_alpha_of_one_is_plain_lora():
    rule = in_task(1, alpha_init=1.0)
    for alpha in rule.learned["alpha"]:
        alpha.data.fill_(1.0)
    for layer in rule.layers:
        torch.testing.assert_close(layer.delta(), (layer.scale * layer.B @ layer.A).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("i", [1, 3])
def test_the_hand_over_keeps_the_function_and_the_paper_s_does_not(i):
    for handover in ("rescale", "jump"):
        rule = in_task(i, handover=handover)
        inside = [layer.delta() for layer in rule.layers]
        end(rule, i)
        gap = max((layer.delta() - before).abs().max() for layer, before in zip(rule.layers, inside, strict=True))
        assert gap < 1e-3 if handover == "rescale" else gap > 0.1
        begin(rule, i + 1)
        again = [layer.delta() for layer in rule.layers]  # B of the new task is zero
        rule.route(None)
        rule.write(rule.merged)
        for layer, wanted in zip(rule.layers, again, strict=True):
            torch.testing.assert_close(layer.delta(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("handover", ["rescale", "jump"])
@pytest.mark.parametrize("shared", [True, False])
def test_iv_a_task_that_is_a_combination_is_absorbed_and_the_function_stays(shared, handover):
    x = torch.tensor([0.7, -0.4])
    with torch.no_grad():  # rank 4 holds the sum of two tasks of rank 2
        rule = method("sdlora", absorb=1e-6, shared=shared, handover=handover)
        for i in (1, 2):
            begin(rule, i)
            randomise(rule)
            for layer in rule.layers:
                layer.B[:, 2:] = 0
            end(rule, i)
        begin(rule, 3)
        randomise(rule)
        for n, layer in enumerate(rule.layers):
            pairs, c = parts(rule, n), rule.state["c"][n]
            layer.A.copy_(torch.cat([A[:2] for A, _ in pairs]))
            terms = zip(x, c, pairs, strict=True)
            layer.B.copy_(torch.cat([a * c_k * B[:, :2] / (A.norm() * B.norm()) for a, c_k, (A, B) in terms], 1))
    inside = [layer.delta() for layer in rule.layers]
    alpha = torch.stack([one.detach() for one in rule.learned["alpha"]])
    if handover == "jump" and shared:  # other lengths in every layer: no one combination serves all
        end(rule, 3)
        assert rule.state["alpha"].shape[1] == 3
        return
    length = torch.stack([(layer.B.norm() * layer.A.norm()).detach() for layer in rule.layers])[:, None]
    end(rule, 3)
    assert [A.shape[0] for A in rule.current.A] == [8, 8, 8] and rule.state["alpha"].shape[1] == 2
    x = x if handover == "rescale" else x / length  # c_3 D_3 = Σ x_k c_k D_k
    torch.testing.assert_close(rule.state["alpha"], alpha[:, :2] + alpha[:, 2:] * x, rtol=1e-3, atol=1e-3)
    if handover == "rescale":
        for layer, before in zip(rule.layers, inside, strict=True):
            torch.testing.assert_close(layer.delta(), before, rtol=1e-3, atol=1e-3)


def test_a_task_of_its_own_is_kept():
    rule = in_task(3, absorb=0.01)
    end(rule, 3)
    assert [A.shape[0] for A in rule.current.A] == [12, 12, 12] and rule.state["alpha"].shape[1] == 3


def test_v_least_squares_of_traces_are_those_of_dense_matrices():
    torch.manual_seed(5)
    sizes = [3, 1, 4, 2]
    A, B = torch.randn(sum(sizes), 20).double(), torch.randn(15, sum(sizes)).double()
    dense = torch.stack([(b @ a).flatten() for a, b in zip(A.split(sizes), B.split(sizes, 1), strict=True)])
    gram = products(A, B, sizes)
    torch.testing.assert_close(gram, dense @ dense.T)
    x, rest = combination(gram)
    solution = torch.linalg.lstsq(dense[:-1].T, dense[-1:].T).solution[:, 0]
    torch.testing.assert_close(x, solution)
    assert rest == pytest.approx(float((dense[-1] - solution @ dense[:-1]).square().sum() / dense[-1].square().sum()))
    assert 0.1 < rest < 1


def test_falling_ranks():
    rule = method("sdlora", ranks={2: 3, 4: 1})
    for i in range(1, 5):
        learn(rule, i)
    assert rule.state["sizes"].tolist() == [[4, 3, 3, 1]] * 3
    assert [layer.A.shape for layer in rule.layers] == [(11, d_in) for _, d_in in WIDTHS]
    with pytest.raises(ValueError, match=r"found \{1: 3\}, wanted \{task: rank\}, tasks from 2"):
        method("sdlora", ranks={1: 3})


def test_an_adapter_that_was_trained_elsewhere_keeps_its_function():
    model = peft_model()
    learner = mbf.ContinualLora(model, "seqlora")
    with learner.task("one"):
        train(model, 1)
    function = logits(model)
    other = mbf.ContinualLora(model, "sdlora")
    torch.testing.assert_close(logits(model), function, rtol=1e-4, atol=1e-5)
    with other.task("two"):
        torch.testing.assert_close(logits(model), function, rtol=1e-4, atol=1e-5)
        train(model, 2)
        inside = logits(model)
    torch.testing.assert_close(logits(model), inside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("handover", ["rescale", "jump"])
def test_the_view_is_what_the_task_becomes_or_is_refused(handover):
    model = peft_model()
    learner = mbf.ContinualLora(model, "sdlora", handover=handover)
    learner.begin_task("one")
    train(model, 1)
    if handover == "jump":
        with pytest.raises(ValueError, match="'sdlora' with handover='jump' computes something else"):
            learner.merged_view().__enter__()
        return
    with learner.merged_view():
        seen = logits(model)
    learner.end_task()
    torch.testing.assert_close(logits(model), seen, rtol=1e-4, atol=1e-5)
