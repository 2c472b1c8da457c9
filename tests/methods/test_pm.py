"""P&M: the closed-form weight, its sufficient statistics, Fisher sums, and training under perturbations."""

import pytest
import torch

import mbf
from mbf.methods.pm import optimum, weighted_product
from tests.continual.tiny import batch, batches, logits, peft_model, train
from tests.methods.plain import begin, data, end, method


def randomise(rule):
    with torch.no_grad():
        for layer in rule.layers:
            layer.A.normal_(std=0.3)
            layer.B.normal_(std=0.3)


def per_sample_fisher(rule, task):
    """E[(dL_n/dW)²] sample by sample, with autograd on W itself."""
    sums = [torch.zeros_like(layer.W) for layer in rule.layers]
    samples = 0
    for one in data(task):
        for row in one["inputs"]:
            for layer in rule.layers:
                layer.W.requires_grad_()
            loss = rule.model(inputs=row[None]).loss
            for total, g in zip(sums, torch.autograd.grad(loss, [layer.W for layer in rule.layers]), strict=True):
                total += g.square()
            samples += 1
    for layer in rule.layers:
        layer.W.requires_grad_(False)
    return [total / samples for total in sums]


def run(tasks, **options):
    """What each task left, and α from the definition: θ̂ and all θ*_i, F_i as dense matrices."""
    rule = method("pm", **options)
    stars, fishers, alphas = [], [], []
    merged = [torch.zeros_like(layer.W) for layer in rule.layers]
    for i in range(1, tasks + 1):
        begin(rule, i)
        start = stars[-1] if stars and options.get("start") == "last" else merged
        for layer, before in zip(rule.layers, start, strict=True):
            torch.testing.assert_close(layer.delta(), before, rtol=1e-3, atol=1e-4)
        randomise(rule)
        stars.append([layer.delta() for layer in rule.layers])
        fishers.append(per_sample_fisher(rule, i))
        D = [star - before for star, before in zip(stars[-1], merged, strict=True)]
        numerator, denominator = (torch.zeros(len(rule.layers)) for _ in range(2))
        for star, F in zip(stars, fishers, strict=True):
            for n in range(len(rule.layers)):
                numerator[n] -= ((merged[n] - star[n]) * F[n] * D[n]).sum()
                denominator[n] += (D[n] * F[n] * D[n]).sum()
        ratio = numerator / denominator if options.get("per_module") else numerator.sum() / denominator.sum()
        alphas.append(ratio.expand(len(rule.layers)))
        end(rule, i)
        merged = [before + a * d for before, a, d in zip(merged, alphas[-1], D, strict=True)]
        for layer, wanted in zip(rule.layers, merged, strict=True):
            torch.testing.assert_close(layer.delta(), wanted, rtol=1e-3, atol=1e-3)
    return rule, alphas


def test_i_on_quadratic_losses_alpha_zeroes_the_derivative_of_their_sum():
    D, merged = torch.randn(50).double(), torch.randn(50).double()
    stars = [torch.randn(50).double() for _ in range(2)]
    stars.append(merged + D)
    H = [torch.rand(50).double() for _ in stars]
    sums = torch.tensor(
        [
            [
                -sum(((merged - star) * h * D).sum() for star, h in zip(stars, H, strict=True)),
                sum((D * h * D).sum() for h in H),
            ]
        ]
    ).double()
    raw = sums[0, 0] / sums[0, 1]
    alpha = raw.clone().requires_grad_()
    loss = sum(0.5 * (h * (merged + alpha * D - star).square()).sum() for star, h in zip(stars, H, strict=True))
    loss.backward()
    assert abs(alpha.grad) < 1e-10
    torch.testing.assert_close(optimum(sums, 3, False), raw.clamp(0, 1)[None])
    assert torch.equal(optimum(torch.zeros(2, 2), 4, True), torch.full((2,), 0.25))  # nothing to go by: the mean


