"""``fuse``, ``unfuse`` and ``fused``: swap the class of PEFT's LoRA layers and back, and of the modules around them.

A PeftModel's ``LoraModel`` is swapped, too, so that layers that come with later adapters are fused, and a base that is
unloaded has no class of mbf left in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mbf.peft.config import check_module
from mbf.peft.eligibility import layer_reason, plain_weight
from mbf.peft.frozen import LINEARS, FrozenLinear, worth_swapping
from mbf.peft.groups import ATTENTIONS, MLPS, SharedAttention, SharedInput, listed, plain_class, swap, swap_back
from mbf.peft.linear import FusedForward, FusedLinear
from mbf.peft.mlp import LAYERS, FusedMlp, activation_of, computes_the_formula
from mbf.peft.quantised import fused_class
from mbf.peft.report import FuseReport

Memory = Literal["default", "low"]
_MEMORIES = ("default", "low")

NOT_PEFT = """the model has no PEFT LoRA layer; add an adapter first:
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))"""


def fuse(model: nn.Module, *, strict: bool = False, memory: Memory = "default") -> FuseReport:
    """Have the LoRA layers of ``model`` compute with ``mbf.ops.lora_linear``, in place.

    Each eligible ``peft.tuners.lora.layer.Linear`` becomes a ``FusedLinear``; parameters, state-dict keys and saved
    files stay as they are. The model may be a PeftModel, a model with injected adapters, or contain either. Layers that
    are fused already stay so. On a quantised base (bitsandbytes in 4 and 8 bits, torchao, HQQ, GPTQ, AWQ, AQLM) the
    base layer runs as it is, and the branch is added to its output by ``mbf.ops.lora_accumulate``. In a
    PeftModel, layers that ``add_adapter`` or ``load_adapter`` make later are fused as they are made.

    In Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3 and SmolLM3, fused layers are computed in groups: those of
    q, k and v of one attention block together, as they read the same x, and an MLP whose three layers are fused as a
    whole (gate and up together where it cannot be). The modules around them get a class that differs from their own in
    the forward only. A call that cannot be computed in a group is computed layer by layer: hooks on one of the layers,
    several active adapters, a base weight that trains, torch.compile.

    Where this machine's torch is slow at products of the model's dtype (bf16 and fp16 on a CPU without instructions for
    them, fp32 on one with AMX, with AVX2 and no more, or with AMD's AVX-512), the model's other linear layers that
    don't train, such as ``lm_head``, become ``FrozenLinear`` and compute by ``mbf.ops.frozen_linear``.

    Args:
        model: any module with LoRA layers of PEFT in it.
        strict: raise instead of leaving a layer to PEFT.
        memory: what an MLP that is computed whole keeps for backward. ``"default"``: its input and the outputs of gate
            and up; ``"low"``: its input only, and backward makes those outputs again. Another call of ``fuse`` changes
            it.

    Returns:
        Which layers are fused, why the others are not, and which are grouped.

    Raises:
        ValueError: there is no LoRA layer; ``strict`` and a layer is declined; or ``memory`` is neither. Nothing is
            changed then.
    """
    if memory not in _MEMORIES:
        raise ValueError(f"memory is {memory!r}; it must be one of {', '.join(map(repr, _MEMORIES))}")
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(NOT_PEFT)
    report = _report(layers)
    if strict and report.declined:
        raise ValueError(f"{report}\nnothing was changed; fuse(model) without strict=True leaves these layers to PEFT")
    if report.fused:
        for module in model.modules():
            if type(module) in (LoraModel, FusedLoraModel):
                module.__class__ = FusedLoraModel
                module.__dict__["_memory"] = memory
    return _swap(model, layers, report, memory)


def is_fused(model: nn.Module) -> bool:
    """Whether ``fuse`` has swapped a layer of ``model``."""
    return bool(_fused_layers(model))


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``: PEFT's own class for every fused layer in ``model``, and no groups."""
    for layer in _lora_layers(model).values():
        if isinstance(layer, FusedForward):
            layer.release()
    for module in model.modules():
        if isinstance(module, SharedInput):
            _ungroup(module)
        elif type(module) is FrozenLinear:
            _thaw(module)
        elif type(module) is FusedLoraModel:
            module.release()


@contextmanager
def fused(model: nn.Module, *, strict: bool = False, memory: Memory = "default") -> Iterator[FuseReport]:
    """``fuse`` for the length of a block; what was fused and grouped before it is so again after it."""
    before = [(layer, type(layer)) for layer in _fused_layers(model)]
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    frozen = [module for module in model.modules() if type(module) is FrozenLinear]
    tuners = [
        (module, type(module), module.__dict__.get("_memory"))
        for module in model.modules()
        if type(module) in (LoraModel, FusedLoraModel)
    ]
    around = [(module, type(module), module.__dict__.get("_recompute")) for module in _around(model).values()]
    report = fuse(model, strict=strict, memory=memory)
    try:
        yield report
    finally:
        still = {id(module) for module in model.modules()}
        known = {id(layer) for layer, _ in before}
        for layer in _fused_layers(model):
            if id(layer) not in known:
                layer.release()
        for layer, kind in before:
            if id(layer) in still:
                layer.__class__ = kind
                layer.__dict__.pop("_borrowed", None)
        for module in plain:
            if type(module) is FrozenLinear:
                _thaw(module)
        for module in frozen if is_fused(model) else ():
            module.__class__ = FrozenLinear
        for tuner, kind, kept in tuners:
            _restore(tuner, kind if is_fused(tuner) else LoraModel, "_memory", kept)
        for outer, kind, recompute in around:
            _restore(outer, kind if is_fused(outer) else plain_class(outer), "_recompute", recompute)


def _restore(module: nn.Module, kind: type[nn.Module], name: str, value: Any) -> None:
    module.__class__ = kind
    module.__dict__.pop(name, None)
    if value is not None:
        module.__dict__[name] = value


class FusedLoraModel(LoraModel):
    """A PeftModel's ``LoraModel`` whose later layers are fused, and whose base is given back as it was.

    ``fuse`` sets the class of a built ``LoraModel`` to this one and ``unfuse`` sets it back.
    """

    _memory: Memory = "default"

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As ``LoraModel.inject_adapter``; then the layers that are new are fused where they can be."""
        known = {id(layer): layer for layer in _lora_layers(self).values()}
        super().inject_adapter(model, *args, **kwargs)
        layers = {name: layer for name, layer in _lora_layers(self).items() if id(layer) not in known}
        if layers:
            _swap(self, layers, _report(layers), self._memory)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """As ``LoraModel.merge_and_unload``, without a class of mbf in what is left."""
        base = LoraModel.merge_and_unload(self, *args, **kwargs)
        unfuse(self)
        return base

    def unload(self) -> Any:
        """As ``LoraModel.unload``, without a class of mbf in what is left."""
        base = LoraModel.unload(self)
        unfuse(self)
        return base

    def release(self) -> None:
        """Be PEFT's ``LoraModel`` again."""
        self.__dict__.pop("_memory", None)
        self.__class__ = LoraModel  # type: ignore[assignment]

    def _get_name(self) -> str:
        return LoraModel.__name__


def _report(layers: dict[str, Any]) -> FuseReport:
    """Which of the layers are to be fused, and why the others are not."""
    inside_attention = {
        id(m) for layer in layers.values() if isinstance(layer, MultiheadAttention) for m in layer.base_layer.modules()
    }
    declined: dict[str, str] = {}
    for name, layer in layers.items():
        reason = layer_reason(layer, fused_class(type(layer)))
        if id(layer) in inside_attention:
            reason = "MultiheadAttention merges it into the weight and never calls it"
        if reason is not None:
            declined[name] = reason
    return FuseReport(tuple(name for name in layers if name not in declined), declined)


def _swap(model: nn.Module, layers: dict[str, Any], report: FuseReport, memory: Memory) -> FuseReport:
    """Swap the classes of the layers that the report names as fused, and of those around them; returns these, too."""
    for name in report.fused:
        layers[name].__class__ = fused_class(type(layers[name]))
        layers[name].__dict__.pop("_borrowed", None)
    frozen = _others(model) if report.fused else {}
    for layer in frozen.values():
        layer.__class__ = FrozenLinear
    return replace(_group(model, report, memory), frozen=tuple(frozen))


def _fused_layers(model: nn.Module) -> list[Any]:
    """The layers that ``fuse`` swapped, which a route alone does not."""
    return [layer for layer in _lora_layers(model).values() if isinstance(layer, FusedForward) and not layer._borrowed]


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    check_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _thaw(layer: nn.Module) -> None:
    layer.__class__ = nn.Linear


def _others(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers outside of PEFT's that are worth another class."""
    within = {id(part) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for part in layer.modules()}
    return {name: m for name, m in model.named_modules() if id(m) not in within and worth_swapping(m)}


# -- groups ------------------------------------------------------------------------------------------------------------


def _around(model: nn.Module) -> dict[str, nn.Module]:
    """The attention blocks and MLPs that may have groups."""
    classes = ATTENTIONS | MLPS
    return {name: module for name, module in model.named_modules() if listed(plain_class(module), classes)}


def _group(model: nn.Module, report: FuseReport, memory: Memory) -> FuseReport:
    """Swap the classes of the modules around the fused layers, and add to the report which."""
    shared: dict[str, tuple[str, ...]] = {}
    mlps: list[str] = []
    for name, module in _around(model).items():
        kind = plain_class(module)
        mixin = SharedAttention if listed(kind, ATTENTIONS) else FusedMlp
        together = tuple(member for member in mixin.members if _groupable(module._modules.get(member)))
        if len(together) < 2:
            _ungroup(module)
            continue
        swap(module, mixin)
        if mixin is FusedMlp:
            module.__dict__["_recompute"] = memory == "low"
        if mixin is FusedMlp and _whole(module):
            mlps.append(name)
        else:
            shared[name] = together
    return FuseReport(report.fused, report.declined, shared, tuple(mlps))


def _ungroup(module: nn.Module) -> None:
    swap_back(module)
    module.__dict__.pop("_recompute", None)


def _groupable(layer: nn.Module | None) -> bool:
    """Whether ``layer`` is a fused one on a frozen linear layer; what may change from call to call is not asked."""
    if type(layer) is not FusedLinear:
        return False
    base: Any = layer.base_layer
    weight = plain_weight(base)
    return type(base) in LINEARS and weight is not None and not any(p.requires_grad for p in base.parameters())


def _whole(mlp: nn.Module) -> bool:
    complete = all(_groupable(mlp._modules.get(name)) for name in LAYERS)
    return complete and activation_of(mlp) is not None and computes_the_formula(plain_class(mlp))
