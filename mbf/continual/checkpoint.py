"""A learner on disk: an adapter that plain PEFT loads, the method's state beside it, and a header with their sha256.

::

    adapter_config.json         PEFT's
    adapter_model.safetensors   PEFT's: the merged LoRA
    learner.safetensors         the method's state, e.g. (A_ft, B_ft) of SLAO
    learner.json                format, method, options, history, layers, state, sha256 of the others

Reading trusts none of it: the header is checked by itself (``Header.parse``), then the sha256 of the parts, then each
part against the header and the model; all before the model changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from mbf.continual.atomic import recover_directory, sha256_of, whole_directory
from mbf.continual.checks import check_keeps_split
from mbf.continual.header import (
    CARD,
    FORMAT,
    HEADER,
    PARTS,
    STATE,
    VERSION,
    CheckpointError,
    Header,
    check_state,
    described,
    read_header,
)
from mbf.continual.metrics import MALFORMED, first_error
from mbf.methods import Factors, Method, get
from mbf.peft import AdapterLayer, adapter_layers, is_fused, save_adapter, sync_config, unfuse, whole_adapter
from mbf.peft.sharded import reshard
from mbf.peft.stored import CONFIG, PREFIX, check_factors, read_config, read_tensors
from mbf.peft.stored import WEIGHTS as ADAPTER

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mbf.continual.learner import ContinualLora


def save(learner: ContinualLora, directory: str | PathLike[str]) -> None:
    """Write ``learner`` to ``directory``, replacing an older checkpoint there in one step; the first process does.

    Raises:
        ValueError: the directory holds something else than an adapter or a learner.
        OSError: it cannot be written; an older checkpoint there is whole.
    """
    reshard(learner.model)
    parameters = whole_adapter(learner.model, learner.adapter)
    if not learner.replicas.first:
        return
    with whole_directory(directory, CONFIG, {*PARTS, HEADER}, keep=(CARD,)) as temporary:
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
            "state": described(state),
            "sha256": {name: sha256_of(temporary / name) for name in PARTS},
        }
        (temporary / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


def export(learner: ContinualLora, directory: str | PathLike[str]) -> None:
    """Write what the method ships as an adapter for plain PEFT; the first process does. The learner stays as it is.

    Raises:
        ValueError: the directory holds something else than an adapter, or a learner; the result has another rank than
            an adapter whose ``init_lora_weights`` took a part out of W.
        OSError: it cannot be written; an older adapter there is whole.
    """
    reshard(learner.model)
    method, kept = learner.method, learner.method.current.clone()
    try:
        with torch.no_grad():
            shipped = method.shipped() if learner.history else method.current
            if [len(A) for A in shipped.A] != [len(A) for A in kept.A]:
                check_keeps_split(learner.model, learner.adapter, f"what {method.name!r} exports has another")
            method.write(shipped)
        sync_config(learner.model, learner.adapter)
        parameters = whole_adapter(learner.model, learner.adapter)
        if learner.replicas.first:
            with whole_directory(directory, CONFIG, (ADAPTER,), keep=(CARD,)) as temporary:
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
    method = _method(root, header, options)
    factors, state = _read_parts(root, header)
    _take_state(root, method, state)  # what is damaged shows before the model is touched
    adapter = header.adapter
    with _undone_on_error(model, adapter) as known:
        if not known:
            _check_base(root, header, model)
            model = _with_adapter(model, root, adapter)
        layers = adapter_layers(model, adapter)
        if not known:
            _as_stored(layers, factors)
        merged = _match(root, header.layers, layers, factors)
        learner = cls(model, method, adapter, learnt=False, fuse=fuse, process_group=process_group)
        with torch.no_grad():
            method.write(merged)
        sync_config(model, adapter)
        _take_state(root, method, _beside(layers, factors, state))
        learner.history = [TaskRecord(**record.model_dump()) for record in header.history]
        if learner.history:
            _select(root, learner)
    return learner


def _method(root: Path, header: Header, options: Mapping[str, Any]) -> Method:
    if missing := [name for name in header.callable_options if name not in options]:
        raise CheckpointError(
            f"{root}: option {missing[0]!r} was a callable, which is not stored; pass load(..., {missing[0]}=...)"
        )
    known, merged = get(header.method), {**header.options, **options}
    try:
        known.Options.model_validate(merged)  # not yet as keyword arguments: an option might be called "self"
        return known(**merged)
    except MALFORMED as error:
        found = error.errors() if isinstance(error, ValidationError) else []
        if set(options) & {str(one["loc"][0]) for one in found if one["loc"]}:  # not the file's, the caller's
            raise
        raise CheckpointError(
            f"{root / HEADER}: options of {header.method}: {first_error(error)}; load it with the mbf that wrote it"
        ) from None


def _read_parts(root: Path, header: Header) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(A, B) by PEFT's name of the layer, and the method's state; both finite, and as the header says."""
    try:
        factors = check_factors(read_tensors(root / ADAPTER), read_config(root), root / ADAPTER)
        state = read_tensors(root / STATE)
        check_state(state, header, root / STATE)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    stored = {name: [A.shape[0], A.shape[1], B.shape[0]] for name, (A, B) in factors.items()}
    said = {_peft_key(name): layer[:3] for name, layer in header.layers.items()}
    if odd := sorted(name for name in stored.keys() | said.keys() if stored.get(name) != said.get(name)):
        raise CheckpointError(
            f"{root}: {odd[0]} has [r, d_in, d_out] {stored.get(odd[0], 'missing')} in {ADAPTER} and "
            f"{said.get(odd[0], 'missing')} in {HEADER}; restore both from a copy"
        )
    return factors, state


