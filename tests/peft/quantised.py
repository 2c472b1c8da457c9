"""LoRA layers and models on quantised bases, made by the packages of their formats, and what they should compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from mbf.ops.philox import dropout

from .helpers import TARGETS, base_model, randomise

ABSENT = "a package of the test extra is absent; the stand-ins of test_quantised.py run the same code everywhere"

D_IN, D_OUT = 64, 48


# -- base layers -------------------------------------------------------------------------------------------------------


def nf4(dtype: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason=ABSENT)
    return unpacked(bnb.nn.Linear4bit(D_IN, D_OUT, compute_dtype=dtype, quant_type="nf4").to(dtype).to("cpu"))


def fp4(dtype: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason=ABSENT)
    base = bnb.nn.Linear4bit(D_IN, D_OUT, bias=False, compute_dtype=dtype, quant_type="fp4", compress_statistics=False)
    return unpacked(base.to("cpu"))


def unpacked(base: Any) -> Any:
    """The same on every processor: inference leaves the weight as it is, where AVX512-BF16 would have it packed."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def int8(dtype: torch.dtype) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason=ABSENT)
    return bnb.nn.Linear8bitLt(D_IN, D_OUT, has_fp16_weights=False).to("cpu")


def torchao(dtype: torch.dtype) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason=ABSENT)
    base = nn.Linear(D_IN, D_OUT, dtype=dtype)
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    return base


def hqq(dtype: torch.dtype) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason=ABSENT)
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return quantize.HQQLinear(nn.Linear(D_IN, D_OUT).requires_grad_(False), config, compute_dtype=dtype, device="cpu")


class Codes(nn.Module):
    """A stand-in for layers whose packages compute on GPUs only: integer codes and a scale a row, no parameter at all.

    Its output passes through a function whose output autograd keeps, so changing it in place is an error in backward.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        self.register_buffer("codes", torch.randint(-8, 8, (D_OUT, D_IN), dtype=torch.int8))
        self.register_buffer("qweight", self.codes)
        self.register_buffer("scales", torch.rand(D_OUT, 1, dtype=dtype) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).tanh().to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.scales.dtype), self.codes * self.scales)


class PlainCodes(Codes):
    """For PEFT's AQLM layer, which itself adds to the base output in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).to(x.dtype)


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "nf4": nf4,
    "fp4": fp4,
    "int8": int8,
    "torchao": torchao,
    "hqq": hqq,
    "gptq": Codes,
    "awq": Codes,
    "aqlm": PlainCodes,
}
MERGEABLE = ("nf4", "int8", "torchao", "hqq")


# -- layers ------------------------------------------------------------------------------------------------------------


def on_codes(kind: str, base: nn.Module, config: LoraConfig) -> Any:
    """PEFT's own class around the stand-in, as its dispatcher would build it."""
    from peft.tuners.lora.aqlm import AqlmLoraLinear
    from peft.tuners.lora.awq import AwqLoraLinear
    from peft.tuners.lora.gptq import GPTQLoraLinear

    classes: dict[str, type] = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "aqlm": AqlmLoraLinear}
    options = {"lora_dropout": config.lora_dropout}  # which PEFT 0.18 does not take from the configuration
    return classes[kind](base, "default", config=config, r=config.r, lora_alpha=config.lora_alpha, **options)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["0"], "lora_dropout": 0.0} | options)


def layer(kind: str, dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None, **options: Any) -> Any:
    """PEFT's LoRA layer on a quantised base that computes in ``dtype``, with a random adapter in that or another."""
    torch.manual_seed(3)
    base = BASES[kind](dtype)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if isinstance(base, Codes):
        made = on_codes(kind, base, config(**options))
    else:
        made = inject_adapter_in_model(config(**options), container(base))[0]
    randomise(made)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter or dtype)
        elif parameter.is_floating_point() and name.endswith("bias"):
            parameter.data = parameter.data.to(dtype)
    return made.train()


def container(inner: nn.Module) -> nn.Module:
    """A model that says, as transformers' do, what it was loaded in."""
    model: Any = nn.Sequential(inner)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    return model


def add(made: Any, name: str, **options: Any) -> None:
    """A second adapter on the layer."""
    inject_adapter_in_model(config(**{"r": 3, "lora_alpha": 5} | options), container(made), adapter_name=name)
    randomise(made)


def exact(made: Any, x: Tensor, dy: Tensor, seed: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients in fp64, the base layer's own output and input gradient taken as they are."""
    leaf = x.detach().clone().requires_grad_()
    base = made.base_layer(leaf)
    base.backward(dy.to(base.dtype))
    wide = x.detach().double().requires_grad_()
    y, found = base.detach().double(), {}
    for adapter in made.active_adapters:
        A, B = (getattr(made, name)[adapter].weight.detach().double().requires_grad_() for name in ("lora_A", "lora_B"))
        p = getattr(made.lora_dropout[adapter], "p", 0.0) if made.training else 0.0
        y = y + made.scaling[adapter] * dropout(wide, p, seed) @ A.T @ B.T
        found |= {f"lora_A.{adapter}.weight": A, f"lora_B.{adapter}.weight": B}
    y.backward(dy.double())
    assert wide.grad is not None and leaf.grad is not None
    gradients = {name: factor.grad for name, factor in found.items()}
    return {"y": y.detach(), "x": wide.grad + leaf.grad.double(), **gradients}  # type: ignore[dict-item]


def base_state(module: nn.Module) -> dict[str, Any]:
    """Every number that the base keeps, copied; packed tensors by the tensors inside them."""
    state = {}
    for name, tensor in module.state_dict().items():
        if "lora_" in name or not isinstance(tensor, Tensor):
            continue
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        state |= (
            {f"{name}.{part}": getattr(tensor, part).clone() for part in parts} if parts else {name: tensor.clone()}
        )
    assert state
    return state


# -- models, loaded quantised by transformers --------------------------------------------------------------------------


def settings(kind: str) -> Any:
    import transformers

    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason=ABSENT)
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason=ABSENT)
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def loaded(kind: str, folder: Path) -> Any:
    """The tiny Llama, saved and loaded quantised."""
    import transformers

    if not folder.joinpath("config.json").exists():
        base_model(hidden_size=64, intermediate_size=96).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings(kind), device_map="cpu", dtype=torch.float32
    )
    return unpacked(model)


def model(kind: str, folder: Path, **options: Any) -> Any:
    """The quantised Llama with a random adapter on all its linear layers, the same on every call, in training mode."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    base = loaded(kind, folder)
    torch.manual_seed(2)
    adapted = get_peft_model(base, LoraConfig(**lora))
    randomise(adapted)
    return adapted.train()
