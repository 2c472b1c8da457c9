"""ContinualLora: takes a PEFT model through tasks, one after another, by the rules of a method."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mbf.continual import checkpoint, own_parameters
from mbf.continual.checks import (
    TaskError,
    check_can_adopt,
    check_can_begin,
    check_data,
    check_finite,
    check_finite_parameters,
    check_gains,
    check_keeps_split,
    check_max_norm,
    check_name,
    check_same,
    check_step,
    check_steps,
    check_task_name,
    check_weight,
    warn_of_untrained,
)
from mbf.continual.hooks import TrainingHooks
from mbf.continual.replicas import Replicas
from mbf.methods import Batches, Factors, Method, get
from mbf.peft import AdapterLayer, adapter_layers, is_fused, sync_config
from mbf.peft import fuse as fuse_layers
from mbf.peft.base_weight import unpack
from mbf.peft.sharded import reshard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("mbf")

MAX_NORM = 1000.0


@dataclass(frozen=True)
class TaskRecord:
    """A task that was learnt: its number (from 1), its name, optimiser steps seen and seconds taken."""

    index: int
    name: str
    steps: int
    seconds: float


@dataclass
class _Active:
    """The task in progress, and all that is needed to undo it."""

    name: str
    index: int
    data: Batches | None
    merged: Factors
    state: dict[str, Any]
    trained: list[tuple[bool, bool]]
    hooks: TrainingHooks
    began: float


class ContinualLora:
    """One LoRA that learns task after task.

    Args:
        model: a PEFT model, or any model with injected PEFT LoRA layers.
        method: a name of ``mbf.methods.available()``, or a ``Method``.
        adapter: the PEFT adapter that learns.
        learnt: name for the task that the adapter has learnt already. By default an adapter with a non-zero B counts
            as trained and enters as task 1 under the name ``"before"``; False says that it is only an initialisation.
        fuse: have the model compute by mbf's operators, as ``mbf.fuse(model)`` does, unless it is fused already.
            ``mbf.unfuse(model)`` undoes it; False leaves the model as it is.
        process_group: the processes that train this adapter together (DDP, FSDP2); default all of torch.distributed,
            if it is in use. Each of them must make the learner and begin and end every task; all get the adapter of
            the first. False for processes that train adapters of their own.
        max_norm: a task is refused where s·‖B A‖_F of a layer, trained or merged, is above ``max_norm``·√d_out, which
            needs neither W nor B A: that is the RMS of what the adapter adds to an output where the RMS of the input
            is 1. Base weights have about 1 to 10, adapters less; one that diverged soon has millions. None: no limit.
        **options: the method's options.

    Raises:
        ValueError: unknown method, ``max_norm`` not above 0, or an adapter whose name no checkpoint can hold (dot,
            slash, space), that no merge rule covers (DoRA, lora_bias, modules_to_save, ...), or whose
            ``init_lora_weights`` takes a part out of W ("pissa", "olora", ...) with a method that changes the rank.
        TypeError: ``learnt`` is neither a string, False nor None; ``max_norm`` neither a number nor None.
        pydantic.ValidationError: unknown or wrong options.

    Between tasks the adapter *is* the merged LoRA: evaluate it, ``save_pretrained`` it, push it; but for ``mora``,
    ``lilora``, ``sapt`` and ``amlora``, which compute more than one LoRA's A and B, plain PEFT needs ``export``. Inside
    a task it is the LoRA in training. A task that raises, or ends with a non-finite adapter, is undone.

    >>> learner = mbf.ContinualLora(model, method="slao")
    >>> for name, loader in tasks.items():
    ...     with learner.task(name):
    ...         train(model, loader)
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method = "slao",
        adapter: str = "default",
        *,
        learnt: str | Literal[False] | None = None,
        fuse: bool = True,
        process_group: ProcessGroup | Literal[False] | None = None,
        max_norm: float | None = MAX_NORM,
        **options: Any,
    ) -> None:
        check_max_norm(max_norm)
        check_name(adapter)
        if learnt is not None and learnt is not False:
            check_task_name(learnt, "learnt")
        if isinstance(method, Method) and options:
            raise ValueError(
                f"options {sorted(options)} come with a method that is built already; pass its name instead"
            )
        self.model = model
        self.adapter = adapter
        self.layers: list[AdapterLayer] = adapter_layers(model, adapter)
        self.method = method if isinstance(method, Method) else get(method)(**options)
        if self.method.changes_rank:
            check_keeps_split(model, adapter, f"method {self.method.name!r} changes the rank")
        self.method.layers, self.method.model = self.layers, model
        if fuse and not is_fused(model):
            logger.info("%s", str(fuse_layers(model)).splitlines()[0])
        self.max_norm = max_norm
        self.replicas = Replicas(process_group)
        self.method.total = self.replicas.total
        self.history: list[TaskRecord] = []
        self._active: _Active | None = None
        self._warned = False
        if learnt or (learnt is None and any(bool(B.count_nonzero()) for B in self.method.current.B)):
            self._adopt(learnt or "before")
        self._inference = TrainingHooks.for_inference(self)

    def __repr__(self) -> str:
        now = f"in task {self.task_index} {self._active.name!r}" if self._active else f"{len(self.history)} learnt"
        return f"ContinualLora({self.method.name}, adapter={self.adapter!r}, {len(self.layers)} layers, {now})"

    @property
    def task_index(self) -> int:
        """Number of the task in progress, else of the last one learnt; 0 before the first."""
        return self._active.index if self._active else len(self.history)

    @property
    def in_task(self) -> bool:
        """Whether a task is in progress."""
        return self._active is not None

    @property
    def current_task(self) -> str | None:
        """Name of the task in progress, if any."""
        return self._active.name if self._active else None

    # -- a task --------------------------------------------------------------------------------------------------------

    @contextmanager
    def task(self, name: str, data: Batches | None = None, steps: int | None = None) -> Iterator[ContinualLora]:
        """Learn a task inside the block: begin, train, end. An exception undoes the task and passes on.

        A block that ended or abandoned the task itself is left as it is.

        Args:
            name: what the task is called in history and errors.
            data: batches of the task, as for ``begin_task``.
            steps: optimiser steps that the training will take, as for ``begin_task``.
        """
        self.begin_task(name, data, steps)
        active = self._active
        try:
            yield self
        except BaseException as error:
            if self._active is not None:  # the block may have ended or abandoned it
                task = f"task {self._active.index} {self._active.name!r}"
                note = f"{task} was abandoned; the merged LoRA is as it was before it"
                self.abandon_task()
                logger.warning("%s (%s)", note, type(error).__name__)
                if hasattr(error, "add_note"):
                    error.add_note(note)
            raise
        if self._active is active:
            self.end_task()

    def begin_task(self, name: str, data: Batches | None = None, steps: int | None = None) -> None:
        """Write the task's starting LoRA into the adapter. Build the optimiser after this: parameters may be replaced.

        Args:
            name: what the task is called in history and errors.
            data: batches of the task, for methods that take statistics of it, before it and at its end; others ignore
                it. A list, a DataLoader or the like, which can be gone through more than once.
            steps: optimiser steps that the training will take, for methods with a schedule (``codyra``).

        Raises:
            TaskError: a task is in progress, the adapter is inactive or merged into W, the method needs ``data`` that
                is missing or an iterator, or does what parameters sharded by FSDP2 cannot.
            TypeError: the name is no string, or ``steps`` no integer.
            ValueError: ``steps`` is less than 1, or the method needs them and can't take them from ``data``.
        """
        i = len(self.history) + 1
        reshard(self.model)
        check_can_begin(self, name, i, data)
        check_steps(steps)
        unpack(self.model)
        self.method.route(None)
        self._share()
        self.method.merged = self.method.current.clone()
        self._active = _Active(
            name=name,
            index=i,
            data=data,
            merged=self.method.merged,
            state=dict(self.method.state),
            trained=[(layer.A.requires_grad, layer.B.requires_grad) for layer in self.layers],
            hooks=TrainingHooks(self),
            began=time.perf_counter(),
        )
        try:
            with self.replicas.same_randomness(self._device):
                self.method.steps = steps
                self.method.before_task(i, data)
                with torch.no_grad():
                    self.method.init_adapter(i)
            own_parameters.attach(self.model, self.method.learned)
            self._share()
            sync_config(self.model, self.adapter)
            trains_A, trains_B = self.method.trains(i)
            for layer in self.layers:
                layer.A.requires_grad_(trains_A)
                layer.B.requires_grad_(trains_B)
                layer.A.grad = layer.B.grad = None  # of the last task's end, which no step of this one is to take
            self._active.hooks.attach()
        except BaseException:
            self.abandon_task()
            raise

    def continue_task(self, method_state: Mapping[str, Tensor], steps: int) -> None:
        """Put the task in progress where a checkpoint of its training was taken, right after ``begin_task``.

        Restores what learner and method keep; the adapter, optimiser and random state are the loop's to restore.

        Args:
            method_state: ``method.state_dict()`` at the checkpoint.
            steps: optimiser steps taken by then.
        """
        active = self._require_active("continue_task")
        self.method.load_state_dict(method_state)
        active.hooks.steps = steps

    def check_step(self, loss: Tensor | float | None = None) -> None:
        """Refuse the task in progress now if the loss or a gradient has inf or NaN; for loops, before they clip.

        The gradients are checked before every optimiser step in any case. But clipping spreads what is bad over all of
        them, and the loss is the loop's. Of several processes each must call this, and all decide alike. Not for
        gradients that a GradScaler has scaled: it skips such steps.

        Args:
            loss: a number; None leaves it out.

        Raises:
            DivergedError: names the task, the step, and the loss or the first layer with its values. The task is still
                in progress; leaving ``task`` by the error undoes it.
        """
        active = self._require_active("check_step")
        check_step(self, active.hooks.steps + 1, loss, together=True)
        active.hooks.checked = active.hooks.steps

    def end_task(self, data: Batches | None = None) -> None:
        """Merge what was learnt: afterwards the adapter is the merged LoRA.

        Args:
            data: other batches than those that ``begin_task`` was given.

        Raises:
            NonFiniteAdapterError: the trained or the merged LoRA has inf or NaN; the task is undone.
            DivergedError: it is larger than ``max_norm`` allows; the task is undone.
            TaskError: no task is in progress; the method needs ``data``, and it is an iterator (the task is still in
                progress); or the processes that train together hold different adapters, and the task is undone.
        """
        active = self._require_active("end_task")
        data = active.data if data is None else data
        check_data(self.method, data)
        reshard(self.model)
        try:
            active.hooks.settle()
            trained, what = self.method.current, f"task {active.index} {active.name!r} left"
            check_same(self, trained, what)
            check_finite(self, trained, what)
            check_gains(self, trained, what)
            del trained
            warn_of_untrained(self, active.hooks.steps, active.hooks.held)
            check_finite_parameters(self, what)
            active.hooks.detach()
            self.method.route(None)
            with torch.no_grad(), self.replicas.same_randomness(self._device):
                self.method.after_task(active.index, data)
            self._forget_learned()
            self._share()
            merged, what = self.method.current, f"merging task {active.index} {active.name!r} gave"
            check_finite(self, merged, what)
            check_gains(self, merged, what)
            del merged
            self.method.select(None)
        except BaseException:
            self.abandon_task()
            raise
        sync_config(self.model, self.adapter)
        self._restore_requires_grad(active)
        seconds = time.perf_counter() - active.began
        self.history.append(TaskRecord(active.index, active.name, active.hooks.steps, seconds))
        self._active, self.method.merged = None, Factors()

    def abandon_task(self) -> None:
        """Undo the task in progress: the adapter and the method's state are again what they were before it.

        Gradients of the adapter are dropped, as they may be what was wrong with it.
        """
        active = self._require_active("abandon_task")
        active.hooks.detach()
        self.method.route(None)
        self._forget_learned()
        self.method.state = active.state
        with torch.no_grad():
            self.method.write(active.merged)
        for layer in self.layers:
            layer.A.grad = layer.B.grad = None
        sync_config(self.model, self.adapter)
        self._restore_requires_grad(active)
        self._active, self.method.merged = None, Factors()
        if self.history:
            self.method.select(None)

    def select_task(self, name: str | None) -> None:
        """Compute with what a method keeps for one task (``share``, ``lilora``), until the next call or task.

        Methods without such parts compute alike for every task, and nothing changes.

        Args:
            name: of a task in ``history``, the last of that name; None computes as without a task's label.

        Raises:
            TaskError: a task is in progress.
            ValueError: no task of that name was learnt.
        """
        if self._active is not None:
            raise TaskError(f"task {self._active.name!r} is in progress; end or abandon it before select_task")
        index = {record.name: record.index for record in self.history}
        if name is not None and name not in index:
            raise ValueError(f"no task {name!r} was learnt; there are {', '.join(map(repr, index)) or 'none'}")
        if self.history:
            self.method.select(None if name is None else index[name])

    @contextmanager
    def merged_view(self, weight: float | Tensor | None = None) -> Iterator[nn.Module]:
        """The model computes with the would-be merge of the task in progress; nothing is written.

        Args:
            weight: λ, a float or a 0-d tensor (which may require grad: the forward is differentiable in it). None is
                the method's own λ(i). Only for methods that merge with a weight.

        Raises:
            TaskError: ``weight`` is given outside a task, where there is nothing left to merge.
            TypeError: ``weight`` is neither a number nor a tensor.
            ValueError: ``weight`` is a tensor of other than 0 dimensions, or the method merges without one.
        """
        check_weight(weight)
        if self._active is None:
            if weight is not None:
                raise TaskError(
                    "merged_view(weight) needs a task in progress: between tasks the merge is written already; call it "
                    "inside of learner.task, or without a weight"
                )
            yield self.model
            return
        method, i = self.method, self._active.index
        index = {layer.name: n for n, layer in enumerate(self.layers)}
        weight = method.merge_weight(i) if weight is None else weight
        if weight is not None and not isinstance(weight, Tensor):
            weight = torch.tensor(weight, dtype=torch.float64)  # a float would be a constant of a compiled graph
        method.merged_terms(self.layers[0], 0, i, weight)  # a method without a weight says so before anything changes
        try:
            for layer in self.layers:
                layer.route(
                    lambda layer: method.merged_terms(layer, index[layer.name], i, weight),
                    own_operator=method.own_operator,
                )
            yield self.model
        finally:
            method.route(method.terms)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the learner, atomically: the adapter as PEFT stores it, and beside it the method's state.

        Of several processes the first writes; where the model is sharded, all must call this. Nobody waits for the
        files: put a barrier between this and reading them on another process.

        Warns:
            UserWarning: once a learner, of a method whose layers compute something else than the adapter's (A, B):
                ``load`` goes on from what is saved, and ``export`` writes what is for plain PEFT.

        Raises:
            TaskError: a task is in progress.
        """
        if self._active is not None:
            raise TaskError(
                f"task {self._active.index} {self._active.name!r} is in progress; end or abandon it before saving"
            )
        if type(self.method).shipped is not Method.shipped and not self._warned:
            self._warned = True
            warnings.warn(
                f"method {self.method.name!r} computes something else than the adapter that is saved: "
                "ContinualLora.load goes on from it, but plain PEFT would load another function; write what is for "
                "plain PEFT by learner.export",
                stacklevel=2,
            )
        checkpoint.save(self, directory)

    @classmethod
    def load(
        cls,
        model: nn.Module,
        directory: str | PathLike[str],
        *,
        fuse: bool = True,
        process_group: ProcessGroup | Literal[False] | None = None,
        max_norm: float | None = MAX_NORM,
        **options: Any,
    ) -> ContinualLora:
        """Restore a learner that ``save`` wrote.

        Args:
            model: the base model, which gets the adapter, or a model that has it already (of any rank).
            directory: where it was saved.
            fuse: as in ``ContinualLora``.
            process_group: as in ``ContinualLora``; the number of processes may be another one.
            max_norm: as in ``ContinualLora``; it is not stored.
            **options: values for options that cannot be stored (a callable schedule).

        Raises:
            checkpoint.CheckpointError: missing, damaged or foreign files, or another model; nothing has changed then.
        """
        check_max_norm(max_norm)
        learner = checkpoint.load(cls, model, directory, fuse, process_group, options)
        learner.max_norm = max_norm
        return learner

    def export(self, directory: str | PathLike[str]) -> None:
        """Write the result as an adapter for plain PEFT; the learner stays as it is.

        That is what ``save_pretrained`` writes, except for methods whose layers compute more than the adapter's
        (A, B): their result is folded into a plain LoRA here, of whatever rank that takes, or approximated by one where
        ``method.info.foldable`` is false. Processes and files are as for ``save``.

        Raises:
            TaskError: a task is in progress.
            ValueError: the result has another rank than an adapter whose ``init_lora_weights`` took a part out of W.
        """
        if self._active is not None:
            raise TaskError(f"task {self._active.index} {self._active.name!r} is in progress; end or abandon it first")
        checkpoint.export(self, directory)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that are held between tasks: ``adapter`` (A and B), ``state`` (all else the method keeps), and
        ``ahead``: what was computed for the start of the next task already and is not saved (``slao``'s next A)."""
        adapter = sum(p.numel() * p.element_size() for layer in self.layers for p in (layer.A, layer.B))
        return {"adapter": adapter, "state": self.method.state_bytes(), "ahead": self.method.ahead_bytes()}

    # -- checks --------------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.layers[0].A.device

    def _share(self) -> None:
        """Give every process the adapter and the method's state of the first."""
        if self.replicas.size == 1:
            return
        # Parts of a sharded adapter are nobody else's; their values were computed alike everywhere.
        tensors = [t.data for layer in self.layers if not layer.sharded for t in (layer.A, layer.B)]
        self.replicas.share([*tensors, *self.method.state_tensors()], self._device)

    def _forget_learned(self) -> None:
        own_parameters.detach(self.model, self.method.learned)
        self.method.learned = {}

    def _adopt(self, name: str) -> None:
        check_can_adopt(self)
        check_finite(self, self.method.current, "the adapter given as already trained has")
        self.method.merged = self.method.current.clone()
        with torch.no_grad(), self.replicas.same_randomness(self._device):
            self.method.after_task(1, None)
        self._forget_learned()
        self.method.merged = Factors()
        self._share()
        sync_config(self.model, self.adapter)
        self.history.append(TaskRecord(1, name, 0, 0.0))
        self.method.select(None)

    def _require_active(self, caller: str) -> _Active:
        if self._active is None:
            raise TaskError(f"{caller}: no task is in progress; call begin_task(name) first")
        return self._active

    def _restore_requires_grad(self, active: _Active) -> None:
        for layer, (A, B) in zip(self.layers, active.trained, strict=True):
            layer.A.requires_grad_(A)
            layer.B.requires_grad_(B)
