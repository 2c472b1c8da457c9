"""The learner on a real (tiny, random) Llama: every method, any loop, and what happens when a task goes wrong."""

import contextlib
import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import mbf
from mbf.continual import NonFiniteAdapterError, TaskError
from mbf.methods import Method, MethodInfo
from mbf.peft import calls, fuse, is_fused, unfuse
from tests.continual.tiny import base_model, batch, batches, logits, peft_model, train

METHODS = [name for name in mbf.methods.available() if not mbf.methods.get(name).joint]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def factors(learner):
    return learner.method.current.clone()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip([*a.A, *a.B], [*b.A, *b.B], strict=True))


def three_tasks(model, method, **options):
    learner = mbf.ContinualLora(model, method, **options)
    for i in (1, 2, 3):
        torch.manual_seed(i)
        with learner.task(f"t{i}", batches(i)):
            train(model, i)
    return learner


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_three_tasks_ship_a_plain_peft_adapter_and_never_touch_W(name, fuse, tmp_path):
    from peft import PeftModel

    model = peft_model()
    if fuse:
        assert mbf.fuse(model).fused
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    before = logits(model)
    learner = three_tasks(model, name)
    assert [r.name for r in learner.history] == ["t1", "t2", "t3"] and learner.task_index == 3
    assert all(r.steps == 4 and r.seconds > 0 for r in learner.history)
    assert (logits(model) - before).abs().max() > 1e-3
    assert {n for n, _ in model.named_parameters() if "lora_" not in n} == set(frozen)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    learned = logits(model)
    learner.export(tmp_path / "exported")
    assert torch.equal(logits(model), learned)
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "exported")
    if learner.method.info.foldable:
        torch.testing.assert_close(logits(plain), learned, **CLOSE)
    else:
        if learner.method.info.task_id:  # a plain LoRA may be what computes without a label, but not what does with one
            learner.select_task("t1")
        assert (logits(plain) - logits(model)).abs().max() > 1e-4
    if not learner.method.own_operator:
        model.save_pretrained(tmp_path / "saved")
        PeftModel.from_pretrained(base_model(), tmp_path / "saved")


def test_slao_is_algorithm_1_on_the_model():
    model = peft_model()
    learner = mbf.ContinualLora(model)
    tuned = []
    for i in (1, 2, 3):
        with learner.task(f"t{i}"):
            start = factors(learner)
            if i > 1:
                for A, B, B_ft in zip(start.A, start.B, tuned[-1].B, strict=True):
                    torch.testing.assert_close(A @ A.mT, torch.eye(len(A)), **CLOSE)
                    assert torch.equal(B, B_ft)
            train(model, i)
            tuned.append(factors(learner))
    w = [i**-0.5 * math.prod(1 - j**-0.5 for j in range(i + 1, 4)) for i in (1, 2, 3)]
    for n, layer in enumerate(learner.layers):
        assert torch.equal(layer.A, tuned[-1].A[n])
        torch.testing.assert_close(layer.B.data, sum(c * t.B[n] for c, t in zip(w, tuned, strict=True)), **CLOSE)
    next_A = sum(A.nbytes for A in tuned[0].A)
    assert learner.memory_bytes() == {"adapter": tuned[0].bytes(), "state": tuned[0].bytes(), "ahead": next_A}


@pytest.mark.parametrize(
    ("name", "options"),
    [("slao", {}), ("slao", {"basis": "rsvd", "B_start": "preserve", "rank": 2}), ("inclora", {}), ("opcm", {})],
)
def test_memory_bytes_are_what_is_alive_beside_the_model(name, options):
    model = peft_model()
    train(model, 0, steps=1)  # whatever torch and PEFT keep from the first time on
    gc.collect()
    before = storages(model)
    learner = mbf.ContinualLora(model, name, learnt=False, **options)
    for i in (1, 2, 3, None):
        with contextlib.suppress(KeyboardInterrupt), learner.task(f"t{i}"):
            train(model, i or 4)
            if i is None:
                raise KeyboardInterrupt
        model.zero_grad()
        gc.collect()
        alive = {start: size for start, size in storages(model).items() if start not in before}
        found, numbers = learner.memory_bytes(), 8 * sum(isinstance(v, float) for v in learner.method.state.values())
        assert sum(alive.values()) == found["state"] - numbers + found["ahead"]
        assert found["adapter"] == factors(learner).bytes()


