"""Merging adapters that were trained already, one after another, with no model at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from mbf.continual.atomic import whole_directory
from mbf.continual.checks import split_by
from mbf.continual.header import CARD
from mbf.methods import Factors, Layer, Method, Options, available, get
from mbf.ops import BranchTerms, rsvd
from mbf.peft import describe_ranks
from mbf.peft.stored import CONFIG, PREFIX, WEIGHTS, check_factors, read_config, read_tensors, scale_of

_KEEP_SPLIT = ("slao", "seqlora")  # whose result holds the part that PEFT took out of W once


class _StoredLayer:
    """A layer known by its stored factors alone."""

    def __init__(self, name: str, A: Tensor, B: Tensor, scale: float) -> None:
        self.name = name
        self.scale = scale
        self.write(A, B)

    @property
    def module(self) -> nn.Module:
        raise NotImplementedError(f"{self.name} is known by its factors alone")

    def weight(self) -> Tensor:
        raise NotImplementedError(f"{self.name} is known by its factors alone")

    def values(self) -> tuple[Tensor, Tensor]:
        return self.A.data, self.B.data

    def write(self, A: Tensor, B: Tensor) -> None:
        self.A = nn.Parameter(A.clone(), requires_grad=False)
        self.B = nn.Parameter(B.clone(), requires_grad=False)

    def route(self, terms: Callable[[Layer], BranchTerms] | None, *, own_operator: bool = False) -> None:
        """Nothing computes here."""


class _Described(NamedTuple):
    """What is known of a layer of an adapter whose factors are not in memory."""

    name: str
    r: int
    d_in: int
    d_out: int
    scale: float


@dataclass(frozen=True)
class Compressed:
    """What re-compression did to one layer.

    Attributes:
        name: the layer, as PEFT's patterns name it.
        before, after: its ranks.
        norm: ‖s B A‖ (Frobenius) before.
        lost: ‖s (B A − B' A')‖, from the singular values left out.
    """

    name: str
    before: int
    after: int
    norm: float
    lost: float

    @property
    def kept(self) -> float:
        """‖B' A'‖ over ‖B A‖, from 0 to 1; 1 where B A is zero."""
        return _share(self.norm, self.lost)


@dataclass(frozen=True)
class MergeReport:
    """What ``merge_adapters`` wrote.

    Attributes:
        path: directory of the merged adapter.
        compressed: the layers whose rank was lowered, in the order of their names; empty without ``rank``.
    """

    path: Path
    compressed: tuple[Compressed, ...] = ()

    @property
    def kept(self) -> float:
        """As ``Compressed.kept``, of all re-compressed layers as one vector."""
        norms, losses = ([getattr(layer, field) for layer in self.compressed] for field in ("norm", "lost"))
        return _share(math.hypot(*norms), math.hypot(*losses))

    def __fspath__(self) -> str:
        return str(self.path)


def _share(norm: float, lost: float) -> float:
    return math.sqrt(max(0.0, 1 - (lost / norm) ** 2)) if norm else 1.0


def merge_adapters(
    adapters: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    method: str = "slao",
    *,
    rank: int | None = None,
    **options: Any,
) -> MergeReport:
    """Merge PEFT LoRA adapters in the order given, as if their tasks had been learnt one after another.

    Every adapter is taken as the fine-tuned LoRA (A_ft, B_ft) of its task. For ``slao`` the result is the last A and
    Σ w_i B_i with the weights of its closed form.

    Adapters of other scales than the first's are brought to it: ``s B A = s_1 (s / s_1 B) A``. Of other ranks, methods
    that sum or choose functions (``inclora``, ``olora``, ``seqlora``, ``magmax`` with ``space="delta"``) take any;
    ``slao`` with ``basis="rsvd"`` and ``B_start="preserve"`` goes to each adapter's rank as the learner does with its
    option ``rank``, by projecting B_merge on the leading right singular vectors of the last B_ft A_ft.

    With ``rank``, the merged B A of every layer above it becomes its best approximation of that rank (Eckart and Young
    1936), from the exact SVD of the factors (``mbf.ops.rsvd``): ``B = U √S``, ``A = √S Vh``, so both factors have the
    same norm. The scale stays, and ``lora_alpha`` follows. Layers at the rank or below it are left as they are. One
    adapter alone is re-compressed.

    All adapters are checked before the first is merged, and read one after another: memory holds one of them at a time,
    beside the first and what the method keeps, however many there are.

    Args:
        adapters: directories that ``save_pretrained`` wrote; at least one.
        out: directory of the merged adapter, which plain PEFT loads. An adapter there is replaced in one step.
        method: a method whose merge needs nothing but the trained adapters.
        rank: the largest rank that a layer of the result may have; default: what the method gives.
        **options: the method's options, but for slao's ``rank``, which the adapters decide.

    Returns:
        Where the adapter was written, and what each re-compressed layer kept.

    Raises:
        ValueError: an adapter is missing, not a LoRA, or does not fit the first one (layers, widths, ranks); a method
            that cannot merge offline; an ``init_lora_weights`` that took a part out of W ("pissa", "olora", ...) with a
            method or ranks that do not keep it; rank < 1; an ``out`` that is one of the adapters, or holds something
            else than an adapter, or a learner. Nothing is written then.
        OSError: ``out`` cannot be written; an adapter that was there is whole.
    """
    if not adapters:
        raise ValueError("no adapter to merge; give the directories of one or more PEFT adapters")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; a LoRA has at least rank 1")
    rule = get(method)(**options)
    if not rule.merges_alone:
        why = "merges with what it saw or learnt while training, which adapters on disk do not carry"
        if rule.joint:
            why = "learns all tasks at once and merges nothing"
        raise ValueError(
            f"method {method!r} {why}; methods that need nothing else: "
            f"{', '.join(n for n in available() if get(n).merges_alone)}"
        )
    paths = [Path(path) for path in adapters]
    if any(Path(out).resolve() == path.resolve() for path in paths):
        raise ValueError(f"out {str(out)!r} is one of the adapters, which the merge would replace; give another folder")
    configs = [read_config(path) for path in paths]
    described = [_describe(path, config) for path, config in zip(paths, configs, strict=True)]
    for path, other in zip(paths[1:], described[1:], strict=True):
        _check_fits(paths[0], described[0], path, other)
    _check_split(method, rank, paths, configs, described)
    starts = _starts(rule, options, paths, described)
    layers = _layers(paths[0], configs[0])
    rule.layers = layers
    # A rank that grows starts with random rows: always the same ones, and the caller's random numbers are not touched.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i, (path, config) in enumerate(zip(paths, configs, strict=True), start=1):
            factors = _at_scale_of(layers, _layers(path, config))
            rule.merged = rule.current.clone()
            if i in starts:
                rule.options = starts[i]
                rule.init_adapter(i)
            rule.write(factors)
            rule.after_task(i, None)
        compressed = _compress(layers, rank) if rank is not None else ()
    _write(Path(out), layers, configs[0], [layer.A.shape[0] for layer in layers] != [layer.r for layer in described[0]])
    return MergeReport(Path(out), compressed)


def _at_scale_of(layers: list[_StoredLayer], task: list[_StoredLayer]) -> Factors:
    """The factors of ``task`` for the scales of ``layers``; untouched where these are the same."""
    B = []
    for layer, own in zip(layers, task, strict=True):
        same = math.isclose(own.scale, layer.scale, rel_tol=1e-6)
        B.append(own.B.data if same else (own.B.data.double() * (own.scale / layer.scale)).to(own.B.dtype))
    return Factors([own.A.data.clone() for own in task], B)


def _starts(
    rule: Method, options: Mapping[str, Any], adapters: Sequence[Path], described: list[list[_Described]]
) -> dict[int, Options]:
    """For slao's adapters of several ranks: by task, the options with which it starts at the rank of its adapter."""
    ranks = [[layer.r for layer in task] for task in described]
    other = next((n for n, found in enumerate(ranks) if found != ranks[0]), None)
    if other is None or "rank" not in type(rule).Options.model_fields:
        return {}
    first, layer = next((a.r, b) for a, b in zip(described[0], described[other], strict=True) if a.r != b.r)
    try:
        if any(len(set(task)) > 1 for task in ranks[1:]):
            raise ValueError("the layers of one adapter differ in rank")
        return {i: rule.Options(**{**options, "rank": task[0]}) for i, task in enumerate(ranks[1:], start=2)}
    except ValueError:
        raise ValueError(
            f"{adapters[other]}: {layer.name} has rank {layer.r}, {adapters[0]} has {first}. {rule.name} "
            "goes from rank to rank with basis='rsvd', B_start='preserve' and one rank for all layers of an adapter. "
            f"Otherwise bring each to one rank first (mbf merge ADAPTER --out DIR --rank {min(map(min, ranks))}, or "
            "merge_adapters with rank=), or sum them with method 'inclora'"
        ) from None


