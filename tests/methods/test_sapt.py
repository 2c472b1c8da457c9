"""SAPT-LoRA: the attention and what enters it, gates by sample, decoding, the reflection term, what is kept."""

import math

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import GenerationConfig, Trainer, TrainingArguments

import mbf
from mbf.methods import Factors, get
from mbf.methods._prompts import continues, prompt_tokens
from mbf.run.data import Collator
from tests.continual.tiny import VOCABULARY, base_model, batch, batches, logits, peft_model, train
from tests.methods.plain import assert_same, begin, deltas, learn, method, random_factors

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def ids(seed, rows=3, tokens=5, vocabulary=13):
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def attention(rule, tokens):
    """The module's formula, one sample at a time; ``tokens``: lists of the prompt's token ids."""
    E = rule.model.get_input_embeddings().weight
    W_1, W_2, weight, bias = rule.learned.get("query") or rule.state["query"]
    keys = [*rule.state.get("keys", torch.empty(0, E.shape[1])), *rule.learned.get("key", [])]
    rows = []
    for sample in tokens:
        x = torch.stack([E[token] for token in sample]).max(0).values
        h = W_2 @ (W_1 @ x)
        h = h * torch.sigmoid(h)
        q = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt() * weight + bias
        e = torch.stack([torch.exp(key @ q / math.sqrt(len(q))) for key in keys])
        rows.append(e / e.sum())
    return torch.stack(rows)


def spread(rule, factor=4.0):
    """Attention far from equal weights: keys of a few tasks are near one another at first."""
    rule.state = {**rule.state, "keys": factor * rule.state["keys"]}


def three(**options):
    torch.manual_seed(5)
    rule = method("sapt", **options)
    tuned = [learn(rule, i)[1] for i in range(1, 4)]
    spread(rule)
    return rule, tuned


# -- the attention -----------------------------------------------------------------------------------------------------


def test_the_weights_are_the_formula_and_sum_to_one():
    rule, _ = three()
    x = ids(1)
    w = rule.attention(rule.pooled({"input_ids": x}))
    torch.testing.assert_close(w, attention(rule, x.tolist()), **CLOSE)
    torch.testing.assert_close(w.sum(1), torch.ones(3))
    assert w.min() < 0.2 and w.max() > 0.5 and (w > 0).all()


def test_inside_a_task_the_new_key_and_the_net_in_training_count():
    rule, _ = three()
    torch.manual_seed(1)
    begin(rule, 4)
    with torch.no_grad():
        for p in rule.learned["query"]:
            p.add_(0.3 * torch.randn_like(p))
    x = ids(1)
    w = rule.attention(rule.pooled({"input_ids": x}))
    assert w.shape == (3, 4)
    torch.testing.assert_close(w, attention(rule, x.tolist()), **CLOSE)


MASK = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("inputs", "prompts"),
    [
        ({}, [[0, 1, 2, 3, 4]] * 3),
        ({"attention_mask": MASK}, [[2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4]]),
        (
            {"labels": [[-100] * 4 + [7], [-100, -100, 7, 7, -100], [-100] * 5]},
            [[0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 3, 4]],
        ),
        ({"attention_mask": MASK, "labels": [[7, 7], [-100, 7], [-100, -100]]}, [[2], [0, 1, 2, 3], [1, 2, 3, 4]]),
        ({"attention_mask": MASK, "labels": [[7] * 5] * 3}, [[2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4]]),
        ({"attention_mask": [[0] * 5] * 3}, [[0, 1, 2, 3, 4]] * 3),
    ],
    ids=["all", "padding", "answers", "labels of the last columns", "nothing but answers", "nothing but padding"],
)
def test_neither_padding_nor_answers_enter_the_query(inputs, prompts):
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    found = prompt_tokens(inputs, 5, 3)
    assert [row.nonzero().flatten().tolist() for row in found] == prompts
    rule, _ = three()
    x = ids(2)
    w = rule.attention(rule.pooled({"input_ids": x, **inputs}))
    chosen = [[row[j].item() for j in places] for row, places in zip(x, prompts, strict=True)]
    torch.testing.assert_close(w, attention(rule, chosen), **CLOSE)
    embedded = rule.model.get_input_embeddings()(x)
    assert torch.equal(rule.pooled({"inputs_embeds": embedded, **inputs}), rule.pooled({"input_ids": x, **inputs}))


