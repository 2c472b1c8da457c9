"""What a method learns beside A and B: where it lives, when it ends, and what a task may not leave in it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import mbf
from mbf.continual import NonFiniteAdapterError
from mbf.methods import Factors, Method, MethodInfo
from mbf.ops import LoraTerms
from tests.continual.tiny import base_model, batch, logits, peft_model, train


class Gated(Method):
    """A gate a layer, learnt with A and B, and one number for all layers; folded into B afterwards."""

    name = "gated-for-the-test"
    learns = True
    info = MethodInfo(title="Gated", trained="A, B, g", frozen="W", merge="B diag(g)", memory="O(P)")

    def init_adapter(self, i: int) -> None:
        self.learn("gate", [torch.ones(layer.A.shape[0]) for layer in self.layers])
        self.learn("level", [torch.ones(())])
        self.route(self.gated)

    def gated(self, layer) -> LoraTerms:
        gate = self.learned["gate"][self.index(layer)] * self.learned["level"][0]
        return LoraTerms(layer.A, layer.B, layer.scale, gate=gate)

    def after_task(self, i, data) -> None:
        now, level = self.current, self.learned["level"][0]
        self.state = {"last": self.learned["gate"][0].detach().clone()}
        B = [B * (g.detach() * level.detach()) for B, g in zip(now.B, self.learned["gate"], strict=True)]
        self.write(Factors(now.A, B))


def own(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "mbf" in name]


def test_they_are_trained_where_the_optimiser_finds_them_and_end_with_the_task(tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, Gated())
    with learner.task("one"):
        assert len(own(model)) == len(learner.layers) + 1
        train(model, 1)
        gates = [g.detach().clone() for g in learner.method.learned["gate"]]
        assert all((g != 1).any() for g in gates) and learner.method.learned["level"][0] != 1
        inside = logits(model)
        model.save_pretrained(tmp_path)
    assert own(model) == [] and not hasattr(model, "mbf_method") and learner.method.learned == {}
    torch.testing.assert_close(logits(model), inside, rtol=1e-4, atol=1e-5)
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(learner.method.state["last"], gates[0])


def test_a_task_that_raises_takes_them_away():
    model = peft_model()
    learner = mbf.ContinualLora(model, Gated())
    with learner.task("one"):
        train(model, 1)
    function, state = logits(model), learner.method.state
    with pytest.raises(KeyboardInterrupt), learner.task("two"):
        train(model, 2)
        raise KeyboardInterrupt
    assert own(model) == [] and torch.equal(logits(model), function)
    assert learner.method.state.keys() == state.keys() and torch.equal(learner.method.state["last"], state["last"])


@pytest.mark.parametrize(
    ("name", "where"), [("gate", r"gate of model\.layers\.0\.mlp\.down_proj"), ("level", "level of number 0")]
)
def test_one_that_is_not_finite_is_named_and_the_task_undone(name, where):
    model = peft_model()
    learner = mbf.ContinualLora(model, Gated())
    with learner.task("one"):
        train(model, 1)
    function = logits(model)
    message = f"task 2 'two' left inf or NaN in {where}"
    with pytest.raises(NonFiniteAdapterError, match=message), learner.task("two"), torch.no_grad():
        learner.method.learned[name][0].fill_(float("nan"))
    assert torch.equal(logits(model), function) and own(model) == []


def test_an_optimiser_of_theirs_alone_counts_as_training():
    model = peft_model()
    learner = mbf.ContinualLora(model, Gated())
    with learner.task("one"):
        optimizer = torch.optim.SGD(learner.method.learned["gate"], lr=0.1)
        model(**batch(1)).loss.backward()
        optimizer.step()
    assert learner.history[0].steps == 1


def test_a_checkpoint_with_others_changes_nothing():
    model = peft_model()
    learner = mbf.ContinualLora(model, Gated())
    learner.begin_task("one")
    kept = {name: t.clone() for name, t in learner.method.state_dict().items()}
    assert {"learned/gate.0", "learned/level.0"} <= kept.keys()
    train(model, 1)
    now = {name: t.clone() for name, t in learner.method.state_dict().items()}
    for spoilt in ({n: t for n, t in kept.items() if n != "learned/level.0"}, kept | {"learned/gate.0": torch.ones(9)}):
        with pytest.raises(ValueError, match=r"'gated-for-the-test' learns .*'level.0'.* the checkpoint holds"):
            learner.continue_task(spoilt, 1)
        assert all(torch.equal(t, now[name]) for name, t in learner.method.state_dict().items())
    learner.continue_task(kept, 0)
    assert all(torch.equal(t, kept[name]) for name, t in learner.method.state_dict().items())


def test_two_learners_of_one_model_take_turns():
    model = peft_model()
    model.add_adapter("other", model.peft_config["default"])
    first = mbf.ContinualLora(model, Gated())
    second = mbf.ContinualLora(model, Gated(), adapter="other")
    model.set_adapter("default")
    first.begin_task("one")
    model.set_adapter("other")
    with pytest.raises(ValueError, match="another learner is in a task"):
        second.begin_task("one")
    assert not second.in_task and len(own(model)) == len(first.layers) + 1
    first.abandon_task()
    second.begin_task("one")
    second.abandon_task()


class Tasks(Method):
    """Keeps every task's LoRA and computes with the chosen one, the first by default; ships the sum of all."""

    name = "tasks-for-the-test"
    info = MethodInfo(
        title="Tasks", trained="A, B", frozen="W", merge="none", memory="O(TP)", task_id=True, foldable=False
    )

    def after_task(self, i, data) -> None:
        self.state = {**self.state, f"task{i}": self.current.clone()}

    def select(self, task) -> None:
        chosen = self.state[f"task{task or 1}"]
        self.route(lambda layer: LoraTerms(*(f[self.index(layer)] for f in (chosen.A, chosen.B)), layer.scale))

    def shipped(self) -> Factors:
        kept = list(self.state.values())
        return Factors(
            [torch.cat(A) for A in zip(*(f.A for f in kept), strict=True)],
            [torch.cat(B, dim=1) for B in zip(*(f.B for f in kept), strict=True)],
        )