def _compress(layers: list[_StoredLayer], rank: int) -> tuple[Compressed, ...]:
    """Replace B A of every layer above ``rank`` by its best approximation of that rank, B = U √S, A = √S Vh."""
    groups: dict[int, list[_StoredLayer]] = {}
    for layer in layers:
        if layer.A.shape[0] > rank:
            groups.setdefault(min(*layer.A.shape, layer.B.shape[0]), []).append(layer)
    compressed: dict[str, Compressed] = {}
    for all_of_them, here in groups.items():
        wide = [torch.promote_types(layer.A.dtype, torch.float32) for layer in here]
        triples = rsvd(
            [(layer.B.data.to(w), layer.A.data.to(w)) for layer, w in zip(here, wide, strict=True)], all_of_them
        )
        for layer, (U, S, Vh) in zip(here, triples, strict=True):
            before, name, values = layer.A.shape[0], layer.name.removeprefix(PREFIX), S.double() * layer.scale
            root = S[:rank].sqrt()
            layer.write((root[:, None] * Vh[:rank]).to(layer.A.dtype), (U[:, :rank] * root).to(layer.B.dtype))
            lost = float(torch.linalg.vector_norm(values[rank:]))
            norm = float(torch.linalg.vector_norm(values))
            compressed[layer.name] = Compressed(name, before, layer.A.shape[0], norm, lost)
    return tuple(compressed[layer.name] for layer in layers if layer.name in compressed)