def test_the_collator_s_answers_are_left_out():
    rule, _ = three()
    examples = [{"prompt": [3, 4, 5], "answer": [1, 2]}, {"prompt": [6], "answer": [7, 8, 9]}]
    collated = Collator(0)(examples)
    w = rule.attention(rule.pooled(collated))
    torch.testing.assert_close(w, attention(rule, [[3, 4, 5], [6]]), **CLOSE)


# -- what the layers compute -------------------------------------------------------------------------------------------


def test_every_sample_is_computed_with_its_own_weights():
    rule, tuned = three()
    x = ids(3)
    rule.inference_adapter({"input_ids": x})
    w = attention(rule, x.tolist())
    for n, layer in enumerate(rule.layers):
        h = torch.randn(3, 5, layer.A.shape[1])
        y = layer(h)
        for row in range(3):
            dW = sum(w[row, t] * one.B[n] @ one.A[n] for t, one in enumerate(tuned))
            torch.testing.assert_close(y[row], h[row] @ (layer.W + 2.0 * dW).T, rtol=1e-4, atol=1e-4)


def test_a_training_forward_weighs_the_old_loras_and_the_one_in_training():
    rule, tuned = three()
    begin(rule, 4)
    rule.write(random_factors(rule))
    x = ids(4)
    rule.forward_mod(0, {"input_ids": x})
    w = attention(rule, x.tolist())
    for n, layer in enumerate(rule.layers):
        h = torch.randn(3, 5, layer.A.shape[1])
        loras = [(one.A[n], one.B[n]) for one in tuned] + [(layer.A, layer.B)]
        wanted = h @ layer.W.T + 2.0 * sum(w[:, t, None, None] * (h @ A.T @ B.T) for t, (A, B) in enumerate(loras))
        torch.testing.assert_close(layer(h), wanted, rtol=1e-4, atol=1e-4)
        layer(h).square().sum().backward(retain_graph=True)
        assert layer.A.grad.any() and layer.B.grad.any()
    assert all(p.grad.any() for p in (*rule.learned["key"], *rule.learned["query"]))


def test_one_task_is_the_plain_lora():
    rule = method("sapt")
    _, tuned, _ = learn(rule, 1)
    rule.inference_adapter({"input_ids": ids(5)})
    for layer, dW in zip(rule.layers, deltas(tuned), strict=True):
        h = torch.randn(3, 5, layer.A.shape[1])
        torch.testing.assert_close(layer(h), h @ (layer.W + 2.0 * dW).T, rtol=1e-5, atol=1e-5)


def test_keys_of_old_tasks_stay_and_the_query_net_goes_on():
    rule = method("sapt")
    learn(rule, 1)
    first, net = rule.state["keys"].clone(), [p.clone() for p in rule.state["query"]]
    assert first.shape == (1, 6) and first.abs().max() <= 1 and first.std() > 0.2
    begin(rule, 2)
    assert_same(list(rule.learned["query"]), net)
    with torch.no_grad():
        rule.learned["key"][0].fill_(0.5)
        rule.learned["query"][1].mul_(2)
    rule.route(None)
    rule.after_task(2, None)
    assert torch.equal(rule.state["keys"], torch.cat([first, torch.full((1, 6), 0.5)]))
    assert torch.equal(rule.state["query"][1], 2 * net[1]) and torch.equal(rule.state["query"][0], net[0])


def test_what_ships_is_every_lora_with_an_equal_weight():
    rule, tuned = three()
    for n, (A, B) in enumerate(zip(rule.shipped().A, rule.shipped().B, strict=True)):
        torch.testing.assert_close(B @ A, sum(one.B[n] @ one.A[n] for one in tuned) / 3, **CLOSE)


# -- decoding ----------------------------------------------------------------------------------------------------------


def spread_model(tasks=3):
    model = peft_model()
    learner = mbf.ContinualLora(model, "sapt")
    for i in range(1, tasks + 1):
        with learner.task(f"t{i}"):
            train(model, i)
    torch.manual_seed(8)
    net = [torch.randn(100, 32), torch.randn(32, 100), torch.ones(32), torch.zeros(32)]
    learner.method.state = {**learner.method.state, "query": net}
    spread(learner.method, 2.0)
    now = learner.method.current.clone()
    learner.method.write(Factors(now.A, [10 * B for B in now.B]))  # the weights are to be seen in the logits
    model.eval()
    return model, learner


