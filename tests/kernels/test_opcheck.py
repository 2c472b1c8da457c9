"""The operators' own checks of schema, fake kernels, autograd and tracing, with the kernels behind the operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.ops import test_lora_accumulate, test_lora_group, test_lora_linear, test_lora_mlp

CHECKS: dict[str, Callable[[], None]] = {
    "lora_linear": partial(test_lora_linear.test_opcheck, "everything", torch.bfloat16),
    "lora_linear_backward": partial(test_lora_linear.test_opcheck_of_the_backward, torch.bfloat16),
    "lora_accumulate": test_lora_accumulate.test_opcheck,
    "lora_group": partial(test_lora_group.test_opcheck, "everything", torch.bfloat16),
    "lora_mlp": partial(test_lora_mlp.test_opcheck, "everything", torch.bfloat16, True),
}


@pytest.mark.parametrize("name", CHECKS)
def test_opcheck(on_triton: list[str], name: str) -> None:
    CHECKS[name]()
    assert on_triton
