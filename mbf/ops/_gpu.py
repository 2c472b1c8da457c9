"""The way of an operator to its Triton kernels: from tensors on a GPU, and into graphs of torch.compile.

triton and ``mbf.kernels`` are imported by the first call that needs them. What the kernels do not compute, they decline
with NotImplemented, and the operator's reference computes it in plain torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensorMode

_PLAIN = (Tensor, nn.Parameter)
_kernels: dict[str, Callable[..., Any]] = {}


@cache
def obstacle() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    try:
        from mbf.kernels import _launch  # noqa: F401
    except ImportError as error:
        reason = f"triton cannot be imported ({error})"
        warnings.warn(f"mbf: {reason}; on a GPU the operators are computed in plain torch", stacklevel=2)
        return reason
    return None


def _or_reference(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` on the device of its tensors, or ``reference`` where it declines or cannot be used."""

    def compute(*inputs: Any) -> Any:
        found = kernel(*inputs) if obstacle() is None else NotImplemented
        return reference(*inputs) if found is NotImplemented else found

    def run(*inputs: Any) -> Any:
        device = _first(inputs).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return compute(*inputs)
        with torch.cuda.device(device):  # Triton launches on the current one, wherever the tensors are
            return compute(*inputs)

    return run


def serve(library: torch.library.Library, name: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Let ``kernel`` compute operator ``name`` of ``library`` on a GPU; what it declines, the reference does.

    Graphs of torch.compile hold the launches themselves, as those of ``torch.library.triton_op`` do, which knows no
    operators with CPU kernels: the operator is taken apart as it is made functional.
    """

    run = _or_reference(kernel, reference)

    def take_apart(mode: Any, operator: Any, types: Any, inputs: tuple[Any, ...], keywords: Any = None) -> Any:
        found = NotImplemented
        if not keywords and _first(inputs).is_cuda and obstacle() is None:
            from mbf.kernels._launch import tracing

            with mode, tracing():
                found = kernel(*inputs)
        return mode.__torch_dispatch__(operator, types, inputs, keywords or {}) if found is NotImplemented else found

    library.impl(name, run, "CUDA")
    torch.library.register_torch_dispatch(f"mbf::{name}", FunctionalTensorMode, take_apart, lib=library)
    _kernels[name] = run


def entrance(name: str, probe: int = 0) -> Callable[..., Any]:
    """Operator ``mbf::name`` as eager code calls it.

    Ordinary tensors on a GPU go straight to the kernels, as the way through the dispatcher and back costs a small layer
    more than its launches do; everything else takes that way.

    Args:
        name: of an operator.
        probe: the place of the input that tells the device, a tensor or a list of tensors.
    """
    operator = getattr(torch.ops.mbf, name).default
    if (run := _kernels.get(name)) is None:
        return operator

    def enter(*inputs: Any) -> Any:
        told = inputs[probe]
        if isinstance(told, (list, tuple)):
            told = told[0]
        if told.is_cuda and type(told) in _PLAIN and not torch._C._len_torch_dispatch_stack():
            return run(*inputs)
        return operator(*inputs)

    return enter


def launches(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that ``call`` launches from this thread; it computes nothing then."""
    if obstacle() is not None:
        return []
    from mbf.kernels._launch import recorded

    with recorded() as found:
        call()
    return [launch.kernel.__name__ for launch in found]


def _first(inputs: Iterable[Any]) -> Tensor:
    """The first tensor among the inputs and in their lists."""
    for value in inputs:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)) and value and any(isinstance(part, Tensor) for part in value):
            return _first(value)
    raise AssertionError("an operator without a tensor")
