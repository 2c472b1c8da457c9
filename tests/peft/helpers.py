"""Small models with a random (never zero) adapter, what training them gives, and the rules by which that is right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from mbf.peft import FusedLinear, calls
from mbf.peft.groups import swap_back

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "SmolLM3"]


def randomise(model: nn.Module) -> None:
    """Random A and B in every adapter of the model."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for factor in (*module.lora_A.values(), *module.lora_B.values()):
                    for parameter in factor.parameters():
                        parameter.normal_(std=0.3)


def base_model(name: str = "Llama", **config: Any) -> Any:
    """A tiny two-layer model of the family, the same one on every call."""
    torch.manual_seed(1)
    text = "Text" if name == "Gemma3" else ""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
        **config,
    }
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}{text}Config")(**settings))


def llama(**options: Any) -> PeftModel:
    """A two-layer Llama with a random adapter ``default``."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base_model(), LoraConfig(**settings))
    randomise(model)
    return model


def family(name: str, dtype: torch.dtype = torch.float64, config: dict[str, Any] | None = None, **lora: Any) -> Any:
    """A tiny two-layer model of the family with a random adapter on ``TARGETS``."""
    base = base_model(name, **(config or {}))
    model: Any = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | lora))
    randomise(model)
    return model.to(dtype).train()


def widen_adapter(model: nn.Module) -> None:
    """PEFT's default on a half-precision base: A and B in fp32."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def copies(model: nn.Module) -> list[Any]:
    """The model copied, pickled, and saved and loaded."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]


def ungrouped(model: nn.Module) -> Any:
    """A copy of the model whose fused layers all compute alone."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        swap_back(module)
    return twin


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 64, (rows, length))


def lora(base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One LoRA layer of PEFT around ``base`` with a random adapter ``default``."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["0"], "lora_dropout": 0.0} | options
    model = nn.Sequential(nn.Linear(15, 21) if base is None else base)
    model = inject_adapter_in_model(LoraConfig(**settings), model)
    randomise(model)
    model = model.to(dtype)
    return model[0]


def add(layer: Any, name: str, **options: Any) -> None:
    """Add a second adapter to ``layer``."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["0"]} | options
    inject_adapter_in_model(LoraConfig(**settings), nn.Sequential(layer), adapter_name=name)
    randomise(layer)


def swapped(layer: Any) -> Any:
    """An independent copy of ``layer`` whose class is FusedLinear."""
    assert type(layer) is Linear
    twin = copy.deepcopy(layer)
    twin.__class__ = FusedLinear
    return twin


@contextmanager
def took(path: str, times: int | None = None) -> Iterator[None]:
    """The block's fused-layer forwards all took ``path``, and there was one at least (or exactly ``times``)."""
    before = calls.copy()
    yield
    other = "slow" if path == "fast" else "fast"
    assert calls[other] == before[other]
    assert calls[path] > before[path]
    assert times is None or calls[path] - before[path] == times


def error(value: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm()
    return (
        ((value.double() - exact.double()).norm() / norm.clamp_min(1e-300)).item() if norm > 0 else value.norm().item()
    )


def assert_as_accurate(value: Tensor, stock: Tensor, exact: Tensor, what: str) -> None:
    """``value`` is at most twice as far from the fp64 result as torch's own in the same dtype."""
    assert value.shape == stock.shape and value.dtype == stock.dtype, what
    small = torch.finfo(value.dtype).eps if value.numel() < 64 else 0.0
    assert error(value, exact) <= 2 * error(stock, exact) + 1e-6 + small, what


def results(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of ``layer`` at x for the output's gradient dy."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def trained(model: nn.Module, ids: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one training step."""
    model.zero_grad()
    torch.manual_seed(seed)
    output: Any = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def losses(model: Any, ids: Tensor) -> Tensor:
    """The losses of ten steps of AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return torch.tensor(found)


def assert_no_worse(got: dict[str, Tensor], stock: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Half precision through a whole model: at most twice PEFT's error plus two per cent."""
    assert got.keys() == stock.keys()
    for name, value in got.items():
        size = exact[name].norm()
        errors = [(found.double() - exact[name]).norm() / size for found in (value, stock[name])]
        assert value.dtype == stock[name].dtype and errors[0] <= 2 * errors[1] + 0.02, name


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """What autograd keeps for backward, each storage once and no parameter."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output: Any = model(input_ids=ids, labels=ids)
    size = sum(storage.nbytes() for storage in kept.values())
    del output
    return size