def test_select_task_computes_as_after_that_task_and_survives_a_lost_one_and_loading(tmp_path, monkeypatch):
    monkeypatch.setitem(mbf.methods.base._METHODS, Tasks.name, Tasks)
    model = peft_model()
    learner = mbf.ContinualLora(model, Tasks())
    learner.select_task(None)  # nothing learnt yet: nothing to choose
    after = []
    for i, name in enumerate(("one", "two"), 1):
        with learner.task(name):
            train(model, i)
            after.append(logits(model))
    assert (after[0] - after[1]).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), after[0])
    learner.select_task("two")
    torch.testing.assert_close(logits(model), after[1])
    with pytest.raises(ValueError, match="no task 'three' was learnt; there are 'one', 'two'"):
        learner.select_task("three")
    with pytest.raises(KeyboardInterrupt), learner.task("three"):
        with pytest.raises(mbf.continual.TaskError, match="'three' is in progress"):
            learner.select_task("one")
        with pytest.raises(mbf.continual.TaskError, match="in progress"):
            learner.export(tmp_path / "none")
        train(model, 3)
        raise KeyboardInterrupt
    torch.testing.assert_close(logits(model), after[0])
    learner.save(tmp_path / "learner")
    loaded = mbf.ContinualLora.load(base_model(), tmp_path / "learner")
    torch.testing.assert_close(logits(loaded.model), after[0])
    loaded.select_task("two")
    torch.testing.assert_close(logits(loaded.model), after[1])


def test_export_writes_what_is_shipped_and_leaves_the_learner_alone(tmp_path):
    model = peft_model(r=3)
    learner = mbf.ContinualLora(model, Tasks())
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
    before, function = learner.method.current.clone(), logits(model)
    learner.export(tmp_path / "out")
    now = learner.method.current
    assert all(torch.equal(a, b) for a, b in zip([*before.A, *before.B], [*now.A, *now.B], strict=True))
    assert torch.equal(logits(model), function) and model.peft_config["default"].r == 3
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "out")
    assert plain.peft_config["default"].r == 6
    both = learner.method.shipped()
    learner.method.route(lambda layer: LoraTerms(*(f[learner.method.index(layer)] for f in (both.A, both.B)), 2.0))
    assert learner.layers[0].scale == 8 / 3
    learner.method.route(
        lambda layer: LoraTerms(*(f[learner.method.index(layer)] for f in (both.A, both.B)), layer.scale)
    )
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
