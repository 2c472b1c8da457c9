"""What a method keeps, as flat named tensors and back.

Factors and lists are spread as ``key.A.0``, ``key.B.0`` and ``key.0``, numbers become ``key.number``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Factors:
    """A and B of every layer, in the order of ``Method.layers``."""

    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)

    def clone(self) -> Factors:
        return Factors([a.detach().clone() for a in self.A], [b.detach().clone() for b in self.B])

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.A, *self.B))


State = dict[str, Factors | Tensor | list[Tensor] | float | int]


def spread(state: Mapping[str, Factors | Tensor | list[Tensor] | float | int]) -> dict[str, Tensor]:
    """The flat form."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Factors):
            flat |= {f"{key}.A.{n}": t for n, t in enumerate(value.A)}
            flat |= {f"{key}.B.{n}": t for n, t in enumerate(value.B)}
        elif isinstance(value, list):
            flat |= {f"{key}.{n}": t for n, t in enumerate(value)}
        elif isinstance(value, Tensor):
            flat[key] = value
        else:
            flat[f"{key}.number"] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return flat


def gather(flat: Mapping[str, Tensor]) -> State:
    """The inverse of ``spread``.

    Raises:
        ValueError: a name that ``spread`` gives to nothing, a gap in a list, A without B, inf or NaN.
    """
    state: dict[str, Any] = {}
    numbered: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in flat.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has inf or NaN")
        key, *rest = name.split(".")
        match rest:
            case [] | ["number"] if key in state:
                raise ValueError(f"{key} is of two kinds")
            case []:
                state[key] = tensor
            case ["number"] if tensor.ndim == 0:
                state[key] = tensor.item()
            case [index] if _is_index(index):
                numbered.setdefault((key, ""), {})[int(index)] = tensor
            case ["A" | "B" as factor, index] if _is_index(index):
                numbered.setdefault((key, factor), {})[int(index)] = tensor
            case _:
                raise ValueError(f"{name!r} {list(tensor.shape)} is nothing that a method keeps")
    for (key, kind), entries in numbered.items():
        if sorted(entries) != list(range(len(entries))):
            raise ValueError(f"{key} has a gap: {len(entries)} entries, up to number {max(entries)}")
        ordered = [entries[n] for n in range(len(entries))]
        if kind:
            both = state.setdefault(key, Factors())
            if not isinstance(both, Factors):
                raise ValueError(f"{key} is of two kinds")
            setattr(both, kind, ordered)
        elif key in state:
            raise ValueError(f"{key} is of two kinds")
        else:
            state[key] = ordered
    for key, value in state.items():
        if isinstance(value, Factors) and len(value.A) != len(value.B):
            raise ValueError(f"{key} has {len(value.A)} A and {len(value.B)} B")
    return state


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and text == str(int(text[:9]))