def storages(model):
    """The size of all memory that tensors lie in, by its address, without the model's parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    here = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout is torch.strided]
    parts = {storage.data_ptr(): storage.nbytes() for storage in here}
    return {start: size for start, size in parts.items() if start not in own}


def test_parameters_keep_their_identity_so_one_optimiser_serves_all_tasks():
    model = peft_model()
    learner = mbf.ContinualLora(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for i in (1, 2):
        with learner.task(f"t{i}"):
            model(**batch(i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [r.steps for r in learner.history] == [1, 1]


@pytest.mark.parametrize("name", METHODS)
def test_an_exception_leaves_the_merged_lora_and_the_state_as_they_were(name):
    model = peft_model()
    learner = mbf.ContinualLora(model, name)
    for i in (1, 2):
        with learner.task(f"t{i}", batches(i)):
            train(model, i)
    before, state, function = (
        factors(learner),
        {k: v.clone() for k, v in learner.method.state_dict().items()},
        logits(model),
    )
    with pytest.raises(KeyboardInterrupt), learner.task("bad", batches(3)):
        train(model, 3)
        assert not torch.equal(logits(model), function)
        raise KeyboardInterrupt
    assert equal(factors(learner), before)
    assert all(torch.equal(v, state[k]) for k, v in learner.method.state_dict().items())
    assert torch.equal(logits(model), function)
    assert learner.task_index == 2 and not learner.in_task

    undisturbed = copy.deepcopy(before)
    torch.manual_seed(3)
    with learner.task("t3", batches(3)):
        train(model, 3)
    twin_model = peft_model()
    twin = mbf.ContinualLora(twin_model, name)
    for i in (1, 2):
        with twin.task(f"t{i}", batches(i)):
            train(twin_model, i)
    for layer, A, B in zip(twin.layers, undisturbed.A, undisturbed.B, strict=True):
        layer.write(A, B)
    twin.method.load_state_dict(state)
    torch.manual_seed(3)
    with twin.task("t3", batches(3)):
        train(twin_model, 3)
    assert equal(factors(twin), factors(learner)) and torch.equal(logits(twin_model), logits(model))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_non_finite_adapter_names_task_and_layer_and_is_undone(factor):
    model = peft_model()
    learner = mbf.ContinualLora(model)
    with learner.task("good"):
        train(model, 1)
    before = factors(learner)
    with (
        pytest.raises(
            NonFiniteAdapterError, match=rf"task 2 'poison' left inf or NaN in .*layers.1.*v_proj \({factor}\)"
        ),
        learner.task("poison"),
    ):
        train(model, 2)
        layer = next(x for x in learner.layers if x.name.endswith("layers.1.self_attn.v_proj"))
        getattr(layer, factor).data[0, 0] = float("nan")
    assert equal(factors(learner), before) and learner.task_index == 1


def test_a_merge_that_overflows_is_undone():
    model = peft_model()
    learner = mbf.ContinualLora(model, schedule=1e38)
    with learner.task("one"):
        train(model, 1)
    before = factors(learner)
    with pytest.raises(NonFiniteAdapterError, match="merging task 2 'two' gave"), learner.task("two"):
        for layer in learner.layers:
            layer.B.data.fill_(10.0)  # within max_norm, and beyond fp32 only by λ
    assert equal(factors(learner), before)


def test_merged_view_is_the_merge_and_writes_nothing():
    model = peft_model()
    learner = mbf.ContinualLora(model)
    with learner.task("one"):
        train(model, 1)
    with learner.task("two"):
        train(model, 2)
        finetuned, inside = factors(learner), logits(model)
        with learner.merged_view():
            would_be = logits(model)
        with learner.merged_view(1.0):
            torch.testing.assert_close(logits(model), inside, **CLOSE)
        lam = torch.tensor(0.6, requires_grad=True)
        with learner.merged_view(lam):
            model(**batch(1)).loss.backward()
            model(**batch(2)).loss.backward()
        assert lam.grad is not None and lam.grad != 0
        assert equal(factors(learner), finetuned)
        assert torch.equal(logits(model), inside)
    torch.testing.assert_close(logits(model), would_be, **CLOSE)
    assert (would_be - inside).abs().max() > 1e-4
    with learner.merged_view():
        torch.testing.assert_close(logits(model), would_be, **CLOSE)
    with pytest.raises(TaskError, match="needs a task in progress"), learner.merged_view(0.5):
        pass


def test_merged_view_gradient_in_lambda_matches_a_difference():
    model = peft_model()
    learner = mbf.ContinualLora(model)
    with learner.task("one"):
        train(model, 1)
    learner.begin_task("two")
    train(model, 2)
    model.eval()

    def loss(lam):
        with learner.merged_view(lam):
            return model(batch(5)["input_ids"]).logits.double().square().mean()

    lam = torch.tensor(0.4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(lam), lam)
    step = 0.02  # the model computes in fp32: a wide step, and the tolerance of its curvature
    difference = (loss(0.4 + step) - loss(0.4 - step)) / (2 * step)
    torch.testing.assert_close(gradient.double(), difference.detach(), rtol=1e-2, atol=0)


def test_merged_view_without_a_weight_serves_every_method_and_refuses_one():
    model = peft_model()
    learner = mbf.ContinualLora(model, "inclora")
    with learner.task("one"):
        train(model, 1)
    with learner.task("two"):
        train(model, 2)
        inside = logits(model)
        with learner.merged_view():
            torch.testing.assert_close(logits(model), inside, **CLOSE)
        with pytest.raises(ValueError, match="merges without a weight"), learner.merged_view(0.5):
            pass
        torch.testing.assert_close(logits(model), inside)


def test_an_adapter_trained_before_is_task_1(tmp_path):
    model = peft_model()
    train(model, 1)
    tuned = [layer.B.clone() for layer in mbf.ContinualLora(model, learnt=False).layers]
    learner = mbf.ContinualLora(model, learnt="by hand")
    assert [r.name for r in learner.history] == ["by hand"]
    learner.begin_task("two")
    for layer, B in zip(learner.layers, tuned, strict=True):
        assert torch.equal(layer.B, B)
        torch.testing.assert_close(layer.A @ layer.A.mT, torch.eye(4), **CLOSE)
    learner.abandon_task()
    assert mbf.ContinualLora(model).history[0].name == "before"
    assert mbf.ContinualLora(model, learnt=False).task_index == 0


def test_trainer_with_accumulation_and_checkpointing_learns_a_stream(tmp_path):
    model = peft_model(lora_dropout=0.1)
    mbf.fuse(model)
    learner = mbf.ContinualLora(model, "olora")
    for i in (1, 2):
        rows = [{k: v[0] for k, v in batch(10 * i + n, rows=1).items()} for n in range(8)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(i)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with learner.task(f"t{i}"):
            Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert [r.steps for r in learner.history] == [2, 2]
    assert {layer.A.shape[0] for layer in learner.layers} == {8}


class Recorder(Method):
    """Counts its hooks; its penalty is Σ A² / 2 with gradient A."""

    name = "recorder"
    info = MethodInfo("records", "A", "B", "none", "none")

    def __init__(self):
        super().__init__()
        self.seen = []

    def trains(self, i):
        return True, False

    def forward_mod(self, step, inputs):
        self.seen.append(("forward", step, tuple(inputs["input_ids"].shape)))

    def loss_extra(self):
        self.seen.append(("loss",))
        return sum(layer.A.square().sum() for layer in self.layers) / 2

    def after_backward(self):
        self.seen.append(("backward", self.layers[0].A.grad.clone()))

    def after_step(self, step):
        self.seen.append(("step", step))

    def inference_adapter(self, inputs):
        self.seen.append(("inference",))


def test_hooks_run_once_an_optimiser_step_whatever_the_accumulation():
    model = peft_model()
    learner = mbf.ContinualLora(model, Recorder())
    seen = learner.method.seen
    model(**batch(0))
    assert seen == [("inference",)]
    seen.clear()
    with learner.task("one"):
        assert not learner.layers[0].B.requires_grad and learner.layers[0].A.requires_grad
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        stranger = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        model.train()
        for n in range(2):
            model(**batch(n)).loss.backward()
        stranger.step()
        plain = learner.layers[0].A.grad.clone()
        optimizer.step()
        model.eval()
        model(**batch(3))
    assert [s[0] for s in seen] == ["forward", "forward", "loss", "backward", "step", "inference"]
    torch.testing.assert_close(seen[3][1], plain + learner.layers[0].A)
    assert learner.layers[0].B.requires_grad


def test_training_the_wrong_parameters_is_noticed():
    model = peft_model()
    learner = mbf.ContinualLora(model, "inclora")
    for i in (1, 2):
        with learner.task(f"t{i}"):
            train(model, i)
    stale = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="no optimiser step reached the adapter"), learner.task("t3"):
        model(**batch(1)).loss.backward()
        stale.step()


def test_misuse_is_refused_before_anything_changes():
    model = peft_model()
    learner = mbf.ContinualLora(model)
    with pytest.raises(TaskError, match="no task is in progress"):
        learner.end_task()
    learner.begin_task("one")
    with pytest.raises(TaskError, match="'one' is in progress"):
        learner.begin_task("two")
    with pytest.raises(TaskError, match="end or abandon it before saving"):
        learner.save("nowhere")
    learner.abandon_task()
    model.merge_adapter()
    with pytest.raises(TaskError, match="unmerge_adapter"):
        learner.begin_task("one")
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="unknown; did you mean 'seqlora'"):
        mbf.ContinualLora(model, "seqlor")
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        mbf.ContinualLora(model, adapter="other")
    with pytest.raises(ValueError, match="built already"):
        mbf.ContinualLora(model, Recorder(), start="zero")


@pytest.mark.parametrize("name", [0, None, True, np.int64(3), b"x"])
def test_a_task_name_that_is_no_string_is_refused_before_anything_changes(name):
    model = peft_model()
    learner = mbf.ContinualLora(model)
    before = factors(learner)
    with pytest.raises(TypeError, match=r"^name: found .* wanted a string"), learner.task(name):
        pass
    assert equal(factors(learner), before) and not learner.in_task and not learner.history
    if name is not None:
        with pytest.raises(TypeError, match=r"^learnt: found .* wanted a string"):
            mbf.ContinualLora(model, learnt=name)


def test_data_that_can_be_gone_through_only_once_are_refused_before_anything_changes():
    class Data(list):
        pass

    model = peft_model()
    learner = mbf.ContinualLora(model, "inflora")
    before = factors(learner)
    with pytest.raises(TaskError, match=r"'inflora' goes through .* generator, .* pass a list, a DataLoader"):
        learner.begin_task("one", (one for one in batches(1)))
    assert equal(factors(learner), before) and not learner.in_task
    data = Data(batches(1))
    learner.begin_task("one", data)
    train(model, 1)
    with pytest.raises(TaskError, match="list_iterator"):
        learner.end_task(iter(batches(1)))
    assert learner.in_task
    learner.end_task()
    dead = weakref.ref(data)
    del data
    gc.collect()
    assert dead() is None
    with mbf.ContinualLora(peft_model()).task("one", iter(batches(1))) as plain:  # slao looks at no data
        train(plain.model, 1)


def test_an_exception_after_the_block_ended_its_task_itself_passes_on():
    model = peft_model()
    learner = mbf.ContinualLora(model)
    for leave, learnt in ((learner.abandon_task, 0), (learner.end_task, 1)):
        with pytest.raises(KeyError, match="mine") as caught, learner.task("one"):
            train(model, 1)
            leave()
            raise KeyError("mine")
        assert not getattr(caught.value, "__notes__", []) and len(learner.history) == learnt and not learner.in_task


def test_numbers_that_are_none_are_refused_before_anything_changes():
    model = peft_model()
    with pytest.raises(TypeError, match=r"^max_norm: found 'big' of type str, wanted a number"):
        mbf.ContinualLora(model, max_norm="big")
    assert not is_fused(model)
    learner = mbf.ContinualLora(model)
    with learner.task("one"):
        train(model, 1)
        inside = logits(model)
        for weight, error in (("x", TypeError), ([0.5], TypeError), (torch.ones(2), ValueError)):
            with pytest.raises(error, match=r"^weight: found .* wanted"), learner.merged_view(weight):
                pass
        assert torch.equal(logits(model), inside)
        with learner.merged_view(np.float32(0.5)):
            logits(model)


def test_joint_method_takes_one_task():
    model = peft_model()
    learner = mbf.ContinualLora(model, "multitask")
    with learner.task("all"):
        train(model, 1)
    with pytest.raises(TaskError, match="learns all tasks at once"):
        learner.begin_task("more")


def test_an_inactive_adapter_is_refused():
    from peft import LoraConfig

    model = peft_model()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    learner = mbf.ContinualLora(model, adapter="second")
    with pytest.raises(TaskError, match=r"not active.*set_adapter\('second'\)"):
        learner.begin_task("one")
    model.set_adapter("second")
    with learner.task("one"):
        train(model, 1)


@pytest.mark.parametrize("chosen", [None, True, False])
def test_the_learner_fuses_the_model_unless_told_not_to(chosen: bool | None) -> None:
    model = peft_model()
    stock = {type(layer) for layer in model.modules()}
    learner = mbf.ContinualLora(model, **({} if chosen is None else {"fuse": chosen}))
    assert is_fused(model) is (chosen is not False)
    before = calls.copy()
    with learner.task("first"):
        train(model, 1)
    assert (calls["fast"] > before["fast"]) is (chosen is not False)
    unfuse(model)
    assert {type(layer) for layer in model.modules()} == stock


def test_the_learner_leaves_a_fused_model_as_it_was_fused() -> None:
    model = peft_model(target_modules=["gate_proj", "up_proj", "down_proj"])
    fuse(model, memory="low")
    before = [(type(module), module.__dict__.get("_recompute")) for module in model.modules()]
    mbf.ContinualLora(model)
    assert [(type(module), module.__dict__.get("_recompute")) for module in model.modules()] == before
