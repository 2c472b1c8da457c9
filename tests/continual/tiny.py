"""A random two-layer Llama with a PEFT adapter, random data and a plain training loop."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def base_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).float()


def peft_model(r: int = 4, adapter: str = "default", **config: object) -> PeftModel:
    options = {"r": r, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    return get_peft_model(base_model(), LoraConfig(**options), adapter_name=adapter)


def batch(seed: int, rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def batches(seed: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """A task's data, for methods that look at it: what ``train`` with this seed begins with."""
    return [batch(100 * seed + step) for step in range(count)]


def train(model: torch.nn.Module, seed: int, steps: int = 4, lr: float = 0.02) -> float:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        loss = model(**batch(100 * seed + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch(7)["input_ids"]).logits
