"""Claim: a training step of a Llama with ``mbf`` on all linear layers takes little more than the frozen model's.

Geometry: SmolLM2-135M (hidden 576, intermediate 1536, 9 heads, 3 for keys and values, sdpa), r = 16 on all seven
projections, 4x256 tokens; by default four layers and a small vocabulary, ``--layers 30 --vocab 49152`` is the whole
model, with random weights. A step is zero_grad, forward with labels, backward and AdamW on the adapter.
Peers, on the same frozen weights: ``frozen``, the model without adapter, the floor; ``peft``; ``peft-nocast``, the same
with ``autocast_adapter_dtype=False`` (bf16 only); ``peft-compiled`` with ``--compile``; ``mbf``, PEFT's model after
``mbf.fuse``; ``mbf-low`` with ``--memory low``, after ``mbf.fuse(model, memory="low")``; ``mbf-compiled`` with
``--compile``, the fused model compiled likewise. In all of them the embeddings' output requires a gradient, so dX is
computed in every layer.
Run: ``python bench/llama_step.py``.

``over frozen`` is the ratio of medians, ``vs PEFT`` PEFT's median over the variant's (more is faster), ``saved MB``
what autograd keeps for backward, parameters not counted. Before a model is timed, its loss and every gradient of the
adapter are held against fp64, with and without dropout; a compiled one without, as inductor draws masks of its own.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from common import BOTH_P, AddRow, quartiles, run_script, script_parser, table
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mbf
from mbf.ops import use_backend
from mbf.peft import calls
from mbf.run.bench import interleave, rounds_within
from mbf.run.layers import DTYPES, failures

RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLUMNS = [
    *("layers", "vocab", "dtype", "rank", "p", "tokens", "variant"),
    *("median_ms", "q1_ms", "q3_ms", "over_frozen", "vs_peft", "saved_mb", "rounds"),
]


class Case(NamedTuple):
    layers: int
    vocab: int
    dtype: str
    p: float
    batch: int
    length: int

    @property
    def columns(self) -> tuple[Any, ...]:
        return self.layers, self.vocab, self.dtype, RANK, self.p, f"{self.batch}x{self.length}"

    def __str__(self) -> str:
        layers, vocab, dtype, rank, p, tokens = self.columns
        return f"{layers} layers, vocabulary {vocab}, {dtype}, r={rank}, p={p:g}, {tokens} tokens"


# -- the variants ------------------------------------------------------------------------------------------------------


def frozen_model(case: Case) -> Any:
    config: Any = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=case.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(DTYPES[case.dtype]).requires_grad_(False).train()


def twin(base: Any) -> Any:
    """A model of its own that has the parameters of ``base`` themselves, so that all variants read the same memory."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    return model


def adapted(base: Any, p: float, **options: Any) -> Any:
    """PEFT's model of ``base`` with a random adapter, the same one on every call."""
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=p, target_modules=TARGETS, task_type="CAUSAL_LM")
    model: Any = get_peft_model(twin(base), config, **options)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            nn.init.normal_(layer.lora_B["default"].get_parameter("weight"), std=0.02)
    return model


def fused(base: Any, p: float, **options: Any) -> Any:
    model = adapted(base, p)
    mbf.fuse(model, strict=True, **options)
    return model


def build(base: Any, case: Case, low: bool, compiled: bool) -> dict[str, Any]:
    variants = {"frozen": twin(base), "peft": adapted(base, case.p)}
    if case.dtype != "fp32":
        variants["peft-nocast"] = adapted(base, case.p, autocast_adapter_dtype=False)
    if compiled:
        torch.compiler.reset()
        variants["peft-compiled"] = torch.compile(adapted(base, case.p), dynamic=False)
    variants["mbf"] = fused(base, case.p)
    if low:
        variants["mbf-low"] = fused(base, case.p, memory="low")
    if compiled:
        variants["mbf-compiled"] = torch.compile(fused(base, case.p), dynamic=False)
    return variants


