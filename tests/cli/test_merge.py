"""``mbf merge``: ranks, what re-compression kept, and errors, on small adapters made here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn


def adapter(path: Path, rank: int, layers: int = 2, seed: int = 0) -> Path:
    """A LoRA on ``layers`` linear layers; the n-th has r singular values 1, 1/(n+1), 1/(n+1)², ..."""
    torch.manual_seed(seed)
    names = [f"layer{n}" for n in range(layers)]
    model = nn.ModuleDict({name: nn.Linear(12, 10) for name in names})
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    with torch.no_grad():
        for n, name in enumerate(names):
            layer = tuned.base_model.model[name]
            decay = (1 / (n + 1)) ** torch.arange(float(rank))
            layer.lora_A["default"].weight.copy_(torch.linalg.qr(torch.randn(12, rank)).Q.mT)
            layer.lora_B["default"].weight.copy_(torch.linalg.qr(torch.randn(10, rank)).Q * decay)
    tuned.save_pretrained(path)
    return path


def ranks(path: Path) -> set[int]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}


def test_what_each_layer_keeps(mbf, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 4)
    result = mbf("merge", one, "--out", tmp_path / "out", "--rank", "2")
    assert result.exit_code == 0, result.stderr
    assert ranks(tmp_path / "out") == {2}
    *_, flat, steep, _, summary, last = result.stdout.splitlines()
    kept = [0.5**0.5, (1.25 / 1.328125) ** 0.5]  # 2 of 4 equal singular values; 1, 1/2 of 1, 1/2, 1/4, 1/8
    for line, name, share in ((flat, "layer0", kept[0]), (steep, "layer1", kept[1])):
        error = (1 - share**2) ** 0.5
        assert line.split() == [name, "4", "→", "2", f"{100 * share:.2f}", "%", f"{100 * error:.2f}", "%"]
    total = ((2 + 1.25) / (4 + 1.328125)) ** 0.5
    assert summary == (
        f"re-compressed to rank 2: {100 * total:.2f} % of the Frobenius norm kept over 2 layers, "
        f"{100 * kept[0]:.2f} % at least"
    )
    assert last == f"1 adapter merged by slao: {tmp_path / 'out'}"


def test_many_layers_are_a_short_table(mbf, tmp_path: Path) -> None:
    result = mbf("merge", adapter(tmp_path / "one", 3, layers=14), "--out", tmp_path / "out", "--rank", "1")
    assert result.exit_code == 0, result.stderr
    shown = re.findall(r"^ *layer(\d+) .*3 → 1", result.stdout, re.MULTILINE)
    assert shown == [str(n) for n in range(10)]  # those that keep least, in that order
    least = 1 / (1 + 1 / 11**2 + 1 / 11**4) ** 0.5
    assert f"and 4 more, which keep {100 * least:.2f} % or more" in result.stdout
    assert "over 14 layers" in result.stdout


def test_several_adapters_of_several_ranks(mbf, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / f"a{rank}", rank, seed=rank) for rank in (4, 3)]
    result = mbf("merge", *adapters, "--out", tmp_path / "out", "--method", "inclora", "--rank", "5")
    assert result.exit_code == 0, result.stderr
    assert ranks(tmp_path / "out") == {5}
    assert "7 → 5" in result.stdout
    assert result.stdout.splitlines()[-1] == f"2 adapters merged by inclora: {tmp_path / 'out'}"
    options = ["--option", "basis=rsvd", "--option", "B_start=preserve"]
    assert mbf("merge", *adapters, "--out", tmp_path / "slao", *options).exit_code == 0
    assert ranks(tmp_path / "slao") == {3}


def test_nothing_above_the_rank(mbf, tmp_path: Path) -> None:
    result = mbf("merge", adapter(tmp_path / "one", 3), "--out", tmp_path / "out", "--rank", "3")
    assert result.stdout.splitlines()[0] == "no layer has a rank above 3; nothing to re-compress"
    assert ranks(tmp_path / "out") == {3}


def test_without_a_rank_nothing_is_said_of_it(mbf, tmp_path: Path) -> None:
    result = mbf("merge", adapter(tmp_path / "one", 3), "--out", tmp_path / "out")
    assert result.stdout == f"1 adapter merged by slao: {tmp_path / 'out'}\n"


def test_different_ranks_are_one_line_that_shows_the_way(mbf, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / f"a{rank}", rank) for rank in (4, 3)]
    result = mbf("merge", *adapters, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    for part in ("a3: ", "layer0 has rank 3", "a4 has 4", "basis='rsvd'", "--rank 3", "'inclora'"):
        assert part in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rank", "0"], ["--rank", "greater than or equal to 1"]),
        (["--rank", "few"], ["--rank", "integer"]),
        (["--option", "rank=3"], ["--option", "--rank"]),
        (["--option", "out=x"], ["--option", "found out", "--out"]),
        (["--option", "adapters=3"], ["--option", "found adapters"]),
        (["--option", "method=magmax"], ["--option", "found method", "--method"]),
    ],
    ids=str,
)
def test_wrong_options_are_usage(mbf, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    result = mbf("merge", adapter(tmp_path / "one", 3), "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert [part for part in parts if part not in result.stderr] == []
    assert not (tmp_path / "out").exists()


def test_help_says_what_rank_does(mbf) -> None:
    text = " ".join(mbf("merge", "--help").stdout.split())
    for part in ("--rank", "best approximation", "--method inclora", "basis=rsvd", "--rank 8"):
        assert part in text
