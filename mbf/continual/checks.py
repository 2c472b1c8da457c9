"""What must hold before a task begins and before it is merged, and the errors that say what does not."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from mbf.continual.header import NAME
from mbf.methods import Batches, Factors, Method
from mbf.peft.config import find_home
from mbf.peft.sharded import is_sharded, whole

if TYPE_CHECKING:
    from mbf.continual.learner import ContinualLora

_WAY_OUT = "the merged LoRA is as it was. Lower the learning rate, clip gradients, or train in a wider dtype"
_SPLITTING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SHOWN = 3  # layers that an error names


class TaskError(RuntimeError):
    """A task could not begin or end; the merged LoRA is as it was before."""


class DivergedError(TaskError):
    """The numbers of a task went bad, so it is refused: a loss, gradient or adapter with inf or NaN, or an adapter that
    exploded. Names the task, the step or the layers, and the value found."""


class NonFiniteAdapterError(DivergedError):
    """A task left inf or NaN in the adapter; names the task, the layers and the values."""


def check_task_name(name: str, argument: str = "name") -> None:
    if not isinstance(name, str):
        raise TypeError(
            f"{argument}: found {name!r} of type {type(name).__name__}, wanted a string, which history and files keep; "
            "name the task, such as 'reviews'"
        )


def check_steps(steps: int | None) -> None:
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"steps: found {steps!r} of type {type(steps).__name__}, wanted the number of optimiser steps of the task, "
            "an int, or None"
        )
    if steps < 1:
        raise ValueError(f"steps: found {steps}, wanted the number of optimiser steps of the task, 1 or more, or None")


def check_weight(weight: float | Tensor | None) -> None:
    """Raise TypeError or ValueError unless ``weight`` can be a λ of ``merged_view``."""
    if isinstance(weight, Tensor):
        if weight.dim():
            raise ValueError(
                f"weight: found a tensor of shape {list(weight.shape)}, wanted one of 0 dimensions; pass "
                "weight.squeeze() if it holds one number"
            )
    elif weight is not None and not isinstance(weight, Real):
        raise TypeError(
            f"weight: found {weight!r} of type {type(weight).__name__}, wanted a number or a 0-d tensor, or None for "
            "the method's own λ"
        )


def check_max_norm(max_norm: float | None) -> None:
    if max_norm is not None and not isinstance(max_norm, Real):
        raise TypeError(
            f"max_norm: found {max_norm!r} of type {type(max_norm).__name__}, wanted a number above 0, or None for no "
            "limit"
        )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: found {max_norm!r}, wanted a number above 0, or None for no limit")


def check_name(adapter: str) -> None:
    if re.fullmatch(NAME, adapter) is None:
        raise ValueError(
            f"adapter {adapter!r}: its name has a dot, slash or space, which no checkpoint can hold; give it another"
        )


def check_can_begin(learner: ContinualLora, name: str, i: int, data: Batches | None) -> None:
    """Raise TaskError unless task ``i`` can begin, TypeError if its name is no string."""
    method, adapter = learner.method, learner.adapter
    check_task_name(name)
    if learner.current_task is not None:
        raise TaskError(f"task {learner.current_task!r} is in progress; end or abandon it before {name!r} begins")
    if method.joint and learner.history:
        raise TaskError(
            f"method {method.name!r} learns all tasks at once: task {i} {name!r} cannot follow; give it all data "
            "in one task, or take another method"
        )
    if method.needs_data and data is None:
        raise TaskError(f"method {method.name!r} takes statistics of the task: call task({name!r}, data=batches)")
    check_data(method, data)
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


def check_data(method: Method, data: Batches | None) -> None:
    """Raise TaskError if the method goes through ``data``, which can be gone through only once."""
    if method.needs_data and isinstance(data, Iterator):
        raise TaskError(
            f"method {method.name!r} goes through the task's data more than once, and data is a {type(data).__name__}, "
            "which is its own iterator and empty afterwards; pass a list, a DataLoader, or list(data)"
        )


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


def warn_of_untrained(learner: ContinualLora, steps: int, held: Container[int]) -> None:
    """Warn at a task's end of parameters that no optimiser has stepped.

    Args:
        steps: optimiser steps that the task had.
        held: ``id`` of the parameters that they concerned.
    """
    what = f"task {learner.task_index} {learner.current_task!r}:"
    if not steps:
        warnings.warn(
            f"{what} no optimiser step reached the adapter. If it was trained, build the optimiser after begin_task, "
            "over the model's parameters as they are then.",
            stacklevel=4,
        )
        return
    missed = {id(p) for p in _trained(learner) if p.requires_grad and id(p) not in held}
    names = [name for name, p in learner.model.named_parameters() if id(p) in missed]
    if names:
        warnings.warn(
            f"{what} no optimiser held {len(names)} of the parameters that it trains, {names[0]} for example, and they "
            "are as the task began. Build the optimiser after begin_task over all parameters that require a gradient, "
            "whatever their names, or freeze these.",
            stacklevel=4,
        )


def split_by(config: LoraConfig) -> str | None:
    """The ``init_lora_weights`` of ``config``, if PEFT takes a part out of W by it whenever it loads the adapter."""
    how = config.init_lora_weights
    return how if isinstance(how, str) and how.lower().startswith(_SPLITTING) else None


def check_keeps_split(model: nn.Module, adapter: str, what: str) -> None:
    """Raise ValueError if W of a saved ``adapter`` is another one as soon as its rank is.

    Args:
        what: would give it another rank.
    """
    home = find_home(model, adapter)
    if home is not None and (how := split_by(home.config)) is not None:
        raise ValueError(
            f"adapter {adapter!r} was made with init_lora_weights={how!r}, by which PEFT takes a part of its rank out "
            f"of W whenever it loads the adapter, and {what}: what is saved would load as another function. Make it "
            "with init_lora_weights=True, start it by mbf.init_pissa_(model) and keep the base weights beside the "
            "adapter, or take a method that keeps the rank"
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
    for name, parameter in _own(learner):
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteAdapterError(f"{what} inf or NaN in {name}: {_bad_values([parameter])}; {_WAY_OUT}.")


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
    bad = []
    for layer, A, B in zip(learner.layers, factors.A, factors.B, strict=True):
        found = {name: t for name, t in (("A", A), ("B", B)) if not bool(torch.isfinite(t).all())}
        if found:
            bad.append(f"{layer.name} ({' and '.join(found)}): {_bad_values(found.values())}")
    if bad:
        raise NonFiniteAdapterError(f"{what} inf or NaN in {_listed(bad)}; {_WAY_OUT}.")


# -- the size of the adapter -------------------------------------------------------------------------------------------


def gains(learner: ContinualLora, factors: Factors) -> Tensor:
    """float64 [layers]: s·‖B A‖_F / √d_out of ``factors``, the RMS of what a layer's adapter adds to its output where
    the RMS of its input is 1.

    ‖B A‖_F² = Σ (BᵀB ∘ A Aᵀ), so B A is not formed. In fp64, as fp32 would overflow where it matters most.
    """
    squares = []
    for layer, A, B in zip(learner.layers, factors.A, factors.B, strict=True):
        A, B = A.double(), B.double()
        scaled = float(layer.scale) ** 2 / len(B)
        squares.append(scaled * ((B.mT @ B) * (A @ A.mT)).sum().to(learner.layers[0].A.device))
    return torch.stack(squares).clamp_(min=0).sqrt_()  # rounding may leave a zero below zero


def check_gains(learner: ContinualLora, factors: Factors, what: str) -> None:
    """Raise DivergedError if the adapter of a layer with ``factors`` is larger than ``learner.max_norm`` allows."""
    if learner.max_norm is None:
        return
    found = gains(learner, factors)
    over = (found > learner.max_norm).nonzero()[:, 0].tolist()
    if over:
        values = found.tolist()
        over.sort(key=lambda n: -values[n])
        shown = [_size(learner.layers[n].name, values[n], learner.max_norm, len(factors.B[n])) for n in over]
        raise DivergedError(
            f"{what} an adapter that exploded: {_listed(shown)}; {_WAY_OUT}; or, if it is meant to be so large, give "
            f"ContinualLora another max_norm than {learner.max_norm:g} (None: no limit)."
        )


def _size(name: str, gain: float, limit: float, d_out: int) -> str:
    root = math.sqrt(d_out)
    return f"{name} with s·‖BA‖ = {gain * root:.3g}, wanted at most {limit * root:.3g} (max_norm·√d_out)"


# -- a step of training ------------------------------------------------------------------------------------------------


def check_step(
    learner: ContinualLora,
    step: int,
    loss: Tensor | float | None,
    *,
    together: bool,
    among: Container[int] | None = None,
) -> None:
    """Raise DivergedError if the loss, or a gradient of what the task trains, has inf or NaN.

    One fused pass over the gradients, and one value that the host waits for; more only where something is wrong.

    Args:
        learner: in a task.
        step: the coming optimiser step, from 1, for the error.
        loss: of this process, a number; None leaves it out.
        together: whether the processes decide by what all of them have; then each must call this. Where gradients are
            in parts (FSDP2) they always do.
        among: ``id`` of the parameters to look at; default all that the task trains.
    """
    parameters = [p for p in _trained(learner) if p.grad is not None and (among is None or id(p) in among)]
    sizes = [_norms(_parts(parameters))] if parameters else []
    if loss is not None:
        device = sizes[0].device if sizes else learner.layers[0].A.device
        sizes.insert(0, torch.as_tensor(loss, device=device).detach().float().reshape(1))
    if not sizes:
        return
    together = together or any(layer.sharded for layer in learner.layers)
    values = torch.cat(sizes)
    if together:
        values = learner.replicas.total(values)  # a sum keeps inf and NaN
    if bool(torch.isfinite(values).all()):
        return
    where = f"task {learner.task_index} {learner.current_task!r}, step {step}:"
    if loss is not None and not math.isfinite(found := float(values[0])):
        raise DivergedError(f"{where} the loss is {found}, wanted a finite number; {_WAY_OUT}.")
    counts = torch.stack([(~part.isfinite()).sum().to(values.device, torch.float32) for part in _parts(parameters)])
    counts = learner.replicas.total(counts) if together else counts
    bad = [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]
    if not bad:
        return  # only their squares are too large for fp32
    first = bad[0].grad
    assert first is not None
    names = {id(p): name for name, p in _named(learner)}
    more = f" (and in {len(bad) - 1} more of {len(parameters)} gradients)" if len(bad) > 1 else ""
    raise DivergedError(
        f"{where} inf or NaN in the gradient of {names[id(bad[0])]}: {_bad_values([whole(first)])}{more}; {_WAY_OUT}."
    )


def _parts(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients, of those that are sharded this process's part."""
    gradients: list[Any] = [p.grad for p in parameters]
    return [g.to_local() if is_sharded(g) else g.detach() for g in gradients]


