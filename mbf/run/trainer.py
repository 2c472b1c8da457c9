"""``transformers.Trainer`` for one or several processes, with a replica each (DDP) or one model in parts (FSDP2).

Whatever their number, they take the rows of a single process, batch by batch, and write the checkpoints of one: a
checkpoint resumes on any number of processes, replicated or sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file
from torch.utils._pytree import tree_map
from torch.utils.data import Sampler
from transformers import Trainer

from mbf.continual.atomic import writing
from mbf.peft import adapter_layers, save_adapter, whole_adapter
from mbf.peft.sharded import is_sharded, like_shard, reshard, whole
from mbf.run.processes import Processes

ADAPTER = "default"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names


class SharedOrder(Sampler[int]):
    """The order in which a single process takes ``rows`` rows, then indices of padding up to ``length``."""

    def __init__(self, rows: int, length: int) -> None:
        self._rows = SeedableRandomSampler(range(rows))  # as accelerate makes of Trainer's own
        self._padding = range(rows, length)

    def __len__(self) -> int:
        return len(self._rows) + len(self._padding)

    def __iter__(self) -> Iterator[int]:
        yield from self._rows
        yield from self._padding

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)


class RunTrainer(Trainer):
    """Trains a PEFT model; see the module.

    Args:
        processes: those of the run.
        rows: training examples.
        batch_size: of all processes together.
        padding: an example without an answer, which adds nothing to the loss; fills the last batch.
        check: called with the loss of every optimiser step when its gradients are there, before they are clipped.
        **options: Trainer's own.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        processes: Processes,
        rows: Sequence[Mapping[str, list[int]]],
        batch_size: int,
        padding: Mapping[str, list[int]],
        check: Callable[[torch.Tensor], None],
        **options: Any,
    ) -> None:
        self._processes = processes
        self._check = check
        self._losses: list[torch.Tensor] = []
        missing = -len(rows) % batch_size if processes.size > 1 else 0
        self._order = len(rows), len(rows) + missing
        super().__init__(model, args, train_dataset=[*rows, *[padding] * missing], **options)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._processes.sharded:  # torch reduces the gradients; DDP around it would do so again
            self.accelerator.prepare_model = lambda model, **_: model

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._processes.size == 1:
            return super()._get_train_sampler(train_dataset)
        return SharedOrder(*self._order)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            total, self._losses = torch.stack(self._losses).sum(), []
            self._check(total)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")):
            super()._save_checkpoint(model, trial)

    # -- checkpoints of a sharded model: gathered, and written as a single process writes them ----------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._processes.sharded:
            super().save_model(output_dir, _internal_call)
            return
        reshard(self.model)
        parameters = whole_adapter(self.model, ADAPTER)
        if self.args.should_save:
            save_adapter(self.model, ADAPTER, str(output_dir or self.args.output_dir), parameters)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._processes.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = tree_map(lambda t: whole(t) if isinstance(t, torch.Tensor) else t, self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._processes.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        for layer in adapter_layers(self.model, ADAPTER):
            A, B = (stored[f"base_model.model.{layer.name}.lora_{factor}.weight"] for factor in "AB")
            layer.write(A, B)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._processes.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, entries in state["state"].items():
            parameter = parameters[index]
            for name, value in entries.items():
                if value.shape == parameter.shape and is_sharded(parameter):
                    entries[name] = like_shard(parameter, value)
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))
