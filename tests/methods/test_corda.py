"""CorDA: the decomposition and its invariants, what is calibrated on, and W that is learnt beside itself."""

import dataclasses
import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from pydantic import ValidationError

import mbf
from mbf.continual import TaskError
from mbf.continual.header import CheckpointError
from mbf.methods._passes import input_moments
from mbf.methods.corda import components, damped
from tests.continual.tiny import base_model, batch, batches, logits, peft_model, train
from tests.methods.plain import begin, data, end, learn, method, random_factors

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SHAPES = [(24, 40), (40, 24), (16, 16)]
MODES = ["kpm", "ipm"]


def weight_and_moment(shape, seed=0):
    """W [d_out, d_in] and a C [d_in, d_in] of uneven energy, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(200, shape[1], generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, shape[1])
    return W, x.mT @ x / len(x)


def dense(rule):
    """W + s B A of every layer, from its own tensors."""
    return [layer.W + layer.scale * layer.B.detach() @ layer.A.detach() for layer in rule.layers]


def taken_out(rule):
    """s B_0 A_0 of every layer in task, which training starts from."""
    return [layer.scale * layer.B.detach() @ layer.A.detach() for layer in rule.layers]


# -- the decomposition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_damping_regularises_and_inverts(shape):
    _, C = weight_and_moment(shape)
    regular, inverse = damped(C.float(), 0.01)
    mean = C.diagonal().mean()
    torch.testing.assert_close(regular, C / mean + 0.01 * torch.eye(len(C)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(regular @ inverse, torch.eye(len(C), dtype=C.dtype), **EXACT)


@pytest.mark.parametrize("start", range(6))
def test_damping_doubles_until_the_inverse_is_one(start):
    """Of a C of low rank, whose inverse in fp64 is wrong; and no sooner than it must."""
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    C, identity, least = x.mT @ x, torch.eye(12, dtype=x.dtype), 2.0 ** (start - 60)

    def error(damping):
        regular = C / C.diagonal().mean() + damping * identity
        inverse, status = torch.linalg.inv_ex(regular)
        return float("inf") if status else torch.dist(regular @ inverse, identity).item()

    assert error(least) > 0.05
    regular, inverse = damped(C, least)
    assert torch.dist(regular @ inverse, identity) < 0.05
    tried = [least * 2**k for k in range(30)]
    needed = next(damping for damping in tried if error(damping) < 0.05)
    torch.testing.assert_close(regular, C / C.diagonal().mean() + needed * identity, rtol=0, atol=0)


def test_a_layer_that_only_saw_zeros_is_decomposed_as_it_is():
    regular, inverse = damped(torch.zeros(3, 3), 0.01)
    assert torch.equal(regular, torch.eye(3).double()) and torch.equal(inverse, regular)


def test_statistics_with_nan_are_refused():
    with pytest.raises(ValueError, match="inf or NaN"):
        damped(torch.full((3, 3), float("nan")), 0.01)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_energy_on_the_inputs_is_that_of_the_chosen_singular_values(shape, mode):
    """‖B_0 A_0 C‖² = Σ S_r² over the r smallest (knowledge-preserving), or the r largest."""
    W, C = weight_and_moment(shape)
    C, inverse = damped(C, 0.01)
    A, B = components(W, C, inverse, 5, mode)
    S = torch.linalg.svdvals(W @ C)
    chosen = S[-5:] if mode == "kpm" else S[:5]
    torch.testing.assert_close((B @ A @ C).square().sum(), chosen.square().sum(), **EXACT)
    rest = S[:-5] if mode == "kpm" else S[5:]
    torch.testing.assert_close(((W - B @ A) @ C).square().sum(), rest.square().sum(), **EXACT)
    torch.testing.assert_close(B.norm(dim=0), chosen.sqrt(), **EXACT)  # √S on either side
    torch.testing.assert_close((A @ C).norm(dim=1), chosen.sqrt(), **EXACT)
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_component_leaves_W_and_all_of_them_are_W(shape):
    W, C = weight_and_moment(shape)
    C, inverse = damped(C, 0.01)
    for mode in MODES:
        A, B = components(W, C, inverse, 0, mode)
        assert torch.equal(W - B @ A, W)
        A, B = components(W, C, inverse, min(shape), mode)
        torch.testing.assert_close(B @ A, W, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_white_inputs_it_is_the_split_of_W_itself(shape):
    """C ∝ I: the leading triples are PiSSA's, the trailing ones MiLoRA's."""
    W, _ = weight_and_moment(shape)
    pair = damped(7.0 * torch.eye(shape[1], dtype=W.dtype), 0.01)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for mode, cut in (("ipm", slice(4)), ("kpm", slice(-4, None))):
        A, B = components(W, *pair, 4, mode)
        torch.testing.assert_close(B @ A, U[:, cut] * S[cut] @ Vh[cut], **EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_decomposition_that_peft_has(mode, monkeypatch):
    """PEFT's own initialisation, on one row: it divides by max |x|, to which B_0 A_0 is blind."""
    if importlib.util.find_spec("attr") is None:  # PEFT's file imports it for this alone, and does not require it
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    preprocess_corda = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
    row = {"input_ids": batch(3, rows=1, length=40)["input_ids"]}
    theirs = base_model()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(theirs, config, run_model=lambda: theirs(**row))
    expected = [
        layer.scale * layer.B.detach() @ layer.A.detach()
        for layer in mbf.ContinualLora(get_peft_model(theirs, config), "seqlora", learnt=False).layers
    ]
    learner = mbf.ContinualLora(peft_model(), "corda", mode=mode, skip=0)
    learner.begin_task("one", [row])
    for layer, product in zip(learner.layers, expected, strict=True):
        ours = layer.scale * layer.B.detach() @ layer.A.detach()
        assert (ours - product).norm() < 2e-3 * product.norm(), layer.name  # PEFT decomposes in fp32


