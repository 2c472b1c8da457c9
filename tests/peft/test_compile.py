"""torch.compile of a fused Llama: one graph, eager's results, and no other graph for another scale, λ or task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mbf

from .helpers import TARGETS, family, randomise, tokens, trained, widen_adapter

SOME = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Graphs that were compiled since the test began; that none broke is what ``fullgraph`` sees to."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def lora(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama of one layer: compiling is what takes the time here."""
    config = {"num_hidden_layers": 1, "use_cache": False}
    return family("Llama", dtype, config, **{"target_modules": SOME} | options)


def fused(memory: Any = "default", **options: Any) -> Any:
    model = lora(**options)
    mbf.fuse(model, strict=True, memory=memory)
    return model


def alike(module: Any, model: nn.Module, ids: Tensor, **tolerance: float) -> dict[str, Tensor]:
    """A training step of the compiled module gives the loss, logits and gradients of the model itself."""
    expected = trained(model, ids)
    model.zero_grad()
    found = {name.removeprefix("_orig_mod."): value for name, value in trained(module, ids).items()}
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-5} | tolerance)
    return found


def set_scales(model: nn.Module, scale: float) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            if isinstance(layer.scaling["default"], Tensor):
                layer.scaling["default"].fill_(scale)
            else:
                layer.set_scale("default", scale)


# -- one graph, eager's results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"]], ids=len)
def test_forward_and_backward_are_one_graph(targets: list[str], dropout: float) -> None:
    """Groups and whole MLPs are for eager mode: in a graph each layer computes alone, with the same masks."""
    model, ids = fused(target_modules=targets, lora_dropout=dropout), tokens()
    alike(compiled(model), model, ids)
    assert graphs() == 1


def test_low_memory_compiles_to_the_same() -> None:
    model, ids = fused("low", target_modules=TARGETS), tokens()
    alike(compiled(model), model, ids)
    assert graphs() == 1


def test_by_inductor() -> None:
    """With code of inductor's own around the operator, and eager's masks where inductor draws as eager mode does."""
    model, ids = fused(lora_dropout=0.3), tokens()
    with torch._inductor.config.patch(fallback_random=True):
        alike(compiled(model, "inductor"), model, ids)
    assert graphs() == 1


def test_fp32_adapter_on_a_half_base() -> None:
    model, ids = lora(torch.bfloat16), tokens()
    widen_adapter(model)
    mbf.fuse(model, strict=True)
    alike(compiled(model), model, ids, rtol=2e-2, atol=2e-3)
    assert graphs() == 1


def test_autocast() -> None:
    model, ids = fused(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        alike(compiled(model), model, ids, rtol=2e-2, atol=2e-3)
    assert graphs() == 1


def test_checkpointing_sees_the_same_masks_again() -> None:
    model, ids = fused(lora_dropout=0.3), tokens()
    kept = trained(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()  # not needed without reentrance, and no part of one graph
    torch.testing.assert_close(alike(compiled(model), model, ids), kept, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


# -- no other graph ----------------------------------------------------------------------------------------------------


def test_tensor_scales_never_compile_again() -> None:
    """After PEFT's own preparation for hotswap the scales are tensors, and inputs of the graph."""
    model, ids = fused(r=3, lora_dropout=0.3), tokens()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    module = compiled(model)
    losses = []
    for scale in (2.0, 0.5, 3.7):
        set_scales(model, scale)
        losses.append(alike(module, model, ids)["loss"])
    assert graphs() == 1 and len({loss.item() for loss in losses}) == 3


def test_float_scales_compile_once_more_as_with_plain_peft() -> None:
    """torch.compile takes a float for a constant until it sees a second one; from then on it is an input."""
    found = []
    for model in (lora(), fused()):
        torch.compiler.reset()
        counters.clear()
        module, ids = compiled(model), tokens()
        for scale in (2.0, 0.5, 3.7):
            set_scales(model, scale)
            alike(module, model, ids)
        found.append(graphs())
    assert found == [2, 2]


@pytest.mark.parametrize(("fuse", "prepare"), [(True, False), (True, True), (False, False)])
def test_lambda_and_the_next_task_compile_nothing(fuse: bool, prepare: bool) -> None:
    """One graph for training and one for the merged view, whatever λ, be it a float, a tensor or the method's own; and
    whatever s, where it is a tensor."""
    model, ids = lora(r=3), tokens()
    if prepare:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    if fuse:
        mbf.fuse(model, strict=True)
    learner = mbf.ContinualLora(model, learnt="before")
    module = compiled(model)
    for name in ("one", "two"):
        with learner.task(name):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            tuned = alike(module, model, ids)["loss"]
            optimizer.step()
            losses = [tuned]
            for weight in (None, 0.3, torch.tensor(0.6, dtype=torch.float64)):
                with learner.merged_view(weight):
                    losses.append(alike(module, model, ids)["loss"])
            if prepare:
                set_scales(model, 1.5 if name == "one" else 0.7)
                with learner.merged_view(0.3):
                    losses.append(alike(module, model, ids)["loss"])
            assert len({loss.item() for loss in losses}) == 4 + prepare
    assert graphs() == 2


def test_the_gradient_in_lambda() -> None:
    model, ids = fused(), tokens()
    learner = mbf.ContinualLora(model, learnt="before")
    module = compiled(model)
    with learner.task("one"):
        with torch.no_grad():
            for layer in learner.layers:
                layer.B.add_(torch.randn_like(layer.B), alpha=0.1)
        for value in (0.3, 0.7):
            gradients = []
            for run in (model, module):
                weight = torch.tensor(value, requires_grad=True)
                with learner.merged_view(weight):
                    run(input_ids=ids, labels=ids).loss.backward()
                gradients.append(weight.grad)
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
            assert gradients[0].abs() > 1e-6
    assert graphs() == 1
    alike(module, model, ids)  # between tasks there is no route
    assert graphs() == 2


# -- a change of state is seen -----------------------------------------------------------------------------------------


def second(model: Any) -> None:
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    randomise(model)
    mbf.fuse(model)
    model.set_adapter("second")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "another adapter": second,
    "new values": randomise,
    "evaluation": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_compiled_model_sees_a_change_of_state(change: str) -> None:
    model, ids = fused(lora_dropout=0.3), tokens()
    module = compiled(model)
    found = []
    for _ in range(2):
        expected, logits = (seeded(run, ids) for run in (model, module))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        found.append(logits)
        if len(found) == 1:
            CHANGES[change](model)
    assert (found[0] - found[1]).abs().max() > 1e-3  # a merged adapter's input is not dropped


def seeded(run: Any, ids: Tensor) -> Tensor:
    torch.manual_seed(5)
    return run(input_ids=ids).logits.detach()


def test_inference_mode() -> None:
    model, ids = fused().eval(), tokens(1, 5)
    with torch.inference_mode():
        torch.testing.assert_close(seeded(compiled(model), ids), seeded(model, ids), rtol=1e-4, atol=1e-5)
    assert graphs() == 1