def test_decoding_goes_on_with_the_weights_of_the_prompt():
    """Token by token from a cache is what one forward over prompt and answer gives, whose labels mark the answer."""
    model, learner = spread_model()
    x = ids(6, rows=3, tokens=9, vocabulary=VOCABULARY)
    mask = torch.ones_like(x)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = x.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        whole = model(input_ids=x, attention_mask=mask, position_ids=positions, labels=labels).logits
        unlabelled = model(input_ids=x, attention_mask=mask, position_ids=positions).logits
        out = model(input_ids=x[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], use_cache=True)
        steps, weights = [out.logits], learner.method._weights[False]
        for n in range(5, 9):
            out = model(
                input_ids=x[:, n : n + 1],
                attention_mask=mask[:, : n + 1],
                position_ids=positions[:, n : n + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
    assert torch.equal(learner.method._weights[False], weights)
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask > 0], whole[mask > 0], rtol=1e-4, atol=1e-4)
    assert (whole - unlabelled).abs().max() > 1e-3


def test_generate_uses_the_prompt_s_weights_for_every_beam():
    model, learner = spread_model()
    x = ids(7, rows=2, tokens=6, vocabulary=VOCABULARY)
    model.generate(input_ids=x, generation_config=GenerationConfig(max_new_tokens=4, num_beams=2, pad_token_id=0))
    w = attention(learner.method, x.tolist())
    torch.testing.assert_close(learner.method._weights[False], w.repeat_interleave(2, 0), **CLOSE)


def test_an_empty_cache_continues_nothing():
    from transformers import DynamicCache

    assert not continues(None) and not continues(DynamicCache()) and not continues(())
    model, _ = spread_model(1)
    full = model(input_ids=ids(1, vocabulary=VOCABULARY), use_cache=True).past_key_values
    assert continues(full) and continues(((torch.zeros(1), torch.zeros(1)),))


def test_layers_without_a_prompt_say_so():
    model, learner = spread_model(2)
    cache = model(input_ids=ids(1, vocabulary=VOCABULARY), use_cache=True).past_key_values
    learner.begin_task("t3")
    learner.abandon_task()
    with pytest.raises(ValueError, match=r"weighs LoRAs by the prompt, and saw none since the last task"):
        model(input_ids=ids(2, tokens=1, vocabulary=VOCABULARY), past_key_values=cache)
    model(input_ids=ids(1, vocabulary=VOCABULARY))
    with learner.task("t3"):
        train(model, 3)
    with pytest.raises(ValueError, match="saw none since the last task"):
        model(input_ids=ids(2, tokens=1, vocabulary=VOCABULARY), past_key_values=cache)
    rule = method("sapt")
    rule.model.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"get_input_embeddings\(\) gave none"):
        rule.init_adapter(1)


# -- reflection --------------------------------------------------------------------------------------------------------


def pseudo(t):
    return [{"input_ids": ids(10 * t + n, rows=2)} for n in range(2)]


def test_the_term_is_the_divergence_from_the_stored_attention():
    rule, _ = three(pseudo=pseudo, kl=0.7)
    stored = {t: rule.state[f"target{t}"].clone() for t in (1, 2, 3)}
    assert [len(stored[t]) for t in (1, 2, 3)] == [1, 2, 3]
    torch.manual_seed(3)
    begin(rule, 4)
    divergence = 0.0
    for t, target in stored.items():
        prompts = [row for one in pseudo(t) for row in one["input_ids"].tolist()]
        for row in attention(rule, prompts):
            padded = [*target.tolist(), *[0.0] * (4 - t)]
            divergence += (
                sum(p * (math.log(p) - math.log(w)) for p, w in zip(padded, row.tolist(), strict=True) if p) / 4
            )
    penalty = rule.loss_extra()
    assert penalty.item() == pytest.approx(0.7 * divergence, rel=1e-4) and divergence > 0.1
    gradients = torch.autograd.grad(penalty, [*rule.learned["key"], *rule.learned["query"]])
    assert all(g.any() for g in gradients)


def test_targets_are_the_mean_attention_after_the_task():
    torch.manual_seed(5)
    rule = method("sapt", pseudo=pseudo)
    for i in (1, 2, 3):
        learn(rule, i)
        prompts = [row for one in pseudo(i) for row in one["input_ids"].tolist()]
        torch.testing.assert_close(rule.state[f"target{i}"], attention(rule, prompts).mean(0), **CLOSE)
        assert rule.state[f"pooled{i}"].shape == (4, 6)


