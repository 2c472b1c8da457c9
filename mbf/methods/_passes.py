"""Passes over a task's data: the model as it is, in eval mode, watched at its adapted layers.

What several methods share: second moments of layer inputs, C = mean x xᵀ, one for layers that read the same x (q, k
and v; gate and up), and the gradients of the loss at the layers' outputs, from which every weight gradient and Fisher
sum is made: dL/dW = Σ dy xᵀ.

Of several processes that train together, each passes over the data that it was given; the sums are over them all.

A pass leaves no trace: the modes of the modules, torch's random state and all ``.grad`` are what they were. Its data
are gone through as often as a method asks, so they must be a list, a ``DataLoader`` or the like, not an iterator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbf.methods.base import Batches, Method

InputSink = Callable[[int, Tensor], None]
GradientSink = Callable[[int, Tensor, Tensor], None]
GradientForm = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Moments:
    """Second moments of the inputs of a method's layers.

    Attributes:
        C: fp32 ``[d_in, d_in]``, one for every distinct input, in the order of the layers that first read it.
        of: for each layer its place in ``C``.
        tokens: how many were averaged.
    """

    C: list[Tensor]
    of: list[int]
    tokens: int


def input_moments(method: Method, data: Batches | None, *, skip: int = 0, limit: int | None = None) -> Moments:
    """C = mean x xᵀ over the tokens of ``data``, padding left out.

    Args:
        method: gives model and layers.
        data: the task's batches; labels are not needed.
        skip: tokens left out at the start of each row. The first one of a decoder draws massive activations, which
            would outweigh all others.
        limit: the number of batches to look at; None is all.

    Raises:
        ValueError: no batch, no token left, or a layer that the model did not call.
    """
    sums: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}

    def add(n: int, x: Tensor) -> None:
        x = x.float()
        sums[n] = sums[n].addmm_(x.T, x) if n in sums else x.T @ x
        tokens[n] = tokens.get(n, 0) + len(x)

    first = watch_inputs(method, data, add, skip=skip, limit=limit)
    distinct = sorted(sums)
    of_all(method, sums, tokens)
    if not all(tokens.values()):
        raise ValueError(
            f"method {method.name!r}: no token is left of the task's data after skipping {skip} a row; give longer "
            "rows, or set skip=0"
        )
    _check_called(method, {n for n, source in enumerate(first) if source in sums})
    return Moments(
        [sums[n] / tokens[n] for n in distinct], [distinct.index(n) for n in first], max(tokens.values(), default=0)
    )


def mean_gradients(
    method: Method, data: Batches | None, *, limit: int | None = None, form: GradientForm | None = None
) -> list[Tensor]:
    """G = dL/dW of every layer, fp32 ``[d_out, d_in]``, averaged over the batches; W itself needs no gradient.

    All layers' G stand in memory at once: four bytes for every adapted weight.

    Args:
        method: gives model and layers.
        data: the task's batches, with labels.
        limit: the number of batches to look at; None is all.
        form: ``form(n, x, dy)`` instead of G = dyᵀ x of layer n, with x ``[tokens, d_in]``, dy ``[tokens, d_out]`` in
            fp32: any linear function of G, such as dyᵀ (x Q), so that G need not be formed.

    Raises:
        ValueError: no batch, no loss, or a layer that the loss does not depend on.
    """
    sums: dict[int, Tensor] = {}

    def add(n: int, x: Tensor, dy: Tensor) -> None:
        dy, x = dy.flatten(0, -2).float(), x.flatten(0, -2).float()
        if form is not None:
            sums[n] = sums[n].add_(form(n, x, dy)) if n in sums else form(n, x, dy)
        else:
            sums[n] = sums[n].addmm_(dy.T, x) if n in sums else dy.T @ x

    count = {0: watch_gradients(method, data, add, limit=limit)}
    of_all(method, sums, count)
    return [sums[n] / count[0] for n in range(len(method.layers))]


@torch.no_grad()
def of_all(method: Method, sums: dict[int, Tensor], counts: dict[int, int]) -> None:
    """Add up, over the processes that train together, what each has seen of its data; alike data count alike.

    Args:
        sums: over the data of this process; changed.
        counts: of what; changed.
    """
    device = method.layers[0].A.device
    for n, own in list(sums.items()):
        sums[n] = method.total(own)
    found = method.total(torch.tensor([*counts.values()], dtype=torch.float64, device=device)).tolist()
    for n, count in zip(list(counts), found, strict=True):
        counts[n] = int(count)


@torch.no_grad()
def watch_inputs(
    method: Method, data: Batches | None, sink: InputSink, *, skip: int = 0, limit: int | None = None
) -> list[int]:
    """Give ``sink(n, x)`` every distinct layer input, x ``[tokens, d_in]`` without padding.

    Returns:
        For each layer the first one that reads the same x, the n under which the sink saw it.

    Raises:
        ValueError: no batch.
    """
    first = list(range(len(method.layers)))
    last: tuple[int, Tensor] | None = None
    keep: Tensor | None = None

    def seen(n: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            nonlocal last
            x = args[0]
            if last is not None and last[1] is x:
                first[n] = last[0]
                return
            last = n, x
            sink(n, x[keep] if keep is not None and keep.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1]))

        return hook

    with _as_it_is(method), ExitStack() as stack:
        for n, layer in enumerate(method.layers):
            stack.callback(layer.module.register_forward_pre_hook(seen(n)).remove)
        for batch in _batches(method, data, limit):
            last, keep = None, _tokens(batch, skip)
            method.model(**batch)
    return first


def watch_gradients(method: Method, data: Batches | None, sink: GradientSink, *, limit: int | None = None) -> int:
    """Give ``sink(n, x, dy)`` each layer's input ``[batch, tokens, d_in]`` and the gradient of the batch's loss at its
    output, ``[batch, tokens, d_out]``, zero at padding. No parameter's gradient is touched.

    A batch's activations are kept until its gradients are there, as in training without checkpointing. A layer that a
    forward calls more than once is given once for every call.

    Returns:
        The number of batches.

    Raises:
        ValueError: no batch, no loss, or a layer that the loss does not depend on.
    """
    reached: set[int] = set()
    seen: list[tuple[int, Tensor, Tensor]] = []

    def caught(n: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
            if not y.requires_grad:
                y.requires_grad_()
            seen.append((n, args[0].detach(), y))

        return hook

    count = 0
    with _as_it_is(method), torch.enable_grad(), ExitStack() as stack:
        for n, layer in enumerate(method.layers):
            stack.callback(layer.module.register_forward_hook(caught(n)).remove)
        for batch in _batches(method, data, limit):
            seen.clear()
            loss = getattr(method.model(**batch), "loss", None)
            if loss is None:
                raise ValueError(
                    f"method {method.name!r} needs the loss of the task's data: the model gave none for a batch of "
                    f"{', '.join(sorted(batch))}; put labels into the batches"
                )
            gradients = torch.autograd.grad(loss, [y for _, _, y in seen], allow_unused=True)
            keep = _tokens(batch, 0)
            with torch.no_grad():
                for (n, x, _), dy in zip(seen, gradients, strict=True):
                    if dy is not None:
                        reached.add(n)
                        masked = dy if keep is None or keep.shape != dy.shape[:-1] else dy * keep[..., None]
                        sink(n, x, masked)
            count += 1
    _check_called(method, reached)
    return count


def _check_called(method: Method, called: Collection[int]) -> None:
    missing = [layer.name for n, layer in enumerate(method.layers) if n not in called]
    if missing:
        raise ValueError(
            f"method {method.name!r}: the task's batches did not reach {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more layers' if len(missing) > 3 else ''}; give batches that do, or adapt "
            "other layers"
        )


@contextmanager
def _as_it_is(method: Method) -> Iterator[None]:
    """The model in eval mode: no dropout, nothing recomputed. Modes and random state are put back."""
    training, modes = method.model.training, [(module, module.training) for module in method.model.modules()]
    device = method.layers[0].A.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a DataLoader draws, too
        method.model.eval()
        try:
            yield
        finally:
            method.model.train(training)  # first, as a module's own train() may do more than set the flag
            for module, mode in modes:
                module.training = mode


def _batches(method: Method, data: Batches | None, limit: int | None) -> Iterator[dict[str, Any]]:
    if data is None:
        raise ValueError(f"method {method.name!r} takes statistics of the task: give its batches to begin_task")
    device, count = method.layers[0].A.device, 0
    for count, batch in enumerate(data, 1):
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        if count == limit:
            break
    if not count:
        raise ValueError(
            f"method {method.name!r} takes statistics of the task, and its data gave no batch; pass batches that can "
            "be gone through more than once (a list, a DataLoader), not an iterator"
        )


def _tokens(batch: dict[str, Any], skip: int) -> Tensor | None:
    """bool [batch, tokens]: which positions count. None: all."""
    mask = batch.get("attention_mask")
    if mask is None and skip:
        x = batch.get("input_ids", batch.get("inputs_embeds", batch.get("inputs")))
        if x is None:
            raise ValueError(
                f"skip={skip} needs to know a batch's rows and tokens, and there is no attention_mask, input_ids or "
                f"inputs_embeds among {', '.join(sorted(batch))}; put one in, or set skip=0"
            )
        mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    return None if mask is None else (mask > 0) & (mask.cumsum(1) > skip)
