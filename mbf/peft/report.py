"""What ``fuse`` did to each layer, for programs and for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_SHOWN = 3


@dataclass(frozen=True)
class FuseReport:
    """Every LoRA layer of a model by its name in ``model.named_modules()``.

    Attributes:
        fused: the layers that now compute with the fused operator.
        declined: the layers left to PEFT, each with its reason.
        shared: the modules some of whose fused layers read one input and are computed together, each with these layers'
            names in it, such as q_proj, k_proj, v_proj.
        mlps: the MLPs that are computed whole.
        frozen: the linear layers without adapter that compute by mbf, too, as torch is slow at them on this machine.
    """

    fused: tuple[str, ...]
    declined: dict[str, str]
    shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mlps: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line of counts, one line a kind of group, then one line a reason; each with the names that it concerns."""
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.declined)} LoRA layers fused"]
        for layers, names in _by_value(self.shared.items()).items():
            lines.append(f"  {len(names)} x {', '.join(layers)} computed together ({_some(names)})")
        if self.mlps:
            lines.append(f"  {len(self.mlps)} x MLP computed whole ({_some(self.mlps)})")
        if self.frozen:
            lines.append(f"  {len(self.frozen)} x frozen linear layer without adapter ({_some(self.frozen)})")
        for reason, names in _by_value(self.declined.items()).items():
            lines.append(f"  {len(names)} left to PEFT: {reason} ({_some(names)})")
        return "\n".join(lines)


def _by_value(items: Iterable[tuple[str, tuple[str, ...] | str]]) -> dict[tuple[str, ...] | str, list[str]]:
    names: dict[tuple[str, ...] | str, list[str]] = {}
    for name, value in items:
        names.setdefault(value, []).append(name)
    return names


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
