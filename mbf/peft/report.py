"""What ``fuse`` did to each layer, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 3


@dataclass(frozen=True)
class FuseReport:
    """Every LoRA layer of a model by its name in ``model.named_modules()``.

    Attributes:
        fused: the layers that now compute with the fused operator.
        declined: the layers left to PEFT, each with its reason.
    """

    fused: tuple[str, ...]
    declined: dict[str, str]

    def __str__(self) -> str:
        """A line of counts, then one line a reason with the layers that it concerns."""
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.declined)} LoRA layers fused"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.declined.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            lines.append(f"  {len(names)} left to PEFT: {reason} ({shown})")
        return "\n".join(lines)
