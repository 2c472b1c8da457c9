"""Parameters that a method learns beside A and B, inside the model, where optimisers and wrappers look for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

NAME = "mbf_method"
"""The submodule's name. PEFT saves what has "lora_" in its name, so these stay out of adapter files."""


def attach(model: nn.Module, learned: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Register ``learned`` in ``model``; without any nothing is registered.

    Raises:
        ValueError: the model has a submodule of that name already.
    """
    if not learned:
        return
    if hasattr(model, NAME):
        raise ValueError(f"the model has {NAME!r} already: another learner is in a task; end or abandon that first")
    model.add_module(NAME, nn.ModuleDict({name: nn.ParameterList(values) for name, values in learned.items()}))


def detach(model: nn.Module, learned: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Undo ``attach`` of these; what another learner registered stays."""
    found = model._modules.get(NAME)
    ours = {id(parameter) for values in learned.values() for parameter in values}
    if found is not None and {id(parameter) for parameter in found.parameters()} == ours:
        del model._modules[NAME]
