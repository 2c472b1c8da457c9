"""What a continual-LoRA method is: its hooks, its options, and the layers it is given.

The learner (``mbf.continual``) calls the hooks in this order for task ``i`` (counted from 1)::

    before_task(i, data)      statistics of the new task, if the method needs a pass over its data
    init_adapter(i)           write the start (A, B) of the task; install routes; make parameters of its own (``learn``)
    ── the user's training loop, plain or transformers.Trainer ──
       forward_mod(step, inputs)   before every forward of the model in training mode
       loss_extra()                just before every optimiser step; its gradient is added to the parameters'
       after_backward()            then, with the final gradients in place
       after_step(step)            just after every optimiser step
    ── end ──
    after_task(i, data)       write the merged (A, B), which is what is evaluated, saved and shipped

The learner removes the task's routes before ``after_task``. Between tasks ``select(task)`` installs those of
inference: with None, after every task, roll-back and load, and with a task's number when the user names one. Whenever
the model does not train, ``inference_adapter(inputs)`` runs before every forward, for methods that route by prompt. A
method keeps what outlives a task, and what a checkpoint inside one needs, in ``self.state``, and replaces its entries
rather than changing them in place: the learner rolls an interrupted task back by restoring the entries and the adapter
as they were.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mbf.methods._state import Factors, State, gather, spread
from mbf.ops import BranchTerms, LoraTerms

Grade = Literal["CODE", "NOTE", "3RD", "ABS", "standard", "paper"]


Batches = Iterable[Mapping[str, Any]]
"""A task's data: keyword arguments of the model's forward, batch by batch; as often as it is iterated."""


class Layer(Protocol):
    """One adapted linear layer, ``y = x Wᵀ + s (x Aᵀ) Bᵀ``, W ``[d_out, d_in]``, ``A [r, d_in]``, ``B [d_out, r]``.

    ``mbf.peft.AdapterLayer`` is the implementation over a PEFT layer.
    """

    name: str

    @property
    def module(self) -> torch.nn.Module:
        """The layer in the model, whose forward takes x: to hook, and to ask whether it trains."""
        ...

    @property
    def A(self) -> torch.nn.Parameter: ...

    @property
    def B(self) -> torch.nn.Parameter: ...

    @property
    def scale(self) -> float:
        """s, as the layer applies it now."""
        ...

    def values(self) -> tuple[Tensor, Tensor]:
        """A and B whole and without autograd, also where A and B are kept in parts by several processes."""
        ...

    def weight(self) -> Tensor:
        """W as it is, ``[d_out, d_in]`` in fp32 and without autograd; a quantised one is dequantised. A copy."""
        ...

    def write(self, A: Tensor, B: Tensor) -> None:
        """Set A and B. The parameters keep their identity when the rank stays; otherwise they are replaced and PEFT's
        ``r`` and ``lora_alpha`` follow so that s stays what it was."""
        ...

    def route(self, terms: Callable[[Layer], BranchTerms] | None, *, own_operator: bool = False) -> None:
        """Have every forward compute with ``terms(layer)`` instead of the plain (A, B); None undoes it.

        ``own_operator`` says that the terms are none of ``lora_linear``.
        """
        ...


class Options(BaseModel):
    """Options of a method: unknown names and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class MethodInfo:
    """One row of ``mbf methods``.

    Attributes:
        title: what the method is called.
        trained, frozen: during a task.
        merge: the rule after it.
        memory: all that persists, in sizes P of one LoRA, with T tasks.
        data_free: no rows of old tasks are kept.
        task_id: inference is as trained only where the task is named (``learner.select_task``).
        foldable: the result is one plain LoRA; else what plain PEFT loads approximates it.
        grade: of the source: the authors' CODE, a published NOTE, a 3RD party, the ABStract alone.
        source: paper or repository.
    """

    title: str
    trained: str
    frozen: str
    merge: str
    memory: str
    data_free: bool = True
    task_id: bool = False
    foldable: bool = True
    grade: Grade = "standard"
    source: str = ""


