"""Which tokens of a batch are the prompt's, for methods that route by the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def prompt_tokens(inputs: Mapping[str, Any], length: int, rows: int) -> Tensor:
    """bool [rows, length]: which tokens are the prompt's, neither padding nor answer.

    ``attention_mask`` [rows, length] marks padding; ``labels`` [rows, K], which belong to the last K tokens, mark the
    answer by whatever is not −100. A row without a prompt is one itself.
    """
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if isinstance(mask, Tensor) and mask.shape == (rows, length):
        mask = mask > 0
        mask = mask | ~mask.any(1, keepdim=True)
    else:
        device = labels.device if isinstance(labels, Tensor) else None
        mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return mask
    answer = F.pad(labels != IGNORED, (length - labels.shape[1], 0), value=False)
    prompt = mask & ~answer.to(mask.device)
    return torch.where(prompt.any(1, keepdim=True), prompt, mask)


def continues(cache: Any) -> bool:
    """Whether ``past_key_values`` holds tokens, so that the inputs go on after a prompt that was seen."""
    if cache is None:
        return False
    if callable(length := getattr(cache, "get_seq_length", None)):
        return int(length()) > 0
    return len(cache) > 0