# -- right before fast -------------------------------------------------------------------------------------------------


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The loss and the adapter's gradients, with the dropout masks of one seed."""
    torch.manual_seed(2)
    loss = loss_of(model, ids)
    named = {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    return {"loss": loss.detach()} | dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


def set_dropout(model: Any, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(on)


def wrong(model: Any, stock: Any, ids: Tensor, p: float, eps: float) -> list[str]:
    """What of a fused model's loss and gradients is off: without dropout against PEFT, with it against the formula.

    The truth is the model in fp64. Norms, rotary embeddings and the loss stay in fp32 there, as transformers casts
    them; that rounding is the same in all runs and far below the error of the products.
    """
    before = calls.copy()
    set_dropout(model, False)
    set_dropout(stock, False)
    plain, exact = gradients(stock, ids), gradients(copy.deepcopy(stock).double(), ids)
    without = gradients(model, ids)
    found = failures(without, plain, exact, eps)
    set_dropout(model, True)
    set_dropout(stock, True)
    if p:
        got = gradients(model, ids)
        with use_backend("reference"):
            plain, exact = gradients(model, ids), gradients(copy.deepcopy(model).double(), ids)
        found += [f"with dropout, {what}" for what in failures(got, plain, exact, eps)]
        if all(torch.equal(got[name], without[name]) for name in got):
            found.append("nothing is dropped")
    if calls["slow"] != before["slow"] or calls["fast"] == before["fast"]:
        found.append("layers were left to PEFT")
    return found


def wrong_compiled(model: Any, stock: Any, ids: Tensor, eps: float) -> list[str]:
    """What of a compiled model's loss and gradients is off without dropout."""
    set_dropout(model, False)
    set_dropout(stock, False)
    plain, exact = gradients(stock, ids), gradients(copy.deepcopy(stock).double(), ids)
    found = failures(gradients(model, ids), plain, exact, eps)
    set_dropout(model, True)
    set_dropout(stock, True)
    return found


# -- time and memory ---------------------------------------------------------------------------------------------------


def saved_mb(model: Any, ids: Tensor) -> float:
    """What the graph of a forward keeps for backward, each storage once, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids)
    size = sum(storage.nbytes() for storage in kept.values())
    del loss
    return size / 1e6


def stepper(model: Any, ids: Tensor) -> Callable[[], tuple[float, ...]]:
    """A function that makes one training step and returns its milliseconds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> tuple[float, ...]:
        start = perf_counter()
        if optimizer:
            optimizer.zero_grad()
        loss_of(model, ids).backward()
        if optimizer:
            optimizer.step()
        return (1e3 * (perf_counter() - start),)

    return step


class Result(NamedTuple):
    """Milliseconds of every round, and the megabytes that autograd keeps, by variant."""

    times: dict[str, list[float]]
    saved: dict[str, float]


def measure(case: Case, args: argparse.Namespace) -> Result | list[str]:
    """The steps' times, or what is wrong with their results."""
    torch.seed()
    base = frozen_model(case)
    ids = torch.randint(case.vocab, (case.batch, case.length))
    variants = build(base, case, bool(args.memory), args.compile)
    eps = torch.finfo(DTYPES[case.dtype]).eps
    found = [
        f"{name}: {what}"
        for name in ("mbf", "mbf-low")
        if name in variants
        for what in wrong(variants[name], variants["peft"], ids, case.p, eps)
    ]
    if args.compile:
        compiled = wrong_compiled(variants["mbf-compiled"], variants["peft"], ids, eps)
        found += [f"mbf-compiled: {what}" for what in compiled]
    if found:
        return found
    torch.seed()
    steps = {name: stepper(model, ids) for name, model in variants.items()}
    refresh = partial(ids.random_, case.vocab)
    interleave(steps, 1, refresh)
    one_round = sum(milliseconds for [(milliseconds,)] in interleave(steps, 1, refresh).values()) / 1e3
    times = interleave(steps, rounds_within(args.budget, one_round, args.rounds), refresh)
    saved = {name: saved_mb(model, ids) for name, model in variants.items()}
    return Result({name: [ms for (ms,) in one] for name, one in times.items()}, saved)


# -- the table ---------------------------------------------------------------------------------------------------------


def report(case: Case, result: Result, add: AddRow) -> None:
    stats = {name: quartiles(times) for name, times in result.times.items()}
    rounds = len(result.times["frozen"])
    lines = []
    for name, (q1, median, q3) in stats.items():
        over, against, saved = median / stats["frozen"][1], stats["peft"][1] / median, result.saved[name]
        ms = [f"{t:.2f}" for t in (median, q1, q3)]
        add([*case.columns, name, *ms, f"{over:.3f}", f"{against:.3f}", f"{saved:.2f}", rounds])
        lines.append([name, *ms, f"{over:.2f}", f"{against:.2f}", f"{saved:.1f}"])
    print(f"\n{case}   {rounds} rounds")
    print(table(["", "median ms", "q1", "q3", "over frozen", "vs PEFT", "saved MB"], lines), flush=True)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = script_parser(__doc__, "model", budget=600.0)
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--vocab", type=int, default=4096)
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--memory", choices=["low"], help="with mbf.fuse(model, memory=...)")
    add("--quick", action="store_true", help="one layer, few tokens")
    args = parser.parse_args(argv)
    layers, vocab = (1, 512) if args.quick else (args.layers, args.vocab)
    batch, length = (2, 33) if args.quick else (4, 256)
    args.cases = [Case(layers, vocab, args.dtype, p, batch, length) for p in args.p or BOTH_P]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("llama_step.py", argv, arguments, measure, report, COLUMNS)


def test_llama_step(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
