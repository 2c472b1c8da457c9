"""init_pissa_: the leading part of every W as the adapter, the rest as the base, and the same function as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft.tuners.lora.dora
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mbf
import mbf.peft.pissa
from mbf.ops import use_backend
from mbf.peft import adapter_layers, calls

from .helpers import TARGETS, base_model, error, randomise, tokens
from .starts import assert_same_state, layers_of, state


def untrained(base: nn.Module | None = None, **options: Any) -> Any:
    """A tiny Llama whose weights have a spectrum to find, with a fresh adapter."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options
    return get_peft_model(decaying(base_model()) if base is None else base, LoraConfig(**settings))


def decaying(model: Any) -> Any:
    """Singular values 2, 1.2, 0.72, ... in every linear layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                weight = torch.randn(module.weight.shape, generator=generator)
                U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
                module.weight.copy_(U * 2 * 0.6 ** torch.arange(len(S)) @ Vh)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    """W of every layer of the adapter, as [d_out, d_in] in fp64."""
    found = []
    for layer in layers_of(model):
        W = layer.module.get_base_layer().weight.detach().double().clone()
        found.append(W.mT if layer.module.fan_in_fan_out else W)
    return found


def parts(model: nn.Module) -> list[Tensor]:
    return [layer.scale * layer.B.detach().double() @ layer.A.detach().double() for layer in layers_of(model)]


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("exact", [False, True])
def test_the_leading_part_moves_and_the_function_stays(options: dict[str, Any], exact: bool) -> None:
    model, ids = untrained(**options).eval(), tokens()
    before, W = model(ids).logits, weights(model)
    assert mbf.init_pissa_(model, exact=exact) is None
    for layer, old, residual, part in zip(layers_of(model), W, weights(model), parts(model), strict=True):
        r = layer.A.shape[0]
        U, S, Vh = torch.linalg.svd(old)
        assert error(part, U[:, :r] * S[:r] @ Vh[:r]) < (1e-5 if exact else 1e-3)
        assert error(residual + part, old) < 1e-6
        root = (S[:r] / layer.scale).sqrt()  # the share of each factor
        torch.testing.assert_close(layer.A.double().norm(dim=1), root, rtol=1e-3, atol=0)
        torch.testing.assert_close(layer.B.double().norm(dim=0), root, rtol=1e-3, atol=0)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (model(ids).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("conv1d", [False, True])
def test_as_pefts_own(conv1d: bool) -> None:
    """What ``init_lora_weights="pissa"`` computes: the same A and B up to signs, the same W."""

    def build(start: Any) -> Any:
        base = decaying(nn.Sequential(Conv1D(9, 13) if conv1d else nn.Linear(13, 9)))
        config = LoraConfig(r=3, lora_alpha=12, target_modules=["0"], fan_in_fan_out=conv1d, init_lora_weights=start)
        return get_peft_model(base, config)

    theirs, ours = build("pissa"), build(True)
    for exact in (True, False):
        mbf.init_pissa_(ours, exact=exact)
        (peft_layer,), (layer,) = layers_of(theirs), layers_of(ours)
        sign = torch.sign((peft_layer.A * layer.A).sum(1))
        torch.testing.assert_close(layer.A * sign[:, None], peft_layer.A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.B * sign, peft_layer.B, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)
        ours = build(True)


@pytest.mark.parametrize("of_W", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16, torch.float16])
def test_W_gives_up_what_the_adapter_holds_after_rounding(of_W: torch.dtype, of_adapter: torch.dtype) -> None:
    model = untrained(decaying(base_model()).to(of_W))
    for layer in layers_of(model):
        layer.A.data, layer.B.data = layer.A.data.to(of_adapter), layer.B.data.to(of_adapter)
    W, own = weights(model), dict(model.named_parameters())
    mbf.init_pissa_(model)
    for name, parameter in model.named_parameters():
        assert parameter is own[name] and parameter.dtype is (of_adapter if "lora_" in name else of_W)
    rounding = torch.finfo(of_W).eps / 2 if of_W is not torch.float64 else 1e-15
    for old, residual, part in zip(W, weights(model), parts(model), strict=True):
        assert part.norm() > 0.9 * old.norm()
        bound = 1.01 * rounding * residual.abs() + (4e-7 if of_W is not torch.float64 else 1e-15) * old.abs().max()
        assert ((residual + part - old).abs() <= bound).all()


def test_requires_grad_stays() -> None:
    model = untrained()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    mbf.init_pissa_(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_models(when: str) -> None:
    model, ids = untrained().eval(), tokens()
    before = model(ids).logits
    if when == "before":
        mbf.fuse(model)
        model(ids)
    mbf.init_pissa_(model)
    if when == "after":
        mbf.fuse(model)
    slow = calls["slow"]
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert calls["slow"] == slow


def test_a_generator_decides_and_more_iterations_are_nearer() -> None:
    def found(seed: int, **options: Any) -> list[Tensor]:
        model = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))  # flat spectra
        mbf.init_pissa_(model, generator=torch.Generator().manual_seed(seed), **options)
        return parts(model)

    assert all(torch.equal(a, b) for a, b in zip(found(1), found(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found(1), found(2), strict=True))
    norms = [sum(p.norm() for p in found(1, n_iter=n, oversample=0)) for n in (0, 2, 20)]
    assert norms[0] < norms[1] < norms[2]
    assert sum(p.norm() for p in found(1, n_iter=0, oversample=8)) > norms[0]


def test_bounded_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes weights of one shape and at most _AT_A_TIME bytes of them, or a single one."""
    whole, ways = mbf.peft.pissa.rsvd, {}
    for limit in (1, 3 * 32 * 32 * 4, 1 << 28):
        seen: list[list[torch.Size]] = []
        monkeypatch.setattr(mbf.peft.pissa, "_AT_A_TIME", limit)
        monkeypatch.setattr(
            mbf.peft.pissa, "rsvd", lambda W, r, seen=seen, **o: seen.append([w.shape for w in W]) or whole(W, r, **o)
        )
        model = untrained()
        mbf.init_pissa_(model, n_iter=8)
        assert sum(map(len, seen)) == 14 and all(len(set(shapes)) == 1 for shapes in seen)
        assert all(len(shapes) == 1 or sum(s.numel() * 4 for s in shapes) <= limit for shapes in seen)
        ways[limit] = len(seen), parts(model)
    assert [calls for calls, _ in ways.values()] == [14, 6, 4]
    for _, found in ways.values():
        for one, other in zip(found, ways[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_reference_gives_the_same() -> None:
    models = [untrained(), untrained()]
    mbf.init_pissa_(models[0], generator=torch.Generator().manual_seed(3))
    with use_backend("reference"):
        mbf.init_pissa_(models[1], generator=torch.Generator().manual_seed(3))
    for one, other in zip(parts(models[0]), parts(models[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_force_begins_anew_with_what_was_learnt() -> None:
    model, ids = untrained().eval(), tokens()
    randomise(model)
    before, total = model(ids).logits, [W + part for W, part in zip(weights(model), parts(model), strict=True)]
    unchanged = state(model)
    with pytest.raises(ValueError, match=r"layer model.layers.0.*: B is not zero.*force=True"):
        mbf.init_pissa_(model)
    assert_same_state(model, unchanged)
    mbf.init_pissa_(model, exact=True, force=True)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    for old, part in zip(total, parts(model), strict=True):
        U, S, Vh = torch.linalg.svd(old)
        assert error(part, U[:, :4] * S[:4] @ Vh[:4]) < 1e-4
    with pytest.raises(ValueError, match="B is not zero"):  # a second start is no accident's
        mbf.init_pissa_(model)


@pytest.mark.parametrize("build", ["inject", "wrapped"])
def test_other_ways_to_hold_an_adapter(build: str) -> None:
    model: Any = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), decaying(base_model()))
    W = weights(model)
    mbf.init_pissa_(nn.ModuleDict({"policy": model}) if build == "wrapped" else model)
    for old, residual, part in zip(W, weights(model), parts(model), strict=True):
        assert part.norm() > 0.7 * old.norm() and error(residual + part, old) < 1e-6


def test_what_peft_keeps_of_dora_stays_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", True)
    model, ids = untrained(use_dora=True).eval(), tokens()
    kept = model(ids).logits
    mbf.init_pissa_(model)
    torch.testing.assert_close(model(ids).logits, kept, rtol=1e-4, atol=1e-5)


def test_the_learner_can_take_it_as_a_start() -> None:
    model = untrained()
    mbf.init_pissa_(model)
    assert mbf.ContinualLora(model, learnt=False).task_index == 0
    assert mbf.ContinualLora(model).task_index == 1


# -- saving ------------------------------------------------------------------------------------------------------------


def learn(model: Any) -> Tensor:
    """A few steps; the logits after them."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()(tokens_of_test()).logits.detach()


def tokens_of_test() -> Tensor:
    return torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}], ids=str
)
@pytest.mark.parametrize("fused", [False, True])
def test_conversion_to_a_lora_of_twice_the_rank(options: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    model = untrained(**options)
    if fused:
        mbf.fuse(model)
    mbf.init_pissa_(model)
    model.save_pretrained(tmp_path / "start")
    logits = learn(model)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = PeftModel.from_pretrained(decaying(base_model()), tmp_path / "out").eval()
    assert {layer.A.shape[0] for layer in layers_of(loaded)} == ({8, 4} if "rank_pattern" in options else {8})
    torch.testing.assert_close(loaded(tokens_of_test()).logits, logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(tokens_of_test()).logits, logits)  # the model itself goes on


def test_the_adapter_belongs_to_the_remaining_base(tmp_path: Path) -> None:
    model = untrained()
    mbf.init_pissa_(model)
    logits = learn(model)
    model.save_pretrained(tmp_path / "adapter")
    alone = PeftModel.from_pretrained(decaying(base_model()), tmp_path / "adapter").eval()
    assert (alone(tokens_of_test()).logits - logits).abs().max() > 1e-2  # on the original W it is something else
    model.unload().save_pretrained(tmp_path / "base")
    base = base_model().from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens_of_test()).logits, logits, rtol=1e-4, atol=1e-5)


def test_merge_and_unload() -> None:
    model = untrained()
    mbf.init_pissa_(model)
    logits = learn(model)
    torch.testing.assert_close(model.merge_and_unload()(tokens_of_test()).logits, logits, rtol=1e-4, atol=1e-5)


# -- what it refuses, before anything changes --------------------------------------------------------------------------


def spoil(model: Any, how: str) -> Any:
    """The model, unfit for PiSSA in its last layer or as a whole."""
    layer = adapter_layers(model, "default")[-1]
    base = layer.module.base_layer
    match how:
        case "int8":
            base.weight = nn.Parameter((base.weight * 100).to(torch.int8), requires_grad=False)
        case "subclass":
            base.weight = torch.nn.Parameter(Quantised(base.weight.data))
        case "meta":
            base.weight = nn.Parameter(torch.empty(32, 32, device="meta"))
        case "nan":
            base.weight.data[3, 4] = float("nan")
        case "second adapter":
            model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
        case "merged":
            model.merge_adapter()
        case "disabled":
            model.base_model.disable_adapter_layers()
        case "inactive":
            model.base_model.set_adapter([])
        case "scale":
            layer.module.scaling["default"] = 0.0
        case "rank":
            layer.write(torch.randn(33, 32), torch.zeros(32, 33))
        case "tied layers":
            first = adapter_layers(model, "default")[0]
            first.module.base_layer.weight = base.weight
        case "tied module":
            first = adapter_layers(model, "default")[0]
            first.module.base_layer = base
        case "tied view":
            model.get_base_model().register_buffer("view", base.weight.detach()[4:6, 3])
        case "nested":
            layer.module.base_layer = inject_adapter_in_model(
                LoraConfig(r=2, target_modules=["0"]), nn.Sequential(base)
            )[0]
        case "overflow":
            model.half()
            base.weight.data.copy_(torch.full((32, 32), 6.5e4))
            layer.module.scaling["default"] = 1e-6
    return model


class Quantised(Tensor):
    pass


LAST = "layer model.layers.1.self_attn.q_proj"
SHARED = "its W is shared with"


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("int8", TypeError, f"{LAST}: the weight of its Linear is Parameter torch.int8.*before it is quantised"),
        ("subclass", TypeError, f"{LAST}: the weight of its Linear is Quantised.*before it is quantised"),
        ("meta", TypeError, f"{LAST}: the weight.*sharded"),
        ("nan", ValueError, f"{LAST}: W holds NaN"),
        ("second adapter", ValueError, "adapter 'second' beside 'default'.*delete_adapter"),
        ("merged", ValueError, "merged into W.*unmerge_adapter"),
        ("disabled", ValueError, "adapter 'default' is not active"),
        ("inactive", ValueError, "adapter 'default' is not active"),
        ("scale", ValueError, f"{LAST}: its scale is 0.0"),
        ("rank", ValueError, rf"{LAST}: r is 33; W \[32, 32\] has 32"),
        ("tied layers", ValueError, f"{SHARED} layer"),
        ("tied module", ValueError, f"{SHARED} layer"),
        ("tied view", ValueError, f"{LAST}: {SHARED} base_model.model.view"),
        ("nested", ValueError, f"{LAST} is a .*computes more than"),
        ("overflow", ValueError, f"{LAST}: the new A .*does not fit its dtype"),
    ],
)
def test_errors_name_the_layer_and_nothing_changes(how: str, kind: type[Exception], message: str) -> None:
    model = spoil(untrained(target_modules=["q_proj", "o_proj"]), how)
    before = {n: t for n, t in state(model).items() if not t.is_meta}
    with pytest.raises(kind, match=message):
        mbf.init_pissa_(model)
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def test_a_tied_head_is_refused_and_other_layers_of_that_model_are_not() -> None:
    base = base_model(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = untrained(copy.deepcopy(base), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=f"layer lm_head: {SHARED} .*embed_tokens.weight"):
        mbf.init_pissa_(model)
    model = untrained(base, target_modules=["q_proj"])
    mbf.init_pissa_(model)
    assert all(layer.B.any() for layer in layers_of(model))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.embedding, self.convolution = nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embedding"]}, "layer embedding is no linear layer"),
        ({"target_modules": ["convolution"]}, "layer convolution is no linear layer"),
        ({"target_parameters": ["head.weight"]}, "layer head is no linear layer"),
        ({"target_modules": ["attention"]}, "layer attention.*MultiheadAttention"),
        ({"lora_bias": True}, r"layer linear has a bias beside A and B; use LoraConfig\(lora_bias=False\)"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            "layer linear is the LoRA variant ALoraLinearVariant",
        ),
        ({"init_lora_weights": "mica"}, "layer linear is the LoRA variant MiCALinearVariant"),
    ],
    ids=str,
)
def test_what_is_more_than_a_linear_layer_is_refused(options: dict[str, Any], message: str) -> None:
    model = inject_adapter_in_model(LoraConfig(**({"r": 2, "target_modules": ["linear"]} | options)), Parts())
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=message):
        mbf.init_pissa_(model)
    assert_same_state(model, before)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no PEFT LoRA layer"):
        mbf.init_pissa_(base_model())
    model = untrained()
    before = state(model)
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        mbf.init_pissa_(model, "other")
    with pytest.raises(ValueError, match="n_iter"):
        mbf.init_pissa_(model, n_iter=-1)
    assert_same_state(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("force", [False, True])
def test_an_interruption_while_writing_is_undone(
    dtype: torch.dtype, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untrained(decaying(base_model()).to(dtype), target_modules=["q_proj", "o_proj"])
    if force:
        randomise(model)
    before, layers = state(model), layers_of(model)
    copy_, W = Tensor.copy_, layers[0].module.base_layer.weight
    reached = []

    def interrupted(into: Tensor, value: Tensor) -> Tensor:
        if into is layers[2].A and not reached:  # W of that layer is written, and two whole layers
            reached.append(
                not torch.equal(W, before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"])
            )
            raise KeyboardInterrupt
        return copy_(into, value)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mbf.init_pissa_(model, force=force)
    monkeypatch.undo()
    assert reached == [True]
    for name, tensor in model.state_dict().items():
        if "base_layer" in name:
            size = before[name].abs().max() + (10 if force else 0)
            assert (tensor - before[name]).abs().max() <= 2 * torch.finfo(dtype).eps * size, name
        else:
            assert torch.equal(tensor, before[name]), name