@pytest.mark.parametrize("fisher", ["dense", "factored"])
def test_ii_the_first_task_has_alpha_one(fisher):
    rule = method("pm", fisher=fisher)
    begin(rule, 1)
    randomise(rule)
    inside = [layer.delta() for layer in rule.layers]
    end(rule, 1)
    for layer, before in zip(rule.layers, inside, strict=True):
        torch.testing.assert_close(layer.delta(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fisher", ["dense", "factored"])
def test_iii_equal_hessians_give_the_running_mean(fisher, monkeypatch):
    rule = method("pm", fisher=fisher)
    ones = lambda self, data: [torch.ones_like(layer.W) for layer in self.layers]  # noqa: E731
    pair = lambda self, data: (  # noqa: E731
        [torch.ones(1, len(layer.W)) for layer in self.layers],
        [torch.ones(1, layer.W.shape[1]) for layer in self.layers],
    )
    monkeypatch.setattr(type(rule), "_fisher", ones)
    monkeypatch.setattr(type(rule), "_fisher_factors", pair)
    stars = []
    for i in range(1, 5):
        begin(rule, i)
        randomise(rule)
        stars.append([layer.delta() for layer in rule.layers])
        end(rule, i)
        for n, layer in enumerate(rule.layers):
            torch.testing.assert_close(layer.delta(), sum(star[n] for star in stars) / i, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_module", [False, True])
def test_iv_sums_over_tasks_give_the_alpha_of_the_definition(per_module):
    rule, alphas = run(3, per_module=per_module)
    assert all(0.02 < float(a) < 0.98 for a in alphas[1]) and len({float(a) for a in alphas[1]}) == (
        3 if per_module else 1
    )
    for n, layer in enumerate(rule.layers):
        assert rule.state["S1"][n].shape == rule.state["S2"][n].shape == layer.W.shape
    assert sorted(rule.state) == ["S1", "S2", "ranks"]


@pytest.mark.parametrize("per_module", [False, True])
def test_a_task_may_start_from_where_the_last_one_ended(per_module):
    rule, alphas = run(3, start="last", per_module=per_module)
    assert all(0.02 < float(a) < 0.98 for a in alphas[1])
    assert [A.shape[0] for A in rule.state["last"].A] == [4, 4, 4]


def test_factored_statistics_give_the_alpha_of_their_outer_product(monkeypatch):
    """With F = u vᵀ both ways are the same; the dense one is checked against the definition."""
    merged = {}
    for fisher in ("dense", "factored"):
        rule = method("pm", fisher=fisher)
        for n, layer in enumerate(rule.layers):
            layer.W = torch.randn(layer.W.shape, generator=torch.Generator().manual_seed(n))
        for i in range(1, 4):
            g = torch.Generator().manual_seed(i)
            u = [torch.rand(1, len(layer.W), generator=g) for layer in rule.layers]
            v = [torch.rand(1, layer.W.shape[1], generator=g) for layer in rule.layers]
            monkeypatch.setattr(
                type(rule), "_fisher", lambda self, data, u=u, v=v: [a.T @ b for a, b in zip(u, v, strict=True)]
            )
            monkeypatch.setattr(type(rule), "_fisher_factors", lambda self, data, u=u, v=v: (u, v))
            begin(rule, i)
            torch.manual_seed(i)
            randomise(rule)
            end(rule, i)
        merged[fisher] = [layer.delta() for layer in rule.layers]
    for a, b in zip(merged["dense"], merged["factored"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_products_under_a_factored_fisher_are_those_of_dense_matrices():
    u, v = torch.rand(9).double(), torch.rand(13).double()
    left, right = ((torch.randn(r, 13).double(), torch.randn(9, r).double()) for r in (3, 5))
    dense = (torch.outer(u, v) * (left[1] @ left[0]) * (right[1] @ right[0])).sum()
    torch.testing.assert_close(weighted_product(u, v, left, right), dense)


def test_fisher_factors_are_mean_squares_and_the_dense_one_is_exact():
    rule = method("pm", fisher="factored")
    begin(rule, 1)
    randomise(rule)
    rule.route(None)
    for found, wanted in zip(rule._fisher(data(1)), per_sample_fisher(rule, 1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    u, v = rule._fisher_factors(data(1))
    x = torch.cat([one["inputs"] for one in data(1)])
    for n, layer in enumerate(rule.layers):
        here = x[..., : layer.W.shape[1]]
        y = layer(here).detach()  # the loss is half its square, so dy = y a sample
        torch.testing.assert_close(u[n][0], y.square().sum(1).mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(v[n][0], here.square().mean((0, 1)), rtol=1e-4, atol=1e-4)


def test_padding_and_what_the_loss_does_not_read_are_no_samples_inputs():
    rule = method("pm", fisher="factored")
    begin(rule, 1)
    randomise(rule)
    rule.route(None)
    whole = rule._fisher_factors(data(1))
    padded = []
    for one in data(1):
        rows, tokens, width = one["inputs"].shape
        mask = torch.cat([torch.ones(rows, tokens), torch.zeros(rows, 3)], 1)
        padded.append(
            {"inputs": torch.cat([one["inputs"], 50 * torch.ones(rows, 3, width)], 1), "attention_mask": mask}
        )
    for found, wanted in zip(rule._fisher_factors(padded), whole, strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fisher", ["dense", "factored"])
def test_a_layer_that_the_data_do_not_reach_is_named(fisher):
    rule = method("pm", fisher=fisher)
    begin(rule, 1)
    rule.model.layers = rule.model.layers[1:]
    with pytest.raises(ValueError, match="did not reach layer0"):
        end(rule, 1)


@pytest.mark.parametrize("i", [1, 2])
@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_v_another_scale_is_another_place_along_the_task_vector(i, factor):
    rule = method("pm")
    for task in range(1, i + 1):
        if task > 1:
            end(rule, task - 1)
        begin(rule, task)
        randomise(rule)
    before = [
        layer.scale * B @ A if i > 1 else 0 * layer.W
        for layer, A, B in zip(rule.layers, rule.merged.A, rule.merged.B, strict=True)
    ]
    D = [layer.delta() - theta for layer, theta in zip(rule.layers, before, strict=True)]
    rule._factor = factor
    for layer, theta, d in zip(rule.layers, before, D, strict=True):
        layer.train()
        torch.testing.assert_close(layer.delta(), theta + factor * d, rtol=1e-4, atol=1e-4)
        layer.eval()
        torch.testing.assert_close(layer.delta(), theta + d, rtol=1e-4, atol=1e-4)


def test_vi_the_mean_over_both_perturbations_is_the_curvature():
    rule = method("pm", eps=0.3)
    begin(rule, 1)
    randomise(rule)
    rule.model.train()
    one = data(4)[0]
    losses = []
    for factor in (1.0, 1.3, 0.7):
        rule._factor = factor
        losses.append(rule.model(**one).loss.detach())
    curvature = 0.0
    for layer in rule.layers:
        x = one["inputs"][..., : layer.W.shape[1]]
        curvature += (x @ layer.delta().T / 0.7).square().sum() / len(x)  # Dᵀ H D of half a squared distance
    torch.testing.assert_close((losses[1] + losses[2]) / 2 - losses[0], 0.3**2 * curvature / 2, rtol=1e-3, atol=1e-3)


def test_steps_draw_their_factor_by_task_and_number():
    rule = method("pm", eps=0.25)
    drawn = {}
    for task in (1, 2):
        rule._task = task
        for step in range(300):
            rule.forward_mod(step, {})
            drawn[task, step] = rule._factor
            rule.forward_mod(step, {})  # another batch of the same step
            assert rule._factor == drawn[task, step]
    counts = [sum(f == factor for f in drawn.values()) for factor in (1.0, 1.25, 0.75)]
    assert sum(counts) == 600 and min(counts) > 150
    assert [drawn[1, s] for s in range(300)] != [drawn[2, s] for s in range(300)]


def test_on_a_llama_training_is_perturbed_and_evaluation_is_not():
    model = peft_model()
    learner = mbf.ContinualLora(model, "pm", eps=0.5)
    with learner.task("t1", batches(1)):
        train(model, 1)
        with (
            pytest.raises(ValueError, match=r"pass over the task's data; call merged_view\(weight\)"),
            learner.merged_view(),
        ):
            pass
        with learner.merged_view(0.0):
            unlearnt = logits(model)
        model.train()
        losses = set()
        for step in range(6):
            learner.method.forward_mod(step, {})
            hooks = learner._active.hooks
            hooks.steps = step
            losses.add(round(model(**batch(3)).loss.item(), 5))
        assert len(losses) == 3
        hooks.steps = 4
        assert torch.equal(logits(model), logits(model))
    assert (logits(model) - unlearnt).abs().max() > 1e-3
