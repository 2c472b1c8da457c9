"""The way of an operator to its Triton kernels: from tensors on a GPU, and into graphs of torch.compile.

triton and ``mbf.kernels`` are imported by the first call that needs them. Where triton is absent, the kernels of
``mbf._cuda`` in CUDA C++ stand in for them. What kernels do not compute, they decline with NotImplemented, and the
operator's reference computes it in plain torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensorMode

from mbf.ops import _cuda

_PLAIN = (Tensor, nn.Parameter)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_RANKS = 256  # kMostRanks in csrc/cuda/lora/operands.cuh
_kernels: dict[str, Callable[..., Any]] = {}


@cache
def obstacle() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    try:
        from mbf.kernels import _launch  # noqa: F401
    except ImportError as error:
        reason = f"triton cannot be imported ({error})"
        instead = "in plain torch" if _cuda.library() is None else "by the kernels of mbf._cuda"
        warnings.warn(f"mbf: {reason}; on a GPU the operators are computed {instead}", stacklevel=2)
        return reason
    return None


def _declined(*inputs: Any) -> Any:
    return NotImplemented


def by_cuda(name: str) -> Callable[..., Any]:
    """Operator ``name`` of ``mbf._cuda``; NotImplemented where it is not there or not for these dtypes and this rank.

    The inputs end with the nine of ``_operands.SCHEMA`` or, of a backward operator, with these and ``needs``.
    """

    def compute(*inputs: Any) -> Any:
        operator = getattr(_cuda.library(), name, None)
        if operator is None:
            return NotImplemented
        operands = 9 + isinstance(inputs[-1], list)
        A = inputs[-operands]
        taken = _CUDA_DTYPES if A.dtype == torch.float32 else (A.dtype,)
        fits = A.dtype in _CUDA_DTYPES and A.shape[0] <= _CUDA_RANKS
        fits = fits and all(t is None or t.dtype in taken for t in inputs[:-operands])
        return operator(*inputs) if fits else NotImplemented

    return compute


def in_cuda(name: str) -> Callable[..., Any]:
    """Operator ``name`` of ``mbf._cuda``, which computes whatever it is given; NotImplemented where it isn't loaded."""
    return with_cuda(lambda *inputs: getattr(_cuda.library(), name)(*inputs))


def with_cuda(compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute``, which calls operators that ``mbf._cuda`` has; NotImplemented where that is not loaded."""

    def guarded(*inputs: Any) -> Any:
        return NotImplemented if _cuda.library() is None else compute(*inputs)

    return guarded


def _or_reference(
    kernel: Callable[..., Any] | None, reference: Callable[..., Any], cuda: Callable[..., Any] = _declined
) -> Callable[..., Any]:
    """``kernel`` on the device of its tensors, or ``cuda`` without triton; ``reference`` where these decline."""

    def compute(*inputs: Any) -> Any:
        found = (cuda if kernel is None or obstacle() is not None else kernel)(*inputs)
        return reference(*inputs) if found is NotImplemented else found

    def run(*inputs: Any) -> Any:
        device = _first(inputs).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return compute(*inputs)
        with torch.cuda.device(device):  # Triton launches on the current one, wherever the tensors are
            return compute(*inputs)

    return run


def serve(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any] | None,
    reference: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Let ``kernel``, or without triton or a kernel ``cuda``, compute operator ``name`` of ``library`` on a GPU.

    What they decline, the reference computes.

    Graphs of torch.compile hold the launches themselves, as those of ``torch.library.triton_op`` do, which knows no
    operators with CPU kernels: the operator is taken apart as it is made functional.
    """

    run = _or_reference(kernel, reference, cuda or _declined)
    library.impl(name, run, "CUDA")
    _kernels[name] = run
    if kernel is None:
        return

    def take_apart(mode: Any, operator: Any, types: Any, inputs: tuple[Any, ...], keywords: Any = None) -> Any:
        found = NotImplemented
        if not keywords and _first(inputs).is_cuda and obstacle() is None:
            from mbf.kernels._launch import tracing

            with mode, tracing():
                found = kernel(*inputs)
        return mode.__torch_dispatch__(operator, types, inputs, keywords or {}) if found is NotImplemented else found

    torch.library.register_torch_dispatch(f"mbf::{name}", FunctionalTensorMode, take_apart, lib=library)


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
