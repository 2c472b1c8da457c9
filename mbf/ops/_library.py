"""The operator library ``mbf``: schemas, the compiled extension, and the one override of the dispatch.

Every file beside this one defines its operator here once, with a reference that runs on any device. Faster kernels for
the same operators are registered under the CPU key by the compiled extension ``mbf._C`` (``csrc/ops.cpp``), and under
the CUDA key, which is ROCm's, too, by ``_gpu``; so choosing an implementation is torch's own dispatch. Nothing here
imports triton or needs a compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch

from mbf.ops._gpu import serve

LIBRARY = torch.library.Library("mbf", "DEF")
LIBRARY.define("cpu_kernels() -> str")

Backend = Literal["auto", "reference"]
_BACKENDS: tuple[Backend, ...] = ("auto", "reference")
_backend: Backend = "auto"


class NativeStatus(NamedTuple):
    """Whether the compiled extension serves the operators, and why not.

    ``kernels`` says what of this processor they use, such as ``"AVX-512, native bf16, fp32 on AMX"``, or ``"AVX2, own
    products"`` where mbf multiplies matrices by loops of its own.
    ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA``, set before mbf is imported, hold them to less, and
    ``MBF_NATIVE`` names another build of the extension to load.
    """

    loaded: bool
    path: Path | None
    reason: str
    kernels: str = ""


def _load_native() -> NativeStatus:
    if os.environ.get("MBF_NO_NATIVE", "") not in ("", "0"):
        return NativeStatus(False, None, "switched off by MBF_NO_NATIVE")
    named = os.environ.get("MBF_NATIVE", "")
    candidates = [Path(named)] if named else sorted(Path(__file__).resolve().parents[1].glob("_C*.so"))
    if not candidates:
        return NativeStatus(False, None, "not built: the install found no working C++ compiler, or MBF_BUILD_CPU=0")
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return NativeStatus(False, candidates[0], f"does not load with torch {torch.__version__}: {error}")
    return NativeStatus(True, candidates[0], "loaded", torch.ops.mbf.cpu_kernels())


_native = _load_native()


def native_status() -> NativeStatus:
    """Return whether ``mbf._C`` is loaded, from where, and otherwise why not."""
    return _native


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    gpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Define operator ``mbf::<schema>`` with its reference for every device and its fake (shape-only) kernel.

    A kernel of the compiled extension for the same operator takes precedence on its device, and ``gpu`` does on GPUs:
    it imports its part of ``mbf.kernels`` when it is called, and returns NotImplemented for what that doesn't compute.
    Where triton is absent, or there is no ``gpu``, ``cuda`` is called in its place.
    """
    name = schema.split("(", 1)[0]
    refuse = _refusing(schema)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    for key in _NOT_STRIDED:
        LIBRARY.impl(name, refuse, key)
    torch.library.register_fake(f"mbf::{name}", fake, lib=LIBRARY)
    if gpu is not None or cuda is not None:
        serve(LIBRARY, name, gpu, reference, cuda)


# Tensors of these have no strides, and nothing here is computed from them.
_NOT_STRIDED = ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU")


def _refusing(schema: str) -> Callable[..., Any]:
    """The kernel for tensors without strides: a TypeError that names the argument."""

    def refuse(*inputs: Any) -> Any:
        arguments = torch._C.parse_schema(f"mbf::{schema}").arguments
        for argument, value in zip(arguments, inputs, strict=False):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
                    raise TypeError(f"{argument.name}: is {tensor.layout}; pass its to_dense()")
        raise TypeError(f"mbf::{schema.split('(', 1)[0]}: a tensor without strides; pass its to_dense()")

    return refuse


def native_serves(*lists: Sequence[Any]) -> bool:
    """Whether the compiled kernels get these lists, tensors of the CPU throughout.

    They look at every dtype, shape and stride themselves before they write anything. So the faces of operators that
    take hundreds of tensors look for what is wrong only once a kernel has refused.
    """
    if not _native.loaded or reference_only() or torch.compiler.is_compiling():
        return False
    return all(_PLAIN.issuperset(map(type, tensors)) and all([t.is_cpu for t in tensors]) for tensors in lists)


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # other classes may have kernels of their own


def reference_only() -> bool:
    """Whether ``use_backend("reference")`` is in force; the Python face of each operator asks once a call."""
    return _backend == "reference"


class use_backend:
    """Choose who computes the operators: ``"auto"`` (the fastest kernel there is) or ``"reference"`` (plain torch).

    Takes effect at once, for the process; as a context manager it is undone at the end of the block.

    >>> with mbf.use_backend("reference"):
    ...     y = mbf.ops.lora_linear(x, W, A, B)

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, name: Backend) -> None:
        global _backend
        if name not in _BACKENDS:
            raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(map(repr, _BACKENDS))}")
        self._name, self._previous = name, _backend
        _backend = name

    def __enter__(self) -> use_backend:
        global _backend
        if _backend != self._name:  # a block that is entered again
            self._previous, _backend = _backend, self._name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous
