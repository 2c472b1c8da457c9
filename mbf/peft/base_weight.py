"""The weight of a base layer as an ordinary matrix, whatever it is kept in."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from mbf.peft.sharded import whole


def unpack(model: nn.Module) -> None:
    """Undo what bitsandbytes does to 4-bit weights on processors with AVX512-BF16, where inference packs them.

    It then can neither train nor dequantise them: gradients raise, and what comes out is another matrix. Saving unpacks
    them, up to the rounding to bf16 that packing made in their scales.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()


@torch.no_grad()
def dense_weight(base: Any, name: str, *, transposed: bool = False) -> Tensor:
    """W ``[d_out, d_in]`` in fp32, a copy without autograd; a quantised one is dequantised, a sharded one gathered.

    Args:
        base: the base layer of a LoRA layer.
        name: what errors call it.
        transposed: it is stored as ``[d_in, d_out]`` (``fan_in_fan_out``).

    Raises:
        TypeError: it has no weight that PEFT can turn into a floating-point matrix.
    """
    if isinstance(base, nn.Module):
        unpack(base)
    try:
        weight: Any = dequantize_module_weight(base)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"layer {name}: the weight of its {type(base).__name__} cannot be dequantised ({error}); this method needs "
            "W itself: use a base that is not quantised, or quantised by bitsandbytes, HQQ or torchao"
        ) from None
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise TypeError(
            f"layer {name}: the weight of its {type(base).__name__} is {weight.dtype} {list(weight.shape)}; this "
            "method needs a floating-point matrix: load the base in fp32, bf16 or fp16"
        )
    W = whole(weight).float()
    return (W.T if transposed else W).clone(memory_format=torch.contiguous_format)
