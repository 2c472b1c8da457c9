"""A learner on disk: an adapter that plain PEFT loads, the method's state beside it, and a header with their sha256.

::

    adapter_config.json         PEFT's
    adapter_model.safetensors   PEFT's: the merged LoRA
    learner.safetensors         the method's state, e.g. (A_ft, B_ft) of SLAO
    learner.json                format, method, options, history, layers, sha256 of the others
"""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mbf.continual.atomic import recover_directory, sha256_of, whole_directory
from mbf.methods import Factors, available, get
from mbf.peft import AdapterLayer, adapter_layers, save_adapter, sync_config, whole_adapter
from mbf.peft.sharded import reshard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mbf.continual.learner import ContinualLora

FORMAT = "mbf-learner"
VERSION = 1
HEADER = "learner.json"
STATE = "learner.safetensors"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another format, or of another model."""


def save(learner: ContinualLora, directory: str | PathLike[str]) -> None:
    """Write ``learner`` to ``directory``, replacing an older checkpoint there in one step; the first process does."""
    reshard(learner.model)
    parameters = whole_adapter(learner.model, learner.adapter)
    if not learner.replicas.first:
        return
    with whole_directory(directory) as temporary:
        save_adapter(learner.model, learner.adapter, temporary, parameters)
        state = {name: t.detach().contiguous().cpu() for name, t in learner.method.state_dict().items()}
        save_file(state, temporary / STATE, metadata={"format": "pt"})
        options = learner.method.options.model_dump()
        header = {
            "format": FORMAT,
            "version": VERSION,
            "method": learner.method.name,
            "options": {k: v for k, v in options.items() if not callable(v)},
            "callable_options": sorted(k for k, v in options.items() if callable(v)),
            "adapter": learner.adapter,
            "history": [asdict(record) for record in learner.history],
            "layers": {layer.name: [*layer.A.shape, layer.B.shape[0], layer.scale] for layer in learner.layers},
            "sha256": {name: sha256_of(temporary / name) for name in (CONFIG, ADAPTER, STATE)},
        }
        (temporary / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


def export(learner: ContinualLora, directory: str | PathLike[str]) -> None:
    """Write what the method ships as an adapter for plain PEFT; the first process does. The learner stays as it is."""
    reshard(learner.model)
    method, kept = learner.method, learner.method.current.clone()
    try:
        with torch.no_grad():
            method.write(method.shipped())
        sync_config(learner.model, learner.adapter)
        parameters = whole_adapter(learner.model, learner.adapter)
        if learner.replicas.first:
            with whole_directory(directory) as temporary:
                save_adapter(learner.model, learner.adapter, temporary, parameters)
    finally:
        with torch.no_grad():
            method.write(kept)
        sync_config(learner.model, learner.adapter)


def load(
    cls: type[ContinualLora],
    model: nn.Module,
    directory: str | PathLike[str],
    fuse: bool,
    process_group: ProcessGroup | Literal[False] | None,
    options: dict[str, Any],
) -> ContinualLora:
    """Restore a learner; checks everything before it changes the model."""
    from mbf.continual.learner import TaskRecord

    root = Path(directory)
    recover_directory(root)
    header = read_header(root)
    missing = [k for k in header["callable_options"] if k not in options]
    if missing:
        raise CheckpointError(
            f"{root}: option {missing[0]!r} was a callable, which is not stored; pass load(..., {missing[0]}=...)"
        )
    method = get(header["method"])(**(header["options"] | options))
    state = _tensors(root / STATE)
    factors = _tensors(root / ADAPTER)
    adapter = header["adapter"]
    if adapter not in (getattr(model, "peft_config", None) or {}):
        model = _with_adapter(model, root, adapter)
    layers = adapter_layers(model, adapter)
    merged = _match(root, header["layers"], layers, factors)
    learner = cls(model, method, adapter, learnt=False, fuse=fuse, process_group=process_group)
    with torch.no_grad():
        method.write(merged)
    sync_config(model, adapter)
    method.load_state_dict({name: t.to(layers[0].A.device) for name, t in state.items()})
    learner.history = [TaskRecord(**record) for record in header["history"]]
    if learner.history:
        method.select(None)
    return learner


def read_header(root: Path) -> dict[str, Any]:
    """The checked header of a checkpoint.

    Raises:
        CheckpointError: no checkpoint, another format or a newer version, or a part whose sha256 differs.
    """
    path = root / HEADER
    if not path.is_file():
        raise CheckpointError(
            f"{root} holds no learner ({HEADER} is missing); pass a directory that learner.save wrote"
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a learner's header: format must be {FORMAT!r}")
    if header["version"] != VERSION:
        raise CheckpointError(f"{path} has version {header['version']}, this mbf reads {VERSION}; update mbf")
    if header["method"] not in available():
        raise CheckpointError(
            f"{path}: method {header['method']!r} is not registered here; mbf.methods.register it first"
        )
    for name, digest in header["sha256"].items():
        if not (root / name).is_file():
            raise CheckpointError(f"{root}: {name} is missing; restore it from a copy")
        if (found := sha256_of(root / name)) != digest:
            raise CheckpointError(f"{root / name} is damaged: sha256 is {found[:12]}…, the header says {digest[:12]}…")
    return header


def _with_adapter(model: nn.Module, root: Path, adapter: str) -> nn.Module:
    if isinstance(model, PeftModel):
        model.load_adapter(str(root), adapter, is_trainable=True)
        model.set_adapter(adapter)
        return model
    return PeftModel.from_pretrained(model, str(root), adapter_name=adapter, is_trainable=True)


def _match(root: Path, saved: dict[str, Any], layers: list[AdapterLayer], factors: dict[str, Tensor]) -> Factors:
    """The stored factors in the order of the model's layers, when every layer is there and fits."""
    wanted, found = set(saved), {layer.name for layer in layers}
    if wanted != found:
        odd = sorted(wanted ^ found)[0]
        raise CheckpointError(
            f"{root} adapts {len(wanted)} layers, the model's adapter {len(found)}; {odd} is only in "
            f"{'the checkpoint' if odd in wanted else 'the model'}: load into the model it was trained on"
        )
    merged = Factors()
    for layer in layers:
        A, B = (factors[f"{_peft_key(layer.name)}.lora_{f}.weight"] for f in "AB")
        if A.shape[1] != layer.A.shape[1] or B.shape[0] != layer.B.shape[0]:
            raise CheckpointError(
                f"{root}: {layer.name} is {B.shape[0]}×{A.shape[1]} there and {layer.B.shape[0]}×{layer.A.shape[1]} in "
                "the model; load into the model it was trained on"
            )
        if abs(layer.scale - saved[layer.name][3]) > 1e-6 * abs(layer.scale):
            raise CheckpointError(
                f"{root}: {layer.name} has scale {saved[layer.name][3]} there and {layer.scale} in the model's "
                "adapter; give both the same lora_alpha / r"
            )
        merged.A.append(A)
        merged.B.append(B)
    return merged


def _peft_key(name: str) -> str:
    return name if name.startswith("base_model.model.") else f"base_model.model.{name}"


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None
