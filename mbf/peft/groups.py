"""Layers that read the same x, as q, k and v of an attention block do: computed by one ``lora_group``.

``fuse`` gives the module around such layers, say a ``LlamaAttention``, a class that is its own but for the forward,
which opens a ``Sharing`` and then runs the module's own forward. The first layer called in there computes the others'
outputs along with its own, and each of them hands out what waits for it when it is called with the very same x.
Nothing outlives the forward of the module around, and outside of it every layer computes alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mbf.ops import lora_group

# transformers' packages, and what the names of their classes begin with.
_FAMILIES = {
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}


def family_classes(suffix: str) -> frozenset[tuple[str, str]]:
    """Module and name of every family's class with this suffix."""
    return frozenset((f"transformers.models.{f}.modeling_{f}", name + suffix) for f, name in _FAMILIES.items())


ATTENTIONS = family_classes("Attention")
MLPS = family_classes("MLP")


def listed(kind: type, classes: frozenset[tuple[str, str]]) -> bool:
    """Whether ``kind`` is one of the classes, told by its names alone, so that transformers need not be imported."""
    return (kind.__module__, kind.__qualname__) in classes


# -- one forward of the module around ----------------------------------------------------------------------------------


class Sharing:
    """The outputs that wait for the layers of one module, during one forward of it.

    Args:
        members: the layers, ``FusedLinear`` or not; those of another class than the one called are left alone.
    """

    def __init__(self, members: Iterable[Any]) -> None:
        self._uncalled: dict[Any, None] = dict.fromkeys(members)
        self._x: Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self._waiting: dict[Any, tuple[tuple[Any, ...], list[Any], Tensor]] = {}

    def output(self, member: Any, x: Tensor) -> Tensor | None:
        """The output of ``member`` at x, computed with the others' or waiting since one of them was; None: compute it.

        What waits is handed out only if x is the same object in the same state, and the layer's adapter, weights and
        dropout are what it was computed with. A layer that is called again in the same forward computes alone.
        """
        if member not in self._uncalled:
            return None
        del self._uncalled[member]
        # An inference tensor has no version by which a change of x between two calls would be seen.
        adapter = None if x.is_inference() else member.sole_adapter(x)
        if self._x is x and self._state == _state(x):
            return self._handed_out(member, adapter)
        self._x = None
        self._waiting.clear()
        return None if adapter is None else self._together(member, adapter, x)

    def _together(self, member: Any, adapter: str, x: Tensor) -> Tensor | None:
        found = {other: other.sole_adapter(x) for other in self._uncalled if type(other) is type(member)}
        others = {other: adapter for other, adapter in found.items() if adapter is not None}
        if not others:
            return None
        sources = [other.sources(adapter) for other, adapter in others.items()]
        seen, state = [*map(_seen, sources)], _state(x)
        joined = [(member, adapter), *others.items()]
        y, *ys = lora_group(x, [layer.group_layer(adapter) for layer, adapter in joined])
        self._x, self._state = x, state
        self._waiting = dict(zip(others, zip(sources, seen, ys, strict=True), strict=True))
        return y

    def _handed_out(self, member: Any, adapter: str | None) -> Tensor | None:
        waiting = self._waiting.pop(member, None)
        if not self._waiting:
            self._x = None
        if waiting is None or adapter is None:
            return None
        _, seen, y = waiting
        return y if seen == _seen(member.sources(adapter)) else None


def _seen(sources: tuple[Any, ...]) -> list[Any]:
    """What a change of the sources would change: tensors by identity, version and flag, everything else by value."""
    return [
        (id(source), -1 if source.is_inference() else source._version, source.requires_grad)
        if isinstance(source, Tensor)
        else source
        for source in sources
    ]


def _state(x: Tensor) -> tuple[Any, ...]:
    """What of x and its surroundings an output depends on."""
    device = x.device.type
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


class _Current(threading.local):
    sharing: Sharing | None = None


_current = _Current()


def shared_output(member: nn.Module, x: Tensor) -> Tensor | None:
    """``Sharing.output`` of the forward that runs around ``member``, None where there is none."""
    sharing = _current.sharing
    return None if sharing is None else sharing.output(member, x)


# -- the module around -------------------------------------------------------------------------------------------------


class SharedInput(nn.Module):
    """Mixed into the class of a module by ``swap``: its forward, with the input of some of its layers shared.

    Attributes:
        mixin: this class, or the one derived from it.
        plain_class: the module's own class, whose forward is run.
        members: the names of the layers that read the same x.
    """

    mixin: ClassVar[type[SharedInput]]
    plain_class: ClassVar[type[nn.Module]]
    members: ClassVar[tuple[str, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward; in a graph of torch.compile every layer computes alone."""
        if not isinstance(self, SharedInput):  # as in FusedForward.forward
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self.plain_class.forward(self, *args, **kwargs)
        outer = _current.sharing
        _current.sharing = Sharing(self._modules.get(name) for name in self.members)
        try:
            return self.plain_class.forward(self, *args, **kwargs)
        finally:
            _current.sharing = outer

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copies and pickles name what it is made of.
        plain: Any = super().__reduce_ex__(2)
        return _rebuild, (self.mixin, self.plain_class), *plain[2:]


class SharedAttention(SharedInput):
    """An attention block: q, k and v read the hidden states."""

    members = ("q_proj", "k_proj", "v_proj")


def swap(module: nn.Module, mixin: type[SharedInput]) -> None:
    """Give ``module`` its own class with ``mixin`` in front of it; in place of another mixin, if it has one."""
    module.__class__ = _mixed(mixin, plain_class(module))


def swap_back(module: nn.Module) -> None:
    """Undo ``swap``."""
    module.__class__ = plain_class(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without a mixin of ``swap``."""
    kind = type(module)
    return kind.__dict__.get("plain_class", kind)


_mixes: dict[tuple[type, type], type[nn.Module]] = {}


def _mixed(mixin: type[SharedInput], kind: type[nn.Module]) -> type[nn.Module]:
    """The one class of this mixin and this class; it goes by the latter's name."""
    if (mixin, kind) not in _mixes:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        _mixes[mixin, kind] = type(kind.__name__, (mixin, kind), {**names, "mixin": mixin, "plain_class": kind})
    return _mixes[mixin, kind]


def _rebuild(mixin: type[SharedInput], kind: type[nn.Module]) -> nn.Module:
    mixed = _mixed(mixin, kind)
    return mixed.__new__(mixed)