def test_the_term_is_zero_where_the_attention_is_what_it_was():
    """The third task's samples, and a new key so far away that it takes no weight."""
    rule, _ = three()
    begin(rule, 4)
    _, _, weight, bias = rule.learned["query"]
    with torch.no_grad():
        weight.zero_()  # q is the norm's bias alone, the same for every sample
        bias.copy_(torch.linspace(1, 2, 6))
        rule.learned["key"][0].fill_(-1e4)
    pooled = rule.pooled({"input_ids": ids(3)})
    w = rule.attention(pooled).detach()
    assert not w[:, 3].any() and w[:, :3].min() > 1e-3
    rule.state = {**rule.state, "pooled3": pooled, "target3": w[0, :3]}
    assert abs(rule.loss_extra().item()) < 1e-6
    with torch.no_grad():
        rule.learned["key"][0].zero_()
    assert rule.loss_extra().item() > 1e-3


@pytest.mark.parametrize(
    ("options", "kept"), [({}, False), ({"pseudo": pseudo, "kl": 0.0}, True)], ids=["none", "no weight"]
)
def test_without_samples_or_weight_there_is_no_term(options, kept):
    rule = method("sapt", **options)
    for i in (1, 2):
        learn(rule, i)
    begin(rule, 3)
    assert rule.loss_extra() is None and ("pooled1" in rule.state) is kept
    assert not rule.info.data_free


def prompts(seed, count=5):
    return [{"input_ids": ids(100 * seed + n, rows=2), "labels": torch.tensor([[7]] * 2)} for n in range(count)]


def test_replay_keeps_prompts_of_the_task_s_own_without_their_answers():
    rule = method("sapt", replay=4)
    rule.before_task(1, prompts(1))
    rows = [row[:4].tolist() for one in prompts(1) for row in one["input_ids"]]
    every = torch.stack([rule.model.get_input_embeddings().weight[row].max(0).values for row in rows])
    found = [(every == kept).all(1).nonzero().flatten().tolist() for kept in rule.state["reservoir"]]
    assert len(found) == 4 and all(len(places) == 1 for places in found) and len({p[0] for p in found}) == 4
    few = method("sapt", replay=50)
    few.before_task(1, prompts(1))
    assert torch.equal(few.state["reservoir"], every)
    with torch.no_grad():
        few.init_adapter(1)
    few.merged = few.current.clone()
    few.after_task(1, None)
    assert torch.equal(few.state["pooled1"], every) and "reservoir" not in few.state


def test_every_prompt_has_the_same_chance_to_be_kept():
    rule, counts = method("sapt", replay=2), torch.zeros(8)
    rows = [{"input_ids": torch.full((1, 3), token)} for token in range(8)]
    E = rule.model.get_input_embeddings().weight
    for i in range(400):
        kept = rule._reservoir(rows, i)
        counts += (kept[:, None] == E[None, :8]).all(2).sum(0)
    assert counts.sum() == 800 and counts.min() > 70 and counts.max() < 130  # 100 each, within three deviations


def test_data_that_replay_would_use_up_is_refused():
    learner = mbf.ContinualLora(peft_model(), "sapt", replay=2)
    with pytest.raises(mbf.continual.TaskError, match="data is a list_iterator, which is its own iterator"):
        learner.begin_task("one", iter(batches(1)))
    plain = mbf.ContinualLora(peft_model(), "sapt")
    with plain.task("one", iter(batches(1))):
        train(plain.model, 1)


def test_replay_and_pseudo_samples_that_are_not_there_are_named():
    rule = method("sapt", replay=2)
    with pytest.raises(ValueError, match=r"replay=2 keeps prompts of each task; pass its batches"):
        rule.before_task(1, None)
    with pytest.raises(ValueError, match="gave no batch"):
        rule.before_task(1, [])
    rule = method("sapt", pseudo=lambda t: [])
    with pytest.raises(ValueError, match=r"pseudo\(1\) gave no batch"):
        learn(rule, 1)
    with pytest.raises(ValueError, match="set one of the two"):
        get("sapt")(replay=2, pseudo=pseudo)


# -- on a model --------------------------------------------------------------------------------------------------------


