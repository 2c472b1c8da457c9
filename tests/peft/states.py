"""Every state of a PEFT layer that the fused one must honour, as data: how to make it, and who computes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .helpers import add, llama, lora

D_IN, D_OUT = 16, 20

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32 on bf16": (torch.bfloat16, torch.float32),
    "fp32 on fp16": (torch.float16, torch.float32),
    "bf16 on fp32": (torch.float32, torch.bfloat16),
    "fp64": (torch.float64, torch.float64),
}
"""Name: dtype of the base layer and of x, dtype of A and B. PEFT's default on a half base is fp32 on it."""
UNIFORM = ("fp32", "bf16", "fp16", "fp64")
TWO = ("fp32 on bf16", "fp32 on fp16", "bf16 on fp32")


def plain() -> Any:
    return lora(nn.Linear(D_IN, D_OUT))


def batch() -> Tensor:
    return torch.randn(3, 5, D_IN)


@dataclass(frozen=True)
class State:
    """One row of the table.

    Attributes:
        name: in words, as the documents have it.
        fused: whether the operators compute the call; otherwise it is PEFT's, bit for bit.
        build: a stock layer in fp32, which is then cast.
        cast: what is done to the layer once it has its dtypes.
        change: what is done to the stock layer and to the fused one, after the swap.
        x: its input, in fp32.
        x_trains: whether x requires a gradient.
        call: further arguments of the call.
        around: what is entered around forward and backward of both.
        dtypes: in which the state exists.
    """

    name: str
    fused: bool
    build: Callable[[], Any] = plain
    cast: Callable[[Any], Any] = lambda layer: None
    change: Callable[[Any], Any] = lambda layer: None
    x: Callable[[], Tensor] = batch
    x_trains: bool = True
    call: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def layer(self, dtype: str) -> Any:
        """The stock layer in the state, but for ``change``."""
        base, adapter = DTYPES[dtype]
        layer = self.build()
        layer.to(base)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter)
        self.cast(layer)
        return layer


# -- parts of states ---------------------------------------------------------------------------------------------------


def built(base: nn.Module | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: lora(nn.Linear(D_IN, D_OUT) if base is None else base, **options)


def with_adapters(*names: str, active: str | list[str] | None = None, **options: Any) -> Callable[[], Any]:
    """Further adapters of rank 3, and those that are active."""

    def build() -> Any:
        layer = plain()
        for name in names:
            add(layer, name, **options)
        layer.set_adapter(active or ["default", *names])
        return layer

    return build


def then(*changes: Callable[[Any], Any]) -> Callable[[Any], None]:
    def apply(layer: Any) -> None:
        for change in changes:
            change(layer)

    return apply


def hotswap_layer() -> Any:
    model = llama(r=3)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.scaling["default"], Tensor) and layer.lora_A["default"].weight.shape[0] == 8
    assert layer.r["default"] == 3
    return layer


def tie(layer: Any) -> None:
    """A and B as transposed views, as an adapter tied to an embedding's has them."""
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.weight = nn.Parameter(factor.weight.detach().t().contiguous().t())
        assert not factor.weight.is_contiguous()


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class LoudLinear(nn.Linear):
    pass


class LoudDropout(nn.Dropout):
    pass


class TaggedTensor(Tensor):
    """A stand-in for DTensor and for quantised weights: a subclass that computes through __torch_function__."""


def tag(module: nn.Module) -> None:
    weight: Any = module.weight
    module.weight = nn.Parameter(weight.detach().as_subclass(TaggedTensor), requires_grad=weight.requires_grad)


def trains(name: str) -> Callable[[Any], Any]:
    return lambda layer: getattr(layer.base_layer, name).requires_grad_(True)


def replaced(part: str, module: Callable[[], nn.Module]) -> Callable[[], Any]:
    def build() -> Any:
        layer = plain()
        getattr(layer, part).update({"default": module()})
        return layer

    return build