def _layers(path: Path, config: LoraConfig) -> list[_StoredLayer]:
    factors = check_factors(read_tensors(path / WEIGHTS), config, path / WEIGHTS)
    return [_StoredLayer(name, A, B, scale_of(config, name, A.shape[0])) for name, (A, B) in factors.items()]


def _describe(path: Path, config: LoraConfig) -> list[_Described]:
    return [
        _Described(layer.name, layer.A.shape[0], layer.A.shape[1], layer.B.shape[0], layer.scale)
        for layer in _layers(path, config)
    ]


def _check_fits(first: Path, layers: list[_Described], path: Path, other: list[_Described]) -> None:
    names, found = {layer.name for layer in layers}, {layer.name for layer in other}
    if names != found:
        raise ValueError(
            f"{path} and {first} adapt different layers, e.g. {min(names ^ found)}; train them with one config"
        )
    for a, b in zip(layers, other, strict=True):
        if (a.d_in, a.d_out) != (b.d_in, b.d_out):
            raise ValueError(
                f"{path}: {b.name} has A {[b.r, b.d_in]}, B {[b.d_out, b.r]}; {first} has {[a.r, a.d_in]}, "
                f"{[a.d_out, a.r]}; train both on one model"
            )
        if a.scale == 0:
            raise ValueError(f"{first}: {a.name} has scale 0 and computes nothing; leave this adapter out")


def _check_split(
    method: str, rank: int | None, paths: list[Path], configs: list[LoraConfig], described: list[list[_Described]]
) -> None:
    """Raise ValueError where W of the result would be other than W of the adapters, or its missing part count twice."""
    for path, config in zip(paths, configs, strict=True):
        how = split_by(config)
        alike = all(other.init_lora_weights == how for other in configs)
        same_rank = rank is None and all([a.r for a in one] == [a.r for a in described[0]] for one in described)
        if how is not None and not (alike and same_rank and method in _KEEP_SPLIT):
            raise ValueError(
                f"{path} was made with init_lora_weights={how!r}, by which PEFT takes a part of its rank out of W "
                f"whenever it loads the adapter; only {' and '.join(_KEEP_SPLIT)} merge such adapters, all of one kind "
                "and of one rank, which stays. Convert each to a LoRA on the whole W first (save_pretrained with "
                "path_initial_model_for_weight_conversion), or train from mbf.init_pissa_ and convert that"
            )


def _write(out: Path, layers: list[_StoredLayer], config: LoraConfig, changed: bool) -> None:
    if changed:
        ranks = {layer: layer.A.shape[0] for layer in layers}
        pairs = {
            layer.name.removeprefix(PREFIX): (r, layer.scale * (r**0.5 if config.use_rslora else r))
            for layer, r in ranks.items()
        }
        for field, value in describe_ranks(pairs).items():
            setattr(config, field, value)
    config.inference_mode = True
    with whole_directory(out, CONFIG, (WEIGHTS,), keep=(CARD,)) as temporary:
        tensors = {}
        for layer in layers:
            tensors[f"{layer.name}.lora_A.weight"] = layer.A.data.contiguous()
            tensors[f"{layer.name}.lora_B.weight"] = layer.B.data.contiguous()
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