def _norms(tensors: list[Tensor]) -> Tensor:
    """float32 [tensors]: 2-norms, computed in fp32 at least. The largest magnitude would not overflow, and takes ten
    times as long on a CPU."""
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    device = tensors[0].device
    return torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm(tensors, 2, dtype=dtype)])


def _trained(learner: ContinualLora) -> Iterator[Tensor]:
    for layer in learner.layers:
        yield layer.A
        yield layer.B
    for parameters in learner.method.learned.values():
        yield from parameters


def _named(learner: ContinualLora) -> Iterator[tuple[str, Tensor]]:
    for layer in learner.layers:
        yield f"A of {layer.name}", layer.A
        yield f"B of {layer.name}", layer.B
    yield from _own(learner)


def _own(learner: ContinualLora) -> Iterator[tuple[str, Tensor]]:
    """The method's own parameters, with the layer of each where there is one a layer."""
    for name, parameters in learner.method.learned.items():
        for n, parameter in enumerate(parameters):
            where = learner.layers[n].name if len(parameters) == len(learner.layers) else f"number {n}"
            yield f"{name} of {where}", parameter


def _bad_values(tensors: Iterable[Tensor]) -> str:
    """``3 nan, 1 -inf of 128 values``."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    counts = {"nan": flat.isnan(), "inf": flat == math.inf, "-inf": flat == -math.inf}
    found = [f"{count} {name}" for name, mask in counts.items() if (count := int(mask.sum()))]
    return f"{', '.join(found) or 'none here, but on another process,'} of {flat.numel()} values"


def _listed(bad: Sequence[str]) -> str:
    more = f" and {len(bad) - _SHOWN} more layers" if len(bad) > _SHOWN else ""
    return ", ".join(bad[:_SHOWN]) + more