PARTS = ("lora_A", "lora_B", "lora_dropout", "base_layer")
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "a forward hook": lambda m: m.register_forward_hook(lambda module, inputs, y: 2 * y),
    "a forward pre-hook": lambda m: m.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda module, found, given: (2 * found[0],)),
    "a backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda module, given: (2 * given[0],)),
    "a replaced forward": lambda m: setattr(m, "forward", MethodType(lambda s, x: 2 * type(s).forward(s, x), m)),
}


def hooked(part: str, hook: str) -> Callable[[], Any]:
    """A hook that changes numbers, so that a result without it is another one."""

    def build() -> Any:
        layer = lora(nn.Linear(D_IN, D_OUT), lora_dropout=0.1)
        HOOKS[hook](layer.base_layer if part == "base_layer" else getattr(layer, part)["default"])
        return layer

    return build


@contextmanager
def global_hook() -> Any:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: 2 * y)
    try:
        yield
    finally:
        handle.remove()


def uncast(layer: Any) -> None:
    """As ``disable_input_dtype_casting`` leaves it in its block."""
    with disable_input_dtype_casting(layer):
        assert not layer.cast_input_dtype_enabled
    layer.cast_input_dtype_enabled = False


def autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype=dtype)


def add_late(layer: Any) -> None:
    torch.manual_seed(8)  # the same adapter for each layer
    add(layer, "late")
    layer.set_adapter(["default", "late"])


# -- the table ---------------------------------------------------------------------------------------------------------

FUSED = [
    State("plain LoRA", True),
    State("base layer without a bias", True, built(nn.Linear(D_IN, D_OUT, bias=False))),
    State("dropout, in evaluation", True, lambda: lora(nn.Linear(D_IN, D_OUT), lora_dropout=0.4).eval()),
    State("dropout of probability 0", True, replaced("lora_dropout", lambda: nn.Dropout(0.0))),
    State("`use_rslora`", True, built(use_rslora=True)),
    State("`rank_pattern`, `alpha_pattern`, odd rank", True, built(rank_pattern={"0": 7}, alpha_pattern={"0": 5})),
    State("`set_scale` after fuse", True, change=lambda layer: layer.set_scale("default", 0.3)),
    State("`scale_layer` after fuse", True, change=lambda layer: layer.scale_layer(2.5)),
    State("`unscale_layer` after fuse", True, change=lambda layer: layer.unscale_layer(4)),
    State("scaling 0", True, change=lambda layer: layer.scaling.update(default=0)),
    State(
        "prepared for compiled hotswap: scaling a tensor, A and B padded",
        True,
        hotswap_layer,
        x=lambda: torch.randn(5, 32),
    ),
    State("casting of the input disabled, one dtype", True, cast=uncast, dtypes=UNIFORM),
    State("`fan_in_fan_out` (`Conv1D`)", True, lambda: lora(Conv1D(D_OUT, D_IN), fan_in_fan_out=True)),
    State("base weight trains", True, cast=trains("weight")),
    State("base bias trains", True, cast=trains("bias")),
    State("base layer of another class", True, built(ScaledLinear(D_IN, D_OUT))),
    State("several active adapters", True, with_adapters("second", "third", use_rslora=True)),
    State("an adapter that is not active", True, with_adapters("idle", active="default")),
    State("adapter switched after fuse", True, with_adapters("second"), change=lambda x: x.set_adapter("second")),
    State("adapter added after fuse", True, change=add_late),
    State("adapter deleted after fuse", True, with_adapters("second"), change=lambda x: x.delete_adapter("second")),
    State(
        "one of the active adapters is in other layers only",
        True,
        change=lambda layer: setattr(layer, "_active_adapter", ["elsewhere", "default"]),
    ),
    State(
        "enabled again after `disable_adapter`",
        True,
        change=then(lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True)),
    ),
    State("unmerged again", True, change=then(lambda layer: layer.merge(), lambda layer: layer.unmerge())),
    State("tied A and B (views)", True, cast=tie),
    State("x needs no gradient", True, x_trains=False),
    State("x of one dimension", True, x=lambda: torch.randn(D_IN)),
    State("x without rows", True, x=lambda: torch.randn(0, D_IN)),
    State("x of four dimensions", True, x=lambda: torch.randn(2, 3, 4, D_IN)),
    State("x strided", True, x=lambda: torch.randn(D_IN, 3, 4).permute(2, 1, 0)),
    State("autocast to bf16", True, around=autocast(torch.bfloat16)),
    State("autocast to fp16", True, around=autocast(torch.float16)),
]