def _check_base(root: Path, header: Header, model: nn.Module) -> None:
    """Raise CheckpointError unless the base model has every layer of the checkpoint, as wide as it was."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base.named_modules())
    for name, (_, d_in, d_out, _) in header.layers.items():
        module = modules.get(name.removeprefix(PREFIX))
        if module is None:
            raise CheckpointError(
                f"{root} adapts {name}, which the model has not; load into the model it was trained on"
            )
        found = getattr(module, "out_features", d_out), getattr(module, "in_features", d_in)
        if found != (d_out, d_in):
            raise CheckpointError(
                f"{root}: {name} is {d_out}×{d_in} there and {found[0]}×{found[1]} in the model; load into the model "
                "it was trained on"
            )


@contextmanager
def _undone_on_error(model: nn.Module, adapter: str) -> Iterator[bool]:
    """Yield whether the model has the adapter; an exception leaves the model with what it had, as it was."""
    known = adapter in (getattr(model, "peft_config", None) or {})
    fused, trained = is_fused(model), [(p, p.requires_grad) for p in model.parameters()]
    active = (model.active_adapter, list(model.active_adapters)) if isinstance(model, PeftModel) else ("", [])
    layers = adapter_layers(model, adapter) if known else []
    injected = _injected(model)
    values = [layer.values() for layer in layers]
    kept = Factors([A for A, _ in values], [B for _, B in values]).clone()
    try:
        yield known
    except BaseException:
        for layer in layers:
            layer.route(None)
        if not fused and is_fused(model):
            unfuse(model)
        for layer, A, B in zip(layers, kept.A, kept.B, strict=True):
            layer.write(A, B)
        if known:
            sync_config(model, adapter)
        elif isinstance(model, PeftModel) and adapter in model.peft_config:
            model.set_adapter(active[0])
            tuner: Any = model.base_model
            tuner.set_adapter(active[1])  # which several may be
            model.delete_adapter(adapter)
        elif not isinstance(model, PeftModel):
            _take_out(model, adapter, injected)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


@dataclass(frozen=True)
class _Injected:
    """What a model had of PEFT's: its configurations, and by layer the adapters that are active."""

    dictionary: dict[str, Any] | None
    configs: dict[str, Any]
    active: dict[Any, list[str]]


def _injected(model: nn.Module) -> _Injected:
    configs = model.__dict__.get("peft_config")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return _Injected(configs, dict(configs or {}), {layer: list(layer.active_adapters) for layer in layers})


def _take_out(base: nn.Module, adapter: str, before: _Injected) -> None:
    """Undo PEFT's injection of ``adapter`` into a base model that had ``before``."""
    for name, module in list(base.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        if module in before.active:
            module.delete_adapter(adapter)
            module.set_adapter(before.active[module])
        else:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())
    base.__dict__.pop("peft_config", None)
    if before.dictionary is not None:  # PEFT goes on with the one that it finds
        before.dictionary.clear()
        before.dictionary.update(before.configs)
        base.__dict__["peft_config"] = before.dictionary


def _take_state(root: Path, method: Method, state: Mapping[str, Tensor]) -> None:
    try:
        method.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"{root / STATE}: {error}") from None


def _select(root: Path, learner: ContinualLora) -> None:
    method = learner.method
    try:
        method.select(None)
    except Exception as error:  # whatever a method trips over in a state that is none of its own
        learner._inference.detach()
        raise CheckpointError(
            f"{root / STATE}: method {method.name!r} cannot go on from what it holds ({type(error).__name__}: "
            f"{error}); restore it from a copy"
        ) from None


def _with_adapter(model: nn.Module, root: Path, adapter: str) -> nn.Module:
    if isinstance(model, PeftModel):
        model.load_adapter(str(root), adapter, is_trainable=True)
        model.set_adapter(adapter)
        return model
    return PeftModel.from_pretrained(model, str(root), adapter_name=adapter, is_trainable=True)


def _as_stored(layers: list[AdapterLayer], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """The dtype of the file, which PEFT widens in loading."""
    for layer in layers:
        stored = factors.get(_peft_key(layer.name))
        for parameter, kept in zip((layer.A, layer.B), stored or (), strict=False):
            parameter.data = parameter.data.to(kept.dtype)


def _beside(
    layers: list[AdapterLayer], factors: Mapping[str, tuple[Tensor, Tensor]], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state on the adapter's device, what was of the stored adapter's half type in the type that it now has."""
    A, stored = layers[0].A, next(iter(factors.values()))[0].dtype
    halves = (torch.bfloat16, torch.float16)
    return {n: t.to(A) if t.dtype is stored and stored in halves else t.to(A.device) for n, t in state.items()}


def _match(
    root: Path,
    saved: Mapping[str, list[int | float]],
    layers: list[AdapterLayer],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> Factors:
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
        A, B = factors[_peft_key(layer.name)]
        if A.shape[1] != layer.A.shape[1] or B.shape[0] != layer.B.shape[0]:
            raise CheckpointError(
                f"{root}: {layer.name} is {B.shape[0]}×{A.shape[1]} there and {layer.B.shape[0]}×{layer.A.shape[1]} in "
                "the model; load into the model it was trained on"
            )
        if torch.promote_types(A.dtype, layer.A.dtype) != layer.A.dtype:
            raise CheckpointError(
                f"{root}: {layer.name} is {A.dtype} there and {layer.A.dtype} in the model's adapter, which would "
                f"round it; load into an adapter of {A.dtype}"
            )
        if not math.isclose(layer.scale, saved[layer.name][3], rel_tol=1e-6):
            raise CheckpointError(
                f"{root}: {layer.name} has scale {saved[layer.name][3]} there and {layer.scale} in the model's "
                "adapter; give both the same lora_alpha / r"
            )
        merged.A.append(A)
        merged.B.append(B)
    return merged


def _peft_key(name: str) -> str:
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"
