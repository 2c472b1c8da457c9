"""Passes over a task's data: moments and gradients against plain torch, and no trace left behind."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import mbf
from mbf.methods import get
from mbf.methods._passes import input_moments, mean_gradients, watch_gradients, watch_inputs
from mbf.peft import adapter_layers
from tests.continual.tiny import base_model, batch, batches, peft_model
from tests.methods.plain import data, method

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def rule_of(fuse=True, trained=True, **config):
    """A method on a Llama whose adapter computes something."""
    model = peft_model(**config)
    if trained:
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    if fuse:
        mbf.fuse(model)
    rule = get("seqlora")()
    rule.model, rule.layers = model, adapter_layers(model, "default")
    return rule


def padded(seed, left=False):
    """Batches of four rows of nine tokens that hold 9, 7, 4 and 2 of their own."""
    batches_ = []
    for n in range(2):
        ids = batch(10 * seed + n)["input_ids"]
        mask = (torch.arange(9) < torch.tensor([[9], [7], [4], [2]])).long()
        mask = mask.flip(1) if left else mask
        labels = ids.masked_fill(mask == 0, -100)
        batches_.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches_


def inputs_of(rule, loader):
    """Every layer's inputs, batch by batch, caught by hooks on the layers' base modules, which nothing else uses."""
    caught = [[] for _ in rule.layers]
    handles = [
        layer.module.get_base_layer().register_forward_pre_hook(lambda m, args, n=n: caught[n].append(args[0].detach()))
        for n, layer in enumerate(rule.layers)
    ]
    rule.model.eval()
    with torch.no_grad():
        for one in loader:
            rule.model(**one)
    for handle in handles:
        handle.remove()
    return caught


# -- moments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("left", [False, True])
def test_moments_are_the_mean_over_the_tokens_that_count(fuse, skip, left):
    rule, loader = rule_of(fuse), padded(1, left)
    moments = input_moments(rule, loader, skip=skip)
    for n, xs in enumerate(inputs_of(rule, loader)):
        tokens = [
            x[row, t]
            for x, one in zip(xs, loader, strict=True)
            for row in range(4)
            for t in one["attention_mask"][row].nonzero()[:, 0][skip:]
        ]
        dense = sum(torch.outer(x, x) for x in tokens) / len(tokens)
        assert moments.tokens == len(tokens)
        torch.testing.assert_close(moments.C[moments.of[n]], dense, **CLOSE)


def test_without_a_mask_every_token_counts():
    rule, loader = rule_of(), batches(3)
    moments = input_moments(rule, loader)
    assert moments.tokens == 3 * 4 * 9
    x = torch.cat(inputs_of(rule, loader)[0]).flatten(0, 1)
    torch.testing.assert_close(moments.C[moments.of[0]], x.mT @ x / len(x), **CLOSE)
    assert input_moments(rule, loader, skip=2).tokens == 3 * 4 * 7


@pytest.mark.parametrize("fuse", [True, False])
def test_layers_that_read_one_input_share_one_moment(fuse):
    rule = rule_of(fuse, target_modules=EVERY)
    moments = input_moments(rule, batches(1))
    assert len(moments.C) == 8 and len(moments.of) == 14
    place = {
        layer.name.removeprefix("base_model.model."): of for layer, of in zip(rule.layers, moments.of, strict=True)
    }
    for block in ("model.layers.0", "model.layers.1"):
        q, k, v, o = (place[f"{block}.self_attn.{kind}_proj"] for kind in "qkvo")
        gate, up, down = (place[f"{block}.mlp.{kind}_proj"] for kind in ("gate", "up", "down"))
        assert q == k == v and gate == up and len({q, o, gate, down}) == 4
        assert [moments.C[n].shape for n in (q, o, gate, down)] == [(32, 32)] * 3 + [(48, 48)]


def test_layers_that_read_one_input_are_given_once():
    rule = rule_of(target_modules=EVERY)
    seen = []
    first = watch_inputs(rule, batches(1, count=2), lambda n, x: seen.append(n))
    assert len(seen) == 16 and seen[:8] == seen[8:] and set(seen) == set(first)
    assert all(first[n] == n for n in seen)


def test_the_limit_is_a_number_of_batches():
    rule, loader = rule_of(), batches(1, count=3)
    torch.testing.assert_close(
        input_moments(rule, loader, limit=2).C[0], input_moments(rule, loader[:2]).C[0], rtol=0, atol=0
    )
    assert input_moments(rule, loader, limit=2).tokens == 2 * 4 * 9
    assert watch_gradients(rule, loader, lambda n, x, dy: None, limit=2) == 2


def test_moments_of_half_types_are_summed_in_fp32():
    rule = method("seqlora")
    rule.model.to(torch.bfloat16)
    for layer in rule.layers:
        layer.W = layer.W.bfloat16()
    loader = [{"inputs": one["inputs"].bfloat16()} for one in data(1)]
    moments = input_moments(rule, loader)
    x = torch.cat([one["inputs"][..., :40] for one in loader]).flatten(0, 1).float()
    assert moments.C[0].dtype == torch.float32
    torch.testing.assert_close(moments.C[0], x.mT @ x / len(x), **CLOSE)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_an_unfrozen_copy():
    """dL/dW of W + s B A, by autograd through a Llama without an adapter."""
    rule, loader = rule_of(target_modules=EVERY), padded(2)
    gradients = mean_gradients(rule, loader)
    plain = base_model().eval()
    by_name = dict(plain.named_modules())
    weights = []
    for layer in rule.layers:
        weight = by_name[layer.name.removeprefix("base_model.model.")].weight
        A, B = layer.values()
        weight.data += layer.scale * B @ A
        weights.append(weight)
    for n, one in enumerate(loader):
        for weight, g in zip(weights, torch.autograd.grad(plain(**one).loss, weights), strict=True):
            weight.total = g if n == 0 else weight.total + g
    assert len(gradients) == 14
    for found, weight in zip(gradients, weights, strict=True):
        assert found.norm() > 1e-4 and found.shape == weight.shape
        torch.testing.assert_close(found, weight.total / len(loader), rtol=1e-4, atol=1e-6)


def test_gradients_come_with_the_inputs_and_without_padding():
    rule, loader = rule_of(), [{**one, "labels": one["input_ids"]} for one in padded(2)]  # a loss at padding, too
    inputs, seen = inputs_of(rule, loader), {}
    count = watch_gradients(rule, loader, lambda n, x, dy: seen.setdefault(n, []).append((x, dy)))
    assert count == 2 and sorted(seen) == list(range(6))
    for n, pairs in seen.items():
        for (x, dy), expected, one in zip(pairs, inputs[n], loader, strict=True):
            torch.testing.assert_close(x, expected, **CLOSE)
            assert dy.shape[:2] == (4, 9) and not dy[one["attention_mask"] == 0].any()
            assert not dy.requires_grad and dy[one["attention_mask"] == 1].any()


def test_a_layer_that_is_called_twice_counts_twice():
    rule = method("seqlora")
    forward = rule.model.forward

    def twice(inputs):
        outputs = [forward(inputs).outputs[0], forward(-2 * inputs).outputs[0]]
        return SimpleNamespace(loss=sum((k + 1) * y.square().sum() for k, y in enumerate(outputs)))

    rule.model.forward = twice
    rule.layers = rule.layers[:1]
    (found,) = mean_gradients(rule, data(1))
    W, expected = rule.layers[0].W.clone().requires_grad_(), 0
    for one in data(1):
        x = one["inputs"][..., :40]
        loss = (x @ W.mT).square().sum() + 2 * (-2 * x @ W.mT).square().sum()
        expected = expected + torch.autograd.grad(loss, W)[0] / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


# -- no trace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("look", [input_moments, mean_gradients])
def test_a_pass_leaves_modes_random_state_and_gradients_alone(look, training):
    rule = rule_of(lora_dropout=0.3)
    rule.model.train(training)
    odd = rule.layers[1].module
    odd.train(not training)
    for parameter in rule.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25) if parameter.requires_grad else None
    flags = {name: p.requires_grad for name, p in rule.model.named_parameters()}
    modes = {name: module.training for name, module in rule.model.named_modules()}
    loader = DataLoader([{k: v[0] for k, v in batch(n).items()} for n in range(6)], batch_size=2, shuffle=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    look(rule, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in rule.model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in rule.model.named_parameters()} == flags
    assert all(p.grad is None or bool((p.grad == 0.25).all()) for p in rule.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rule.model.modules())


@pytest.mark.parametrize("look", [input_moments, mean_gradients])
def test_a_pass_is_made_without_dropout(look):
    """The model in training gives what it does in evaluation."""
    rule, found = rule_of(lora_dropout=0.5), []
    for training in (True, False):
        rule.model.train(training)
        one = look(rule, batches(1))
        found.append(one if isinstance(one, list) else one.C)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("look", [input_moments, mean_gradients])
def test_a_pass_that_fails_is_cleaned_up(look):
    rule = rule_of()
    rule.model.train()
    with pytest.raises(IndexError):
        look(rule, [{"input_ids": torch.full((2, 3), 10**6)}])
    assert rule.model.training and all(module.training for module in rule.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rule.model.modules())


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [input_moments, mean_gradients])
def test_an_iterator_that_was_used_up_is_named(look):
    rule, once = rule_of(), iter(batches(1))
    look(rule, once)
    with pytest.raises(ValueError, match=r"'seqlora'.*gave no batch.*\(a list, a DataLoader\), not an iterator"):
        look(rule, once)
    with pytest.raises(ValueError, match="give its batches to begin_task"):
        look(rule, None)


def test_a_batch_without_a_loss_is_named():
    with pytest.raises(ValueError, match=r"needs the loss.*a batch of input_ids; put labels"):
        mean_gradients(rule_of(), [{"input_ids": batch(1)["input_ids"]}])


def test_no_token_left_is_an_error():
    with pytest.raises(ValueError, match="no token is left of the task's data after skipping 9 a row"):
        input_moments(rule_of(), batches(1), skip=9)


def test_skipping_needs_to_know_the_tokens():
    rule = method("seqlora")
    rule.model.forward = lambda features: None
    with pytest.raises(ValueError, match=r"skip=1 needs to know.*among features; put one in, or set skip=0"):
        input_moments(rule, [{"features": torch.ones(2, 3, 40)}], skip=1)


@pytest.mark.parametrize("look", [input_moments, mean_gradients])
def test_a_layer_that_no_batch_reaches_is_named(look):
    rule = method("seqlora")
    reached = rule.layers[0]
    rule.model.forward = lambda inputs: SimpleNamespace(loss=reached(inputs[..., :40]).square().sum())
    with pytest.raises(ValueError, match="did not reach layer1, layer2; give batches that do"):
        look(rule, data(1))


def test_a_base_of_half_precision_gives_gradients_in_fp32():
    model = get_peft_model(base_model().bfloat16(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    rule = get("seqlora")()
    rule.model, rule.layers = model, adapter_layers(model, "default")
    exact = rule_of(trained=False, target_modules=["q_proj", "down_proj"])
    for found, expected in zip(mean_gradients(rule, batches(1)), mean_gradients(exact, batches(1)), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.1 * expected.norm()
