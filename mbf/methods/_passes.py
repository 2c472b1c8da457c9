"""Passes over a task's data: the model as it is, in eval mode, watched at its adapted layers.

What several methods share: second moments of layer inputs, C = mean x xᵀ, one for layers that read the same x (q, k
and v; gate and up), and the gradients of the loss at the layers' outputs, from which every weight gradient and Fisher
sum is made: dL/dW = Σ dy xᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbf.methods.base import Batches, Method

InputSink = Callable[[int, Tensor], None]
GradientSink = Callable[[int, Tensor, Tensor], None]


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


def input_moments(method: Method, data: Batches, *, skip: int = 0, limit: int | None = None) -> Moments:
    """C = mean x xᵀ over the tokens of ``data``, padding left out.

    Args:
        method: gives model and layers.
        data: the task's batches; labels are not needed.
        skip: tokens left out at the start of each row. The first one of a decoder draws massive activations, which
            would outweigh all others.
        limit: the number of batches to look at; None is all.

    Raises:
        ValueError: no batch, or no token left.
    """
    sums: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}

    def add(n: int, x: Tensor) -> None:
        x = x.float()
        sums[n] = sums[n].addmm_(x.T, x) if n in sums else x.T @ x
        tokens[n] = tokens.get(n, 0) + len(x)

    first = watch_inputs(method, data, add, skip=skip, limit=limit)
    distinct = sorted(sums)
    if not all(tokens.values()):
        raise ValueError(f"method {method.name!r}: no token is left of the task's data after skipping {skip} a row")
    return Moments(
        [sums[n] / tokens[n] for n in distinct], [distinct.index(n) for n in first], max(tokens.values(), default=0)
    )


@torch.no_grad()
def watch_inputs(
    method: Method, data: Batches, sink: InputSink, *, skip: int = 0, limit: int | None = None
) -> list[int]:
    """Give ``sink(n, x)`` every distinct layer input, x ``[tokens, d_in]`` without padding.

    Returns:
        For each layer the first one that reads the same x, the n under which the sink saw it.
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


def watch_gradients(method: Method, data: Batches, sink: GradientSink, *, limit: int | None = None) -> int:
    """Give ``sink(n, x, dy)`` each layer's input ``[batch, tokens, d_in]`` and the gradient of the batch's loss at its
    output, ``[batch, tokens, d_out]``, zero at padding. No parameter's gradient is touched.

    Returns:
        The number of batches.

    Raises:
        ValueError: no batch, or the model gives no loss for it.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def caught(n: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
            if not y.requires_grad:
                y.requires_grad_()
            seen[n] = args[0].detach(), y

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
            gradients = torch.autograd.grad(loss, [y for _, y in seen.values()], allow_unused=True)
            keep = _tokens(batch, 0)
            with torch.no_grad():
                for (n, (x, _)), dy in zip(seen.items(), gradients, strict=True):
                    if dy is not None:
                        masked = dy if keep is None or keep.shape != dy.shape[:-1] else dy * keep[..., None]
                        sink(n, x, masked)
            count += 1
    return count


@contextmanager
def _as_it_is(method: Method) -> Iterator[None]:
    """The model in eval mode: no dropout, nothing recomputed, no random number drawn."""
    training = method.model.training
    method.model.eval()
    try:
        yield
    finally:
        method.model.train(training)


def _batches(method: Method, data: Batches, limit: int | None) -> Iterator[dict[str, Any]]:
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
        mask = torch.ones_like(batch["input_ids"])
    return None if mask is None else (mask > 0) & (mask.cumsum(1) > skip)