_VARIANTS: dict[str, Callable[[], Any]] = {
    "DoRA": built(use_dora=True),
    "aLoRA": built(alora_invocation_tokens=[1, 2]),
    "VeLoRA": built(velora_config=VeloraConfig(num_groups=4)),
    "MonteCLoRA": built(monteclora_config=MontecloraConfig()),
    "BD-LoRA": built(use_bdlora=BdLoraConfig(target_modules_bd_a=["0"], nblocks=2, match_strict=False)),
    "MiCA": built(init_lora_weights="mica"),
    "KaSA": built(kasa_config=KasaConfig()),
}

DECLINED = [
    State("disabled", False, change=lambda layer: layer.enable_adapters(False)),
    State("merged", False, change=lambda layer: layer.merge()),
    State(
        "disabled while merged, which unmerges",
        False,
        change=then(lambda layer: layer.merge(), lambda layer: layer.enable_adapters(False)),
    ),
    State(
        "none of the active adapters is in this layer",
        False,
        change=lambda layer: setattr(layer, "_active_adapter", "elsewhere"),
    ),
    State(
        "mixed batch (`adapter_names`)",
        False,
        lambda: with_adapters("second")().eval(),
        call={"adapter_names": ["second", "__base__", "default"]},
    ),
    *(State(f"variant: {name}", False, build) for name, build in _VARIANTS.items()),
    State("DoRA in one of the active adapters", False, with_adapters("second", use_dora=True)),
    State("`lora_bias`", False, built(lora_bias=True)),
    State("dropout of probability 1", False, built(lora_dropout=1.0)),
    State(
        "dropout so near 1 that a mask has no bits for it",
        False,
        replaced("lora_dropout", lambda: nn.Dropout(1 - 1e-6)),
    ),
    State("dropout in place", False, replaced("lora_dropout", lambda: nn.Dropout(0.2, inplace=True).eval())),
    State("dropout of another class", False, replaced("lora_dropout", lambda: LoudDropout(0.2))),
    State("A of another class", False, replaced("lora_A", lambda: LoudLinear(D_IN, 4, bias=False))),
    State("B of another class", False, replaced("lora_B", lambda: LoudLinear(4, D_OUT, bias=False))),
    State("A a tensor subclass, as DTensor is", False, change=lambda layer: tag(layer.lora_A["default"])),
    State("scaling a tensor with a dimension", False, cast=lambda x: x.scaling.update(default=torch.tensor([0.5]))),
    State("scaling a tensor of whole numbers", False, cast=lambda x: x.scaling.update(default=torch.tensor(2))),
    State(
        "A parametrised",
        False,
        cast=lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.lora_A["default"]),
    ),
    State("casting of the input disabled, two dtypes", False, cast=uncast, dtypes=TWO),
    State(
        "casting of the input disabled, two dtypes, autocast",
        False,
        cast=uncast,
        around=autocast(torch.bfloat16),
        dtypes=TWO,
    ),
    *(State(f"{hook} on `{part}`", False, hooked(part, hook)) for part in PARTS for hook in HOOKS),
    State("a global module hook", False, around=global_hook),
]

STATES = {state.name: state for state in (*FUSED, *DECLINED)}
CASES = [(state, dtype) for state in STATES.values() for dtype in state.dtypes]
