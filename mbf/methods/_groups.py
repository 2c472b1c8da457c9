"""The rows of an optimiser step in two random groups, and the gradients of each: for methods that compare them.

The training loop need not help: the inputs of its training forwards are remembered (``see``, from ``forward_mod``), and
run again in parts (``gradients``, from ``after_backward``). The micro-batches of an accumulated step are one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbf.methods.base import Method


@dataclass(frozen=True)
class Part:
    """Rows of one forward: its inputs, over how many labels their loss is a mean, and the autocast that was on."""

    inputs: dict[str, Any]
    labels: int
    autocast: tuple[str, torch.dtype] | None


Group = list[Part]


class Groups:
    """The step's rows, from the forwards of ``method.model`` as they come."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._forwards: list[tuple[dict[str, Any], int, tuple[str, torch.dtype] | None]] = []
        self._running = False

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Remember a training forward; those that ``gradients`` makes are passed over."""
        rows = _rows(inputs)
        if self._running or not rows:
            return
        device = self._method.layers[0].A.device.type
        autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        # The number of labels in the whole step, by which Trainer has the model divide: a group has one of its own.
        kept = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        self._forwards.append((kept, rows, autocast))

    def forget(self) -> None:
        """A new task, or step."""
        self._forwards = []

    def split(self) -> tuple[Group, Group]:
        """What was seen, in two groups of equally many rows or one apart, drawn from torch's default generator.

        A group is empty where there is but one row, or no label to learn in it. What was seen is forgotten.
        """
        forwards, self._forwards = self._forwards, []
        order = torch.randperm(sum(rows for _, rows, _ in forwards))
        second = torch.zeros(len(order), dtype=torch.bool)
        second[order[: len(order) // 2]] = True
        groups: tuple[Group, Group] = [], []
        parts = second.split([rows for _, rows, _ in forwards]) if forwards else ()
        for (inputs, rows, autocast), chosen in zip(forwards, parts, strict=True):
            for group, here in zip(groups, ((~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]), strict=True):
                taken = {name: _take(value, here, rows) for name, value in inputs.items()}
                if labels := _labels(taken, len(here)):
                    group.append(Part(taken, labels, autocast))
        return groups

    def gradients(self, group: Group, parameters: Sequence[nn.Parameter], way_out: str) -> list[Tensor]:
        """Of the model's loss, averaged over the labels of ``group``, as the model trains now; no ``.grad`` is touched.

        Args:
            group: of ``split``, not empty.
            parameters: which gradients.
            way_out: what a user can do who has a loss of their own, for the error.

        Raises:
            ValueError: the model gives no loss.
        """
        total = sum(part.labels for part in group)
        sums = [torch.zeros_like(p) for p in parameters]
        self._running = True
        try:
            for part in group:
                with torch.enable_grad(), torch.autocast(*part.autocast) if part.autocast else nullcontext():
                    loss = getattr(self._method.model(**part.inputs), "loss", None)
                if loss is None:
                    given = ", ".join(sorted(name for name, value in part.inputs.items() if value is not None))
                    raise ValueError(
                        f"method {self._method.name!r} takes gradients of the model's own loss, and the model gave "
                        f"none for {given}; pass labels to its forward, or {way_out}"
                    )
                for s, g in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if g is not None:
                        s.add_(g, alpha=part.labels / total)
        finally:
            self._running = False
        return sums


def _rows(inputs: Mapping[str, Any]) -> int:
    """The number of rows, from what the model reads, else from the first tensor; 0 if there is none."""
    tensors = (inputs.get(name) for name in ("input_ids", "inputs_embeds", *inputs))
    return next((len(t) for t in tensors if isinstance(t, Tensor) and t.dim()), 0)


def _take(value: Any, here: Tensor, rows: int) -> Any:
    """These rows of a tensor that has one for each row of the batch; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value[here.to(value.device)]
    return value


def _labels(inputs: Mapping[str, Any], rows: int) -> int:
    """How many labels the loss is a mean over: tokens, or rows."""
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return int((labels != -100).sum())
    return rows