# -- a task ------------------------------------------------------------------------------------------------------------


def test_the_first_tokens_are_left_out():
    rule = method("corda", skip=2, batches=2)
    begin(rule, 1)
    x = torch.cat([b["inputs"][:, 2:, :17].reshape(-1, 17) for b in data(1)[:2]]).double()
    layer = rule.layers[2]
    A, B = components(layer.W.double(), *damped(x.mT @ x, 0.01), 4, "kpm")
    torch.testing.assert_close(layer.scale * layer.B @ layer.A, (B @ A).float(), **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_a_task_starts_from_the_function_that_was_there(mode):
    """W_i' + s B_0 A_0 = W_i, in every task, and what trains is not zero."""
    rule = method("corda", mode=mode)
    for i in (1, 2, 3):
        # What PEFT starts from in task 1 is dropped: B is zero there.
        before = [layer.delta() for layer in rule.layers]
        begin(rule, i)
        for layer, delta in zip(rule.layers, before, strict=True):
            torch.testing.assert_close(layer.delta(), delta, **CLOSE)
            assert layer.B.abs().max() > 1e-3 and layer.A.abs().max() > 1e-3
        for layer, A, B in zip(rule.layers, *vars(random_factors(rule)).values(), strict=True):
            layer.A.data.copy_(A)
            layer.B.data.copy_(B)
        end(rule, i)


@pytest.mark.parametrize("mode", MODES)
def test_the_residual_is_frozen_and_the_product_trains(mode):
    """y = (W_i − s B_0 A_0) x + s B A x with any B, A; then the sum takes B A − B_0 A_0, of rank 2r."""
    rule = method("corda", mode=mode)
    for i in (1, 2):
        W_i = dense(rule)
        begin(rule, i)
        residual = [W - P for W, P in zip(W_i, taken_out(rule), strict=True)]
        tuned = random_factors(rule)
        for layer, A, B in zip(rule.layers, tuned.A, tuned.B, strict=True):
            layer.A.data.copy_(A)
            layer.B.data.copy_(B)
        wanted = [R + 2.0 * B @ A for R, A, B in zip(residual, tuned.A, tuned.B, strict=True)]
        for n, layer in enumerate(rule.layers):
            torch.testing.assert_close(layer.W + layer.delta(), wanted[n], **CLOSE)
            view = rule.merged_terms(layer, n, i, None)
            torch.testing.assert_close(layer.W + view.scale * view.B @ view.A, wanted[n], **CLOSE)
        end(rule, i)
        for W, layer in zip(wanted, rule.layers, strict=True):
            torch.testing.assert_close(layer.W + layer.delta(), W, **CLOSE)
            assert layer.A.shape[0] == min(8 * i, *layer.W.shape)
        assert "taken" not in rule.state


def test_gradients_reach_what_trains_and_nothing_else():
    rule = method("corda")
    learn(rule, 1)
    trained = begin(rule, 2)
    rule.model(**data(5)[0]).loss.backward()
    assert len(trained) == 6 and all(p.grad is not None and p.grad.any() for p in trained)
    layer, x = rule.layers[0], data(5)[0]["inputs"][..., :40].reshape(-1, 40)
    dy = (x @ (layer.W + layer.delta()).T) / 4
    torch.testing.assert_close(layer.B.grad, layer.scale * dy.T @ (x @ layer.A.detach().T), **CLOSE)


def test_each_task_decomposes_what_was_learnt_so_far():
    """Task 2 takes its components of W + s Σ (..), with the C kept of task 1."""
    rule = method("corda", skip=0, damping=0.02)
    learn(rule, 1)
    C, of, W_2 = rule.state["C"], rule.state["of"].tolist(), dense(rule)
    assert of == [0, 0, 1] and [c.shape[0] for c in C] == [40, 17]
    begin(rule, 2)
    for n, layer in enumerate(rule.layers):
        pair = damped(C[of[n]], 0.02)
        A, B = components(W_2[n].double(), *pair, 4, "kpm")
        torch.testing.assert_close(layer.scale * layer.B @ layer.A, (B @ A).float(), **CLOSE)
        torch.testing.assert_close(layer.B.norm(), (B.norm() / layer.scale**0.5).float(), **CLOSE)


def test_the_sum_stays_within_the_rank_of_W():
    rule = method("corda")
    for i in range(1, 6):
        learn(rule, i)
    assert [layer.A.shape[0] for layer in rule.layers] == [24, 24, 17]
    assert rule.ranks(6) == [4, 4, 4]
    rule = method("corda", r=13)
    learn(rule, 1)
    assert [layer.A.shape[0] for layer in rule.layers] == [24, 24, 17]


# -- what it is calibrated on -----------------------------------------------------------------------------------------


def start_of(rule, i, seed):
    """The product that task i starts from if its data are those of ``seed``."""
    rule.route(None)
    rule.merged = rule.current.clone()
    kept = dict(rule.state)
    rule.before_task(i, data(seed))
    with torch.no_grad():
        rule.init_adapter(i)
    products = [B @ A for A, B in zip(rule.current.A, rule.current.B, strict=True)]
    rule.state = kept
    rule.route(None)
    rule.write(rule.merged)
    return products


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_knowledge_is_preserved_on_the_old_tasks_and_previewed_on_the_new_one():
    for mode in MODES:
        rule = method("corda", mode=mode)
        assert not same(start_of(rule, 1, 11), start_of(rule, 1, 12))  # there is no old task yet
        learn(rule, 1)
        assert same(start_of(rule, 2, 21), start_of(rule, 2, 22)) == (mode == "kpm")
        assert ("C" in rule.state) == (mode == "kpm")


def test_the_kept_statistics_are_the_sum_over_the_tasks():
    rule = method("corda", skip=2)
    wanted = 0
    for i in (1, 2, 3):
        learn(rule, i)
        x = torch.cat([b["inputs"][:, 2:, :17].reshape(-1, 17) for b in data(i)])
        wanted = wanted + x.T @ x / len(x)
    torch.testing.assert_close(rule.state["C"][1], wanted, **CLOSE)
    rule = method("corda", skip=0, batches=1)
    learn(rule, 1)
    x = data(1)[0]["inputs"][..., :17].reshape(-1, 17)
    torch.testing.assert_close(rule.state["C"][1], x.T @ x / len(x), **CLOSE)


def test_statistics_are_those_of_the_merged_model():
    model = peft_model()
    learner = mbf.ContinualLora(model, "corda")
    before = input_moments(learner.method, batches(1), skip=1).C
    with learner.task("one", batches(1)):
        train(model, 1)
    after = input_moments(learner.method, batches(1), skip=1).C
    kept = learner.method.state["C"]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(kept[2:], before[2:], strict=True))  # of layer 2


