"""The operators computed by their Triton kernels, in Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mbf.kernels._configs import Config
from mbf.kernels._launch import interpreted
from mbf.kernels._tune import forced
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from mbf.ops import _gpu
from tests.ops.lora_cases import FORMS

# Tiles so small that even small tensors need several in each direction, and parts of every sum.
SMALL = {
    "project": Config(16, 32),
    "project_group": Config(16, 32),
    "accumulate": Config(16, 16),
    "output_gradient": Config(16, 16),
    "input_gradient": Config(16, 32),
    "input_gradient_group": Config(16, 32),
    "epilogue": Config(16, 32),
    "square": Config(16, 16),
    "square_input_gradient": Config(16, 32),
    "square_gradient": Config(16, 16),
}


def dtypes_and_forms(dtypes: Iterable[str]) -> list[tuple[str, str]]:
    """The plain form and the fullest in all dtypes, and the others in bf16 with A and B in fp32, the usual case."""
    pairs = [(name, form) for name in dtypes for form in ("plain", "everything")]
    return pairs + [("fp32 on bf16", form) for form in FORMS if form not in ("plain", "everything")]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operators compute tensors of the CPU as they do those of a GPU; yields the names of the kernels launched."""
    assert interpreted(), "tests/conftest.py sets TRITON_INTERPRET before triton is imported"
    launched: list[str] = []
    library = torch.library.Library("mbf", "IMPL")
    for name, run in _gpu._kernels.items():
        if name != "dropout_mask":  # by which references drop
            library.impl(name, run, "CPU", allow_override=True)
    _watch(monkeypatch, launched)
    monkeypatch.setattr("mbf.kernels._project._LEAST_COLUMNS", 32)
    for module in ("_output_gradient", "_input_gradient"):
        monkeypatch.setattr(f"mbf.kernels.{module}.LEAST_ROWS", 16)
    torch.use_deterministic_algorithms(True)  # new tensors are then full of NaN until they are written
    try:
        with forced(SMALL):
            yield launched
    finally:
        torch.use_deterministic_algorithms(False)
        library._destroy()


def _watch(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Note every launch, and fail at an address outside of the elements of its tensors."""
    run, load, store = (
        InterpretedFunction.run,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    bounds: list[tuple[int, int]] = []

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__.removesuffix("_kernel"))
        bounds[:] = [extent(one) for one in args if isinstance(one, torch.Tensor)]
        return run(self, *args, **kwargs)

    def check(pointers: Any, mask: Any) -> None:
        at = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data].astype(np.uint64)
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        within = np.zeros(at.shape, bool)
        for first, end in bounds:
            within |= (at >= first) & (at + size <= end)
        assert within.all(), f"{launched[-1]} touches {(~within).sum()} elements that are no tensor's"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from the tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() if tensor.numel() else 0
