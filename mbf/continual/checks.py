"""What must hold before a task begins and before it is merged, and the errors that say what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mbf.methods import Batches, Factors

if TYPE_CHECKING:
    from mbf.continual.learner import ContinualLora


class TaskError(RuntimeError):
    """A task could not begin or end; the merged LoRA is as it was before."""


class NonFiniteAdapterError(TaskError):
    """A task left inf or NaN in the adapter; names the task and the layers."""


def check_can_begin(learner: ContinualLora, name: str, i: int, data: Batches | None) -> None:
    """Raise TaskError unless task ``i`` can begin."""
    method, adapter = learner.method, learner.adapter
    if learner.current_task is not None:
        raise TaskError(f"task {learner.current_task!r} is in progress; end or abandon it before {name!r} begins")
    if method.joint and learner.history:
        raise TaskError(f"method {method.name!r} learns all tasks at once: task {i} {name!r} cannot follow")
    if method.needs_data and data is None:
        raise TaskError(f"method {method.name!r} takes statistics of the task: call task({name!r}, data=batches)")
    for layer in learner.layers:
        if adapter not in layer.module.active_adapters:
            raise TaskError(
                f"adapter {adapter!r} is not active in {layer.name} (active: {layer.module.active_adapters}); "
                f"call model.set_adapter({adapter!r})"
            )
        if layer.module.merged:
            raise TaskError(f"an adapter is merged into W of {layer.name}; call model.unmerge_adapter()")
    if any(layer.sharded for layer in learner.layers):
        _check_can_shard(learner, name, i)


def _check_can_shard(learner: ContinualLora, name: str, i: int) -> None:
    """FSDP2 fixes the shapes of its parameters, and which of them have gradients, when it takes them."""
    method, what = learner.method, None
    if method.changes_rank:
        what = "changes the rank of the adapter"
    elif method.learns:
        what = "learns parameters beside A and B"
    elif method.trains(i) != (True, True):
        what = "trains only one of A and B"
    if what is not None:
        raise TaskError(
            f"method {method.name!r} {what}, which parameters that fully_shard took cannot follow; task {i} {name!r} "
            "did not begin. Train with DDP, or with another method"
        )


def check_can_adopt(learner: ContinualLora) -> None:
    """Raise ValueError unless the method can take an adapter that was trained elsewhere as its first task."""
    method = learner.method
    if method.adopts:
        return
    raise ValueError(
        f"method {method.name!r} cannot go on from an adapter that was trained elsewhere (B is not zero): it needs to "
        "have learnt every task itself. Begin with an untrained adapter, or say learnt=False if it is only a start"
    )


def check_finite_parameters(learner: ContinualLora, what: str) -> None:
    """Raise NonFiniteAdapterError if a parameter of the method's own has inf or NaN."""
    for name, parameters in learner.method.learned.items():
        for n, parameter in enumerate(parameters):
            if not bool(torch.isfinite(parameter).all()):
                where = learner.layers[n].name if len(parameters) == len(learner.layers) else f"number {n}"
                raise NonFiniteAdapterError(
                    f"{what} inf or NaN in {name} of {where}; the merged LoRA is as it was. Lower the learning rate, "
                    "clip gradients, or train in a wider dtype."
                )


def check_same(learner: ContinualLora, factors: Factors, what: str) -> None:
    """Raise TaskError, on all processes alike, unless all of them hold the same ``factors`` of the adapter."""
    if learner.replicas.size == 1:
        return
    apart = learner.replicas.differing([t for pair in zip(factors.A, factors.B, strict=True) for t in pair])
    if apart:
        index, rank = apart[0]
        raise TaskError(
            f"{what} {'AB'[index % 2]} of {learner.layers[index // 2].name} on process {rank} other than on process 0 "
            f"({len(apart)} such tensors): they were not trained together; the merged LoRA is as it was. Wrap the "
            "model in DDP or fully_shard (Trainer and accelerate do), or pass process_group=False for an adapter a "
            "process"
        )


def check_finite(learner: ContinualLora, factors: Factors, what: str) -> None:
    """Raise NonFiniteAdapterError if A or B of a layer has inf or NaN in ``factors``, those of the adapter."""
    bad = [
        f"{layer.name} ({' and '.join(names)})"
        for layer, A, B in zip(learner.layers, factors.A, factors.B, strict=True)
        if (names := [n for n, t in (("A", A), ("B", B)) if not bool(torch.isfinite(t).all())])
    ]
    if bad:
        more = f" and {len(bad) - 3} more layers" if len(bad) > 3 else ""
        raise NonFiniteAdapterError(
            f"{what} inf or NaN in {', '.join(bad[:3])}{more}; the merged LoRA is as it was. Lower the learning "
            "rate, clip gradients, or train in a wider dtype."
        )
