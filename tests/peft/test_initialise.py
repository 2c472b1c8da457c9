"""orthogonalize_: orthonormal rows of A in every layer, and the same function as before."""

from __future__ import annotations

import copy
from typing import Any

import peft.tuners.lora.dora
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mbf
import mbf.peft.initialise
from mbf.peft import adapter_layers

from .helpers import base_model, error, llama, randomise, tokens
from .starts import assert_orthonormal, assert_same_state, layers_of, products, state

# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.3},
    ],
    ids=str,
)
def test_rows_are_orthonormal_and_the_function_stays(options: dict[str, Any]) -> None:
    model, ids = llama(**options).eval(), tokens()
    before, old = model(ids).logits, [layer.A.detach().clone() for layer in layers_of(model)]
    with model.disable_adapter():
        assert (model(ids).logits - before).abs().max() > 0.1  # so the adapter counts
    assert mbf.orthogonalize_(model) is None
    assert_orthonormal(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    for layer, A in zip(layers_of(model), old, strict=True):
        assert (layer.A - A).norm() > 0.1  # they were not orthonormal before
        L = A @ layer.A.mT
        assert L.triu(1).abs().max() < 1e-5 and (L.diagonal() > 0).all()


def test_activated_lora_keeps_its_function() -> None:
    model, ids = llama(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM").eval(), tokens()
    ids[:, 2:4] = torch.tensor([5, 6])
    before = model(input_ids=ids).logits
    mbf.orthogonalize_(model)
    assert_orthonormal(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [True, False])
def test_every_dtype_rounds_once(dtype: torch.dtype, trainable: bool) -> None:
    model = llama(target_modules=["q_proj", "down_proj"]).to(dtype).requires_grad_(trainable)
    exact, own = products(model), [(layer.A, layer.B) for layer in layers_of(model)]
    mbf.orthogonalize_(model)
    eps = torch.finfo(dtype).eps
    assert_orthonormal(model, 3 * eps)
    for layer, (A, B), product in zip(layers_of(model), own, exact, strict=True):
        assert layer.A is A and layer.B is B and A.dtype is B.dtype is dtype
        assert A.requires_grad is B.requires_grad is trainable
        # One rounding of A and one of B, each eps/2 at most; in fp64 that of the computation comes on top.
        assert error(B.double() @ A.double(), product) < (9 if dtype is torch.float64 else 1) * eps


def test_a_fold_fits_the_rounded_A() -> None:
    """B L for Q as it is stored is nearer to B A than for Q before it was rounded."""
    A, B = torch.randn(8, 32).bfloat16(), torch.randn(64, 8)
    Q = torch.linalg.qr(A.double().mT).Q.mT.bfloat16().double()
    got = mbf.peft.initialise._fold(A, B, Q.bfloat16()).double() @ Q
    exact = B.double() @ A.double()
    assert error(got, exact) < 0.9 * error(B.double() @ (A.double() @ Q.mT) @ Q, exact)


def test_a_fold_is_computed_in_fp64_and_rounded_once() -> None:
    model = llama(target_modules=["q_proj"]).bfloat16()
    old = [(layer.A.detach().double(), layer.B.detach().double()) for layer in layers_of(model)]
    mbf.orthogonalize_(model)
    for layer, (A, B) in zip(layers_of(model), old, strict=True):
        best = torch.linalg.lstsq(layer.A.double().mT, (B @ A).mT).solution.mT
        assert torch.equal(layer.B, best.bfloat16())


def test_zero_B_stays_zero_and_a_second_call_changes_nothing() -> None:
    model = get_peft_model(base_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    mbf.orthogonalize_(model)
    assert_orthonormal(model)
    assert all(not layer.B.any() for layer in layers_of(model))
    randomise_B(model)
    before = state(model)
    mbf.orthogonalize_(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=2e-6)


def randomise_B(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in layers_of(model):
            layer.B.normal_()


def test_carry_leaves_B() -> None:
    model, ids = llama().eval(), tokens()
    before, logits = state(model), model(ids).logits
    mbf.orthogonalize_(model, B="carry")
    assert_orthonormal(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) is ("lora_A" not in name)
    assert (model(ids).logits - logits).abs().max() > 1e-2


def test_dependent_rows_are_completed_and_the_function_stays() -> None:
    model = llama(target_modules=["q_proj"])
    with torch.no_grad():
        for layer in layers_of(model):
            layer.A[1] = -2 * layer.A[0]
            layer.A[3] = 0
    before = products(model)
    mbf.orthogonalize_(model)
    assert_orthonormal(model)
    for new, old in zip(products(model), before, strict=True):
        assert error(new, old) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_models(when: str) -> None:
    model, ids = llama().eval(), tokens()
    if when == "before":
        mbf.fuse(model)
    before = model(ids).logits
    mbf.orthogonalize_(model)
    if when == "after":
        mbf.fuse(model)
    assert_orthonormal(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_all_layers_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = mbf.peft.initialise.orthonormal_rows
    monkeypatch.setattr(mbf.peft.initialise, "orthonormal_rows", lambda A: sizes.append(len(A)) or whole(A))
    mbf.orthogonalize_(llama(rank_pattern={"q_proj": 2}))
    assert sizes == [14]


def test_an_optimiser_goes_on() -> None:
    model, ids = llama(), tokens()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for orthogonalise in (False, True):
        if orthogonalise:
            mbf.orthogonalize_(model)
        before = state(model)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
        assert len(changed) == 28 and all("lora_" in name for name in changed)


def test_only_the_named_adapter() -> None:
    model = llama()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj", "q_proj"]))
    randomise(model)
    before = state(model)
    mbf.orthogonalize_(model, "second")
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == [n for n in before if "second" in n]


@pytest.mark.parametrize("build", ["inject", "wrapped", "Conv1D"])
def test_other_ways_to_hold_an_adapter(build: str) -> None:
    if build == "Conv1D":
        model: Any = nn.Sequential(Conv1D(6, 8))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
    else:
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base_model())
    randomise(model)
    before = products(model)
    mbf.orthogonalize_(nn.ModuleDict({"policy": model}) if build == "wrapped" else model)
    assert_orthonormal(model)
    for new, old in zip(products(model), before, strict=True):
        assert error(new, old) < 1e-6


class Packed(nn.Linear):
    """As a quantised layer: the weight is no float."""

    def __init__(self) -> None:
        super().__init__(6, 6, bias=False)
        self.weight = nn.Parameter(torch.randint(-9, 9, (6, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).mT / 9


def test_a_quantised_base_does_not_matter() -> None:
    model = get_peft_model(nn.Sequential(Packed()), LoraConfig(r=2, target_modules=["0"]))
    model.float()
    model.base_model.model[0].base_layer = Packed()
    randomise(model)
    x = torch.randn(3, 6)
    before = model(x)
    mbf.orthogonalize_(model)
    assert_orthonormal(model)
    torch.testing.assert_close(model(x), before)


def test_shared_factors() -> None:
    model = llama(target_modules=["q_proj", "o_proj"])
    one, two, three, four = layers_of(model)
    two.module.lora_A["default"].weight = one.A
    four.module.lora_A["default"].weight, four.module.lora_B["default"].weight = three.A, three.B
    before = products(model)
    mbf.orthogonalize_(model)
    assert_orthonormal(model)
    for new, old in zip(products(model), before, strict=True):
        assert error(new, old) < 1e-6
    two.module.lora_A["default"].weight = nn.Parameter(torch.randn(4, 32))
    two.module.lora_B["default"].weight = one.B
    unchanged = state(model)
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj and model.layers.0.self_attn.o_proj share B and not A"):
        mbf.orthogonalize_(model)
    assert_same_state(model, unchanged)
    mbf.orthogonalize_(model, B="carry")
    assert_orthonormal(model)


def test_dora_forgets_products_that_peft_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", True)
    model, ids = llama(use_dora=True).eval(), tokens()
    kept = model(ids).logits
    mbf.orthogonalize_(model, B="carry")
    after = model(ids).logits
    assert not torch.equal(after, kept)
    monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", False)
    torch.testing.assert_close(after, model(ids).logits)


# -- what it refuses, before anything changes --------------------------------------------------------------------------


def spoil(model: Any, how: str) -> None:
    layer = adapter_layers(model, "default")[-1]
    match how:
        case "A" | "B":
            getattr(layer, how).data[0, 0] = float("nan" if how == "A" else "inf")
        case "merged":
            model.merge_adapter()
        case "meta":
            layer.module.lora_A["default"].weight = nn.Parameter(torch.empty(4, 32, device="meta"))
        case "wide":
            layer.write(torch.randn(33, 32), torch.randn(layer.B.shape[0], 33))
        case "overflow":
            model.half()
            layer.A.data.fill_(6e4)
            layer.B.data.fill_(6e4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("A", r"layer model.layers.1.self_attn.q_proj: A holds NaN or infinity"),
        ("B", r"layer model.layers.1.self_attn.q_proj: B holds NaN or infinity"),
        ("merged", r"'default' is merged into W of layer model.*unmerge_adapter"),
        ("meta", r"layer model.layers.1.self_attn.q_proj: A is a Parameter of torch.float32 on meta"),
        ("wide", r"layer model.layers.1.self_attn.q_proj: A has 33 rows of length 32"),
        ("overflow", r"layer model.layers.1.self_attn.q_proj: B L.*does not fit its dtype; cast A and B to fp32"),
    ],
)
def test_errors_name_the_layer_and_nothing_changes(how: str, message: str) -> None:
    model = llama(target_modules=["q_proj", "o_proj"])
    spoil(model, how)
    before = {n: t for n, t in state(model).items() if not t.is_meta}
    with pytest.raises(ValueError, match=message):
        mbf.orthogonalize_(model)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.embedding, self.convolution = nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["linear", "embedding"]}, "layer embedding is no linear layer"),
        ({"target_modules": ["linear", "convolution"]}, "layer convolution is no linear layer"),
        ({"target_parameters": ["head.weight"]}, "layer head is no linear layer"),
        ({"init_lora_weights": "mica"}, "layer linear is the LoRA variant MiCALinearVariant"),
    ],
    ids=str,
)
def test_what_is_more_than_a_product_is_refused(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(Parts(), LoraConfig(**({"r": 2, "target_modules": ["linear"]} | options)))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        mbf.orthogonalize_(model)
    assert_same_state(model, before)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no PEFT LoRA layer"):
        mbf.orthogonalize_(base_model())
    model = llama()
    with pytest.raises(ValueError, match=r"no LoRA adapter 'defualt'; it has 'default'"):
        mbf.orthogonalize_(model, "defualt")
    with pytest.raises(ValueError, match=r"B is 'keep'; it must be 'preserve'"):
        mbf.orthogonalize_(model, B="keep")  # type: ignore[arg-type]


def test_an_interruption_while_writing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(target_modules=["q_proj", "o_proj"])
    before, first, last = state(model), layers_of(model)[0].A, layers_of(model)[-1].B
    original, copy_, reached = first.detach().clone(), Tensor.copy_, []

    def interrupted(into: Tensor, value: Tensor) -> Tensor:
        if into is last and not reached:
            reached.append(not torch.equal(first, original))
            raise KeyboardInterrupt
        return copy_(into, value)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mbf.orthogonalize_(model)
    monkeypatch.undo()
    assert reached == [True]  # others were written by then
    assert_same_state(model, before)


def test_a_copy_has_a_life_of_its_own() -> None:
    model = llama(target_modules=["q_proj"])
    twin, before = copy.deepcopy(model), state(model)
    mbf.orthogonalize_(twin)
    assert_same_state(model, before)
