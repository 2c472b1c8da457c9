"""The arithmetic of ``bench/scale.py`` is that of the models, and of what processes send between two tasks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mbf.continual import ContinualLora, replicas
from mbf.peft import adapter
from tests.continual.test_replicas import model_for, prepared, train
from tests.processes import together

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scale(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import scale

    return scale


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("rank", "targets"), [(16, None), (8, ["q_proj", "v_proj"])])
def test_parameters_are_those_of_transformers_and_peft(scale, which: int, rank: int, targets) -> None:
    model = scale.MODELS[which]
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=2,  # the rest are their like
        num_attention_heads=model.hidden // 128,
        num_key_value_heads=model.kv // 128,
        tie_word_embeddings=False,
    )
    targets = targets or list(model.linear)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
        block = sum(p.numel() for p in llama.model.layers[0].parameters())
        rest = sum(p.numel() for p in llama.parameters()) - 2 * block
        adapted = get_peft_model(llama, LoraConfig(r=rank, target_modules=targets))
    lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert (model.block, model.rest) == (block, rest)
    assert model.adapter(rank, targets) == lora * model.blocks // 2
    nominal = float(re.search(r"(\d+)B", model.name).group(1))  # type: ignore[union-attr]
    assert model.parameters / 1e9 == pytest.approx(nominal, rel=0.05)


def count_boundary(how: str) -> tuple[int, int, int, float]:
    """Bytes of adapter and state, the processes, and the bytes that leave one between tasks 2 and 3."""
    model = model_for(how)
    learner = ContinualLora(model)
    with learner.task("first"):
        train(prepared(model, how), 1)
    learner.begin_task("second")
    train(prepared(model, how), 2)
    sent = 0.0
    broadcast, whole = replicas.dist.broadcast, adapter.whole

    def counted_broadcast(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return broadcast(tensor, *arguments, **named)

    def counted_whole(tensor: Tensor) -> Tensor:
        nonlocal sent
        if adapter.is_sharded(tensor):
            sent += tensor.numel() * tensor.element_size() / 2  # the other half is the other process's
        return whole(tensor)

    replicas.dist.broadcast, adapter.whole = counted_broadcast, counted_whole
    try:
        learner.end_task()
        learner.begin_task("third")
    finally:
        replicas.dist.broadcast, adapter.whole = broadcast, whole
    found = learner.memory_bytes()
    return found["adapter"], found["state"], learner.replicas.size, sent


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_bytes_of_a_boundary_are_what_two_processes_send(scale, how: str) -> None:
    for lora, state, processes, sent in together(count_boundary, how):
        assert lora > 0 and state == lora and processes == 2
        assert sent == scale.boundary(lora, state, processes, how == "fsdp")


def test_the_tables_of_the_documentation_are_printed_by_the_script(scale, capsys) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"`python bench/scale\.py([^`]*)`", page)
    assert len(commands) == 2
    for command in commands:
        scale.main(command.split())
        assert capsys.readouterr().out.strip() in page


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--targets", "query"], "query is none of q_proj"), (["--processes", "8,16"], "wanted 3 numbers of 2 or more")],
)
def test_wrong_options_are_named(scale, capsys, monkeypatch, arguments: list[str], part: str) -> None:
    monkeypatch.setattr(sys, "argv", ["scale.py"])
    with pytest.raises(SystemExit):
        scale.main(arguments)
    assert part in capsys.readouterr().err