def test_calibration_of_the_users_own(tmp_path):
    asked = []

    def calibration(i):
        asked.append(i)
        return batches(40 + i)

    model = peft_model()
    learner = mbf.ContinualLora(model, "corda", calibration=calibration)
    for i in (1, 2):
        with learner.task(f"t{i}"):  # the task's own data are not needed
            assert asked[-1] == i
            started = [layer.B.detach() @ layer.A.detach() for layer in learner.layers]
            train(model, i)
    assert asked == [1, 2] and set(learner.method.state) == {"ranks"}
    other = mbf.ContinualLora(peft_model(), "corda", calibration=lambda i: batches(99))
    other.begin_task("t1")
    assert not torch.equal(started[0], other.layers[0].B @ other.layers[0].A)
    learner.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="'calibration' was a callable"):
        mbf.ContinualLora.load(base_model(), tmp_path / "run")
    twin = mbf.ContinualLora.load(base_model(), tmp_path / "run", calibration=calibration)
    assert torch.equal(logits(twin.model), logits(model))


def test_without_calibration_the_tasks_data_are_asked_for():
    model = peft_model()
    learner = mbf.ContinualLora(model, "corda")
    with pytest.raises(TaskError, match=r"task\('one', data=batches\)"), learner.task("one"):
        pass
    learner.begin_task("one", batches(1))
    train(model, 1)
    learner.end_task()
    assert learner.task_index == 1 and learner.method.state and not logits(model).isnan().any()


def test_an_adapter_that_was_trained_before_is_the_sum_so_far():
    model = peft_model()
    train(model, 1)
    trained = logits(model)
    learner = mbf.ContinualLora(model, "corda")
    assert learner.task_index == 1
    torch.testing.assert_close(logits(model), trained, **CLOSE)
    with learner.task("two", batches(2)):
        torch.testing.assert_close(logits(model), trained, **CLOSE)
        train(model, 2)
        inside = logits(model)
    torch.testing.assert_close(logits(model), inside, **CLOSE)
    assert [layer.A.shape[0] for layer in learner.layers] == [12] * len(learner.layers)
    assert (inside - trained).abs().max() > 1e-3


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_more_components_than_W_has_are_refused():
    model = peft_model(r=17)  # v is 16 × 32
    learner = mbf.ContinualLora(model, "corda")
    before = logits(model)
    with pytest.raises(ValueError, match=r"r of the 16 components of .*v_proj, r is 17; use r ≤ 16"):
        learner.begin_task("one", batches(1))
    assert torch.equal(logits(model), before) and not learner.in_task


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "pissa"}, "mode"), ({"damping": 0}, "damping"), ({"batches": 0}, "batches"), ({"skip": -1}, "skip")],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValidationError, match=message):
        method("corda", **options)
