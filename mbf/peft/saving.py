"""One adapter in PEFT's own files, in the directory itself whatever the adapter's name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from mbf.peft.config import find_home
from mbf.peft.sharded import is_sharded, whole

_PREFIX = "base_model.model."


def whole_adapter(model: nn.Module, adapter: str) -> dict[str, Tensor] | None:
    """The adapter's parameters by name, where FSDP2 shards them: gathered, so call it on all processes. Else None."""
    home = None if isinstance(model, PeftModel) else find_home(model, adapter)
    root = model if home is None else home.root
    named = {
        name: parameter
        for name, parameter in root.named_parameters()
        if ".lora_" in name and adapter in name.split(".")
    }
    if not any(map(is_sharded, named.values())):
        return None
    return {name: whole(parameter) for name, parameter in named.items()}


def save_adapter(
    model: nn.Module,
    adapter: str,
    directory: str | PathLike[str],
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` so that ``PeftModel.from_pretrained`` loads them.

    ``PeftModel.save_pretrained`` puts every adapter but "default" into a folder of its name, and a model with injected
    adapters has no such method; here both end in ``directory``.

    Raises:
        ValueError: the model has no configuration for ``adapter``.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(
            str(target), selected_adapters=[adapter], save_embedding_layers=False, state_dict=parameters
        )
        nested = target / adapter
        if adapter != "default" and nested.is_dir():
            for file in nested.iterdir():
                shutil.move(str(file), target / file.name)
            nested.rmdir()
        return
    home = find_home(model, adapter)
    if home is None:
        raise ValueError(
            f"adapter {adapter!r} has no LoraConfig in the model; add it with PEFT so that it can be saved"
        )
    tensors = get_peft_model_state_dict(
        home.root, state_dict=parameters, adapter_name=adapter, save_embedding_layers=False
    )
    named = {k if k.startswith(_PREFIX) else _PREFIX + k: t.detach().contiguous().cpu() for k, t in tensors.items()}
    save_file(named, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(home.config)
    config.inference_mode = True
    config.save_pretrained(str(target))
