"""Bytes that Triton kernels, in the interpreter, and torch's operators load and store, counted while they run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

PARTS = ("forward", "backward")


@dataclass
class Count:
    """Of one kernel or operator: how often it was launched, and the bytes of all its launches."""

    launches: int = 0
    loaded: int = 0
    stored: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


Counts = dict[str, Count]
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITING = {"copy_", "fill_", "zero_"}
_PRODUCTS = {"mm", "addmm", "addmm_"}
_OWN_PRODUCTS = {"epilogue_kernel": ("x", "W", "y")}  # kernels with a base product of their own, and what it moves
_ATOMICS = [name for name in vars(InterpreterBuilder) if name.startswith("create_atomic")]


class Meter(TorchDispatchMode):
    """Counts, part by part, what the kernels and operators called within it load and store.

    Attributes:
        part: the name of what is being counted.
        counts: by part and by the name of the kernel or operator.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """
        Args:
            weights: products with them are not counted.
        """
        super().__init__()
        self.part = PARTS[0]
        self.counts: dict[str, Counts] = {part: {} for part in PARTS}
        self._weights = {_storage(weight) for weight in weights}
        self._kernel: Count | None = None
        self._own_product: list[range] = []  # addresses

    def _of(self, name: str) -> Count:
        return self.counts[self.part].setdefault(name, Count())

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self._kernel is not None:  # the interpreter's own
            return func(*args, **kwargs)
        if name in _PRODUCTS and any(_storage(operand) in self._weights for operand in args[-2:]):
            if name != "mm":
                self._of(name).loaded += _bytes([args[0]])
            return _base_product(func, args, kwargs)
        result = func(*args, **kwargs)
        if name not in _ALLOCATIONS:
            self._operator(func, name, args, kwargs, result)
        return result

    def _operator(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        read, written = [], []
        given = [(a, args[n] if n < len(args) else kwargs.get(a.name)) for n, a in enumerate(func._schema.arguments)]
        for argument, value in given:
            changed = argument.alias_info is not None and argument.alias_info.is_write
            written += _tensors(value) if changed else []
            read += [] if changed and (argument.kwarg_only or name in _OVERWRITING) else _tensors(value)
        if not written:
            inputs = {_storage(tensor) for tensor in read}
            written = [tensor for tensor in _tensors(result) if _storage(tensor) not in inputs]
        if written or not _tensors(result):  # all else is a view
            self._add(name, read, written)

    def _add(self, name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        count = self._of(name)
        count.launches += 1
        count.loaded += _bytes(read)
        count.stored += _bytes(written)

    def _lanes(self, pointers: Any, mask: Any) -> int:
        """The bytes of the lanes that are there; none of what a base product of the kernel's own moves."""
        if any(int(pointers.data.flat[0]) in addresses for addresses in self._own_product):
            return 0
        return int(mask.data.sum()) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Count Triton's kernels, too: every lane of a load or store whose mask is set."""
        call, prepare_for = GridExecutor.__call__, interpreter._patch_lang
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        prepared: set[Any] = set()

        def prepare_once(function: Any) -> Any:
            """The interpreter does this at every call of a function, which is a third of its time."""
            if function not in prepared:
                prepared.add(function)
                return prepare_for(function)

        def run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._kernel = self._of(executor.fn.__name__)
            self._kernel.launches += 1
            given = dict(zip(executor.arg_names, args, strict=False))
            self._own_product = [_addresses(given[name]) for name in _OWN_PRODUCTS.get(executor.fn.__name__, ())]
            prepared.clear()
            try:
                call(executor, *args, **kwargs)
            finally:
                self._kernel = None

        def masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            assert self._kernel is not None
            self._kernel.loaded += self._lanes(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            assert self._kernel is not None
            self._kernel.stored += self._lanes(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def atomic(*_: Any) -> Any:
            raise RuntimeError("a kernel makes an atomic access, which is not counted: count it in Meter.kernels")

        accesses = {"create_masked_load": masked_load, "create_masked_store": masked_store}
        with (
            patch.object(GridExecutor, "__call__", run),
            patch.object(interpreter, "_patch_lang", prepare_once),
            patch.multiple(InterpreterBuilder, **accesses, **dict.fromkeys(_ATOMICS, atomic)),
        ):
            yield


def _addresses(tensor: Tensor) -> range:
    storage = tensor.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each once; of an expanded tensor, what it lies in."""
    distinct = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}
    return sum(
        t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in distinct.values()
    )


def _base_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Of halves in fp32, rounded once: as on a GPU, and far faster on a CPU that does not multiply halves."""
    first = args[0]
    if first.is_meta or first.dtype not in (torch.bfloat16, torch.float16):
        return func(*args, **kwargs)
    result = func(*(tensor.float() for tensor in args), **kwargs)
    return first.copy_(result) if func.overloadpacket.__name__.endswith("_") else result.to(first.dtype)