class Method:
    """Base of every method; the defaults are plain sequential fine-tuning.

    Attributes:
        name: what users write.
        info: the row of the table of methods.
        Options: the class of its options.
        joint: learns all tasks at once (the upper bound) instead of one after another.
        needs_data: its hooks read the task's data, so ``task(name, data=...)`` must be given.
        changes_rank: it writes factors of another rank than the adapter had, which FSDP2's parameters cannot take.
        learns: it makes parameters of its own (``learn``).
        adopts: an adapter that was trained elsewhere can stand for its first task; ``after_task(1, None)`` takes it in.
        merges_alone: ``after_task`` needs nothing but the trained adapters, so that ``mbf merge`` can call it.
        own_operator: its routes give the terms of an operator of its own, not of ``lora_linear``.
        model: the model that is trained, set by the learner.
        layers: the adapted layers, set by the learner.
        merged: the merged LoRA as it was when the current task began (what a roll-back restores); empty between tasks.
        terms: the route in force, if any.
        learned: the parameters of its own in the task in progress, by name; empty between tasks.
        steps: optimiser steps that the task in progress is to take, where ``begin_task`` was told; set by the learner.
        total: the sum of a tensor over the processes that train together, each of which must call it; set by the
            learner. For what a method counts in the rows of its own process.
        state: what outlives a task, by name: Factors, tensors, lists of them, numbers. Replaced, never changed in
            place.

    Class attributes of a new method: ``name``, ``info``, and ``Options`` where it has any; ``register`` makes it known.
    """

    name: ClassVar[str]
    info: ClassVar[MethodInfo]
    Options: ClassVar[type[Options]] = Options
    joint: ClassVar[bool] = False
    needs_data: bool = False
    learns: bool = False
    own_operator: ClassVar[bool] = False
    adopts: ClassVar[bool] = True
    merges_alone: ClassVar[bool] = True
    changes_rank: bool = False
    model: torch.nn.Module

    def __init__(self, **options: Any) -> None:
        self.options = self.Options(**options)
        self.layers: Sequence[Layer] = ()
        self.merged = Factors()
        self.terms: Callable[[Layer], BranchTerms] | None = None
        self.learned: dict[str, list[torch.nn.Parameter]] = {}
        self.steps: int | None = None
        self.total: Callable[[Tensor], Tensor] = _alone
        self.state: State = {}
        self._places: dict[str, int] = {}

    # -- the adapter as lists over all layers, the form that the batched operators take ------------------------------

    @property
    def current(self) -> Factors:
        """The adapter's own (A, B) without autograd: live, the parameters' data, unless FSDP2 shards them."""
        values = [layer.values() for layer in self.layers]
        return Factors([A for A, _ in values], [B for _, B in values])

    def write(self, factors: Factors) -> None:
        """Write (A, B) of every layer into the adapter."""
        for layer, A, B in zip(self.layers, factors.A, factors.B, strict=True):
            layer.write(A, B)

    def route(self, terms: Callable[[Layer], BranchTerms] | None) -> None:
        """Route every layer's forward through ``terms``; None undoes it."""
        self.terms = terms
        for layer in self.layers:
            layer.route(terms, own_operator=self.own_operator)

    def index(self, layer: Layer) -> int:
        """The place of ``layer`` in ``layers``, and so in every list over them."""
        if self._places.get(layer.name) is None:
            self._places = {one.name: n for n, one in enumerate(self.layers)}
        return self._places[layer.name]

    def learn(self, name: str, values: Iterable[Tensor]) -> list[torch.nn.Parameter]:
        """Make parameters of the method's own, for ``init_adapter``: the user's optimiser finds them in the model.

        They live until the task ends; ``after_task`` puts what is to stay into ``state``. They are part of every
        checkpoint inside the task.

        Args:
            name: a word, apart for each call within a task.
            values: what they start from, on the layers' device: one a layer, or as many as the method likes.

        Returns:
            ``self.learned[name]``.
        """
        self.learned = {**self.learned, name: [torch.nn.Parameter(value.detach().clone()) for value in values]}
        return self.learned[name]

    def fresh(self, ranks: Sequence[int] | None = None) -> Factors:
        """An untrained LoRA from torch's default generator: A Kaiming uniform (a = √5, PEFT's default), B zero.

        Args:
            ranks: r of every layer; by default the adapter's present ones.
        """
        fresh = Factors()
        for n, layer in enumerate(self.layers):
            r = ranks[n] if ranks is not None else layer.A.shape[0]
            A = torch.empty(r, layer.A.shape[1], dtype=torch.float32)
            torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            fresh.A.append(A.to(layer.A.device, layer.A.dtype))
            fresh.B.append(torch.zeros(layer.B.shape[0], r, dtype=layer.B.dtype, device=layer.B.device))
        return fresh

    # -- hooks -----------------------------------------------------------------------------------------------------

    def trains(self, i: int) -> tuple[bool, bool]:
        """Whether (A, B) of the adapter are trained in task i."""
        return True, True

    def before_task(self, i: int, data: Batches | None) -> None:
        """See the task's data before its start is chosen."""

    def init_adapter(self, i: int) -> None:
        """Write the factors from which task i starts."""

    def forward_mod(self, step: int, inputs: Mapping[str, Any]) -> None:
        """Change how the layers compute in the coming training forward."""

    def loss_extra(self) -> Tensor | None:
        """A penalty on the parameters, or None. Differentiated once an optimiser step, whatever the accumulation."""
        return None

    def after_backward(self) -> None:
        """Change gradients just before the optimiser's step."""

    def after_step(self, step: int) -> None:
        """Change parameters just after the optimiser's step."""

    def after_task(self, i: int, data: Batches | None) -> None:
        """Merge: write the LoRA that is evaluated and shipped, and keep in ``state`` what the next task starts from."""

    def select(self, task: int | None) -> None:
        """Between tasks, install the routes of inference: those of ``task``, or without a task's label."""

    def inference_adapter(self, inputs: Mapping[str, Any]) -> None:
        """Choose how the layers compute for the coming inputs of a forward that trains nothing."""

    def shipped(self) -> Factors:
        """The result as one plain LoRA: exactly so if ``info.foldable``, else the nearest that the method has."""
        return self.current

    def merge_weight(self, i: int) -> float | None:
        """λ(i) of a method that merges with a weight."""
        return None

    def merged_terms(self, layer: Layer, index: int, i: int, weight: float | Tensor | None) -> BranchTerms:
        """The would-be merge of ``layer`` (at ``index`` of ``layers``) inside task i, as terms of one forward.

        The default is for methods whose merge is what they train: the adapter as it computes now.
        """
        if weight is not None:
            raise ValueError(f"method {self.name!r} merges without a weight; call merged_view() with none")
        return self.terms(layer) if self.terms else LoraTerms(layer.A, layer.B, layer.scale)

    # -- persistence -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """``state`` as flat named tensors; Factors and lists are spread as ``key.A.0``, ``key.B.0``, ``key.0``.

        Inside a task also what the method learns, as ``learned/name.0``.
        """
        flat = {f"{_LEARNED}{key}.{n}": p.detach() for key, ps in self.learned.items() for n, p in enumerate(ps)}
        return flat | spread(self.state)

    def state_tensors(self) -> list[Tensor]:
        """The tensors of ``state`` themselves; numbers, which ``state_dict`` makes tensors of, are left out."""
        return [t for name, t in self.state_dict().items() if not name.endswith(".number")]

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``; parameters that the method learns, which it must have made, take their values.

        Raises:
            ValueError: what is learned differs in names or shapes, or the rest is nothing that ``state_dict`` gives, or
                is not finite; nothing is changed.
        """
        learned = {n.removeprefix(_LEARNED): t for n, t in flat.items() if n.startswith(_LEARNED)}
        own = {f"{key}.{n}": p for key, ps in self.learned.items() for n, p in enumerate(ps)}
        if {n: t.shape for n, t in learned.items()} != {n: p.shape for n, p in own.items()}:
            raise ValueError(
                f"method {self.name!r} learns {sorted(own) or 'no parameters'} in this task, the checkpoint holds "
                f"{sorted(learned) or 'none'}; go on with the options that it was begun with"
            )
        try:
            state = gather({n: t for n, t in flat.items() if not n.startswith(_LEARNED)})
        except ValueError as error:
            raise ValueError(f"the state of method {self.name!r} is damaged: {error}; restore it from a copy") from None
        for name, parameter in own.items():
            parameter.data.copy_(learned[name])
        self.state = state

    def state_bytes(self) -> int:
        """Bytes that the method keeps beside the adapter."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def ahead_bytes(self) -> int:
        """Bytes that the method holds for the start of the next task, beside ``state`` and never saved."""
        return 0


def _alone(tensor: Tensor) -> Tensor:
    return tensor


_LEARNED = "learned/"
_METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known under ``method.name``; a class decorator.

    Raises:
        ValueError: another class has that name.
        TypeError: it is no such class, or has no name.
    """
    if not (isinstance(method, type) and issubclass(method, Method) and isinstance(getattr(method, "name", None), str)):
        raise TypeError(f"method: got {method!r}; pass a subclass of mbf.methods.Method with a name")
    known = _METHODS.setdefault(method.name, method)
    if known is not method:
        raise ValueError(
            f"method name {method.name!r} is taken by {known.__module__}.{known.__qualname__}; choose another"
        )
    return method


def available() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_METHODS)


def get(name: str) -> type[Method]:
    """The method's class.

    Raises:
        ValueError: no method has that name; the message lists those there are.
        TypeError: the name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}; pass the name of a method, one of {', '.join(available())}")
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method {name!r} is unknown{hint}; there are {', '.join(available())}")
    return _METHODS[name]