def test_reflection_holds_the_attention_of_old_tasks():
    """A task that pulls the query net elsewhere: with the term the weights of the first task's prompts move less."""
    moved = {}
    for kl in (0.0, 30.0):
        torch.manual_seed(0)
        model = peft_model()
        learner = mbf.ContinualLora(model, "sapt", replay=4, kl=kl)
        for i in (1, 2):
            torch.manual_seed(i)
            with learner.task(f"t{i}", batches(i)):
                train(model, i)
        target = learner.method.state["target2"]
        torch.manual_seed(3)
        with learner.task("t3", batches(3)):
            train(model, 3, steps=20)
        now = learner.method.attention(learner.method.state["pooled2"]).mean(0)
        moved[kl] = (now - F.pad(target, (0, 1))).abs().sum()
    assert moved[30.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_trains_keys_and_net_too(checkpointing, tmp_path):
    model = peft_model(lora_dropout=0.1)
    learner = mbf.ContinualLora(model, "sapt", replay=3)
    for i in (1, 2):
        rows = [{k: v[0] for k, v in batch(10 * i + n, rows=1).items()} for n in range(8)]
        for row in rows:
            row["labels"] = torch.where(torch.arange(9) < 5, -100, row["labels"])
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(i)),
            per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing,
            num_train_epochs=1,
            weight_decay=0.0,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with learner.task(f"t{i}", [{name: v[None] for name, v in row.items()} for row in rows]):
            begun = [p.detach().clone() for name in ("key", "query") for p in learner.method.learned[name]]
            Trainer(model=model, args=arguments, train_dataset=rows).train()
            now = [p for name in ("key", "query") for p in learner.method.learned[name]]
            assert i == 1 or all((p != q).any() for p, q in zip(begun, now, strict=True))
    assert [record.steps for record in learner.history] == [4, 4]


def recomputed_gradients(between, reentrant=None):
    """The gradients of a second task's step, with activations recomputed or (None) kept."""
    torch.manual_seed(0)
    model = peft_model()
    learner = mbf.ContinualLora(model, "sapt")
    with learner.task("one"):
        train(model, 1)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(4)
    learner.begin_task("two")
    for layer in learner.layers:
        layer.B.data.normal_()
    model.train()
    loss = model(**batch(200)).loss
    loss = between(model, loss) or loss
    loss.backward()
    learned = [p for parameters in learner.method.learned.values() for p in parameters]
    return [p.grad for p in [*learned, *(part for layer in learner.layers for part in (layer.A, layer.B))]]


def metric(model, loss):
    with torch.no_grad():
        model(**batch(201))


def reference(model, loss):
    with torch.no_grad(), model.disable_adapter():
        model(**batch(201))


def second(model, loss):
    return loss + model(**batch(201)).loss


@pytest.mark.parametrize("between", [lambda model, loss: None, metric, reference])
def test_recomputed_layers_have_the_weights_of_their_forward(between):
    expected, found = recomputed_gradients(lambda model, loss: None), recomputed_gradients(between, reentrant=False)
    assert all(g.any() for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_cannot_be_recomputed_is_said():
    with pytest.raises(ValueError, match="use_reentrant=True cannot differentiate; pass use_reentrant=False"):
        recomputed_gradients(lambda model, loss: None, reentrant=True)
    with pytest.raises(ValueError, match="2 forwards wait for their backward"):
        recomputed_gradients(second, reentrant=False)
    both = recomputed_gradients(second)
    assert all(g.any() for g in both)


def test_an_adapter_trained_elsewhere_is_task_1_and_samples_survive_loading(tmp_path):
    model = peft_model()
    train(model, 1)
    before = logits(model)
    model_pseudo = lambda t: [{"input_ids": ids(t, vocabulary=VOCABULARY)}]  # noqa: E731
    learner = mbf.ContinualLora(model, "sapt", pseudo=model_pseudo)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    with learner.task("two"):
        train(model, 2)
    learner.save(tmp_path / "learner")
    with pytest.raises(ValueError, match="'pseudo' was a callable"):
        mbf.ContinualLora.load(base_model(), tmp_path / "learner")
    twin = mbf.ContinualLora.load(base_model(), tmp_path / "learner", pseudo=model_pseudo)
    assert torch.equal(logits(twin.model), logits(model))
    assert {"pooled1", "target1", "pooled2", "target2"} <= twin.method.state.keys()
    learner.export(tmp_path / "plain")
    assert PeftModel.from_pretrained(base_model(), tmp_path / "plain").peft_config["default"].r == 8
