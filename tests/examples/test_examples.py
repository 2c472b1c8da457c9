"""The examples run, learn and ship plain PEFT; with mbf they are their plain PEFT twins plus three lines."""

from __future__ import annotations

import difflib
import json
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mbf.run.model import TINY
from tests.run.tiny import TASKS, write_stream

from .scripts import FOLDER, SCRIPTS, Scores, run, scores, small

THREE = ["import mbf", "learner = mbf.ContinualLora(model)", "with learner.task(name):"]
NAMES = [f"{number}-{task}" for number, task in enumerate(sorted(TASKS), 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and three tiny tasks, as examples/prepare.py writes them."""
    folder = tmp_path_factory.mktemp("examples")
    datasets.config.HF_DATASETS_CACHE, before = folder / "cache", datasets.config.HF_DATASETS_CACHE
    stream = write_stream(folder / "stream")
    printed = run(FOLDER / "prepare.py", "--to", folder / "data", "--stream", stream, "--model", TINY)
    assert all(name in printed for name in NAMES)
    yield folder / "data"
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def learned(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """``learned("plain/loop")``: what the script printed as scores, and its adapter's folder; each is run once."""
    found: dict[str, tuple[Scores, Path]] = {}

    def learn(name: str, text: str | None = None) -> tuple[Scores, Path]:
        key = name if text is None else f"{name}, changed"
        if key not in found:
            folder = tmp_path_factory.mktemp("run")
            script = FOLDER / f"{name}.py"
            if text is not None:
                script = folder / "script.py"
                script.write_text(text)
            sizes = small(Path(name).name, folder / "adapter")
            printed = run(script, "--model", data / "model", "--tasks", data / "tasks", *sizes)
            found[key] = scores(printed), folder / "adapter"
        return found[key]

    return learn


def source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text()


# -- three lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_plain_twin_and_three_lines(name: str) -> None:
    """Counted as ``diff -w`` counts: what stands in the block of the ``with`` line is indented and else the same."""
    plain, ours = ([line.strip() for line in source(n).splitlines()] for n in (f"plain/{name}", name))
    changes = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    assert changes == [f"+ {line}" for line in THREE]
    assert "mbf" not in source(f"plain/{name}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_the_line_that_trains_is_indented(name: str) -> None:
    plain, ours = (source(n).splitlines() for n in (f"plain/{name}", name))
    dropped = [line for line in difflib.ndiff(plain, ours) if line.startswith("- ")]
    assert len(dropped) == 1 and "train(" in dropped[0]


# -- they run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"plain/{name}" for name in SCRIPTS)])
def test_learns_task_after_task_and_ships_plain_peft(name: str, learned, data: Path) -> None:
    found, adapter = learned(name)
    assert list(found) == NAMES and all(list(row) == NAMES for row in found.values())
    for before, after in pairwise(NAMES):
        assert found[after][after][0] < found[before][after][0]  # the loss on a task falls when it is learned
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(data / "model"), adapter).eval()
    for task, (loss, _) in found[NAMES[-1]].items():
        assert loss == pytest.approx(loss_of(model, data / "tasks" / task / "test.jsonl", data / "model"), abs=1e-3)


@torch.no_grad()
def loss_of(model: PeftModel, rows: Path, tokenizer_of: Path) -> float:
    """The mean loss on the completions' tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        prompt, answer = (tokenizer(json.loads(line)[part])["input_ids"] for part in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total / count


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_twins_part_at_the_second_task(name: str, learned) -> None:
    """SLAO's first task is plain fine-tuning; from the second on what was learned is merged."""
    (ours, _), (plain, _) = learned(name), learned(f"plain/{name}")
    assert ours[NAMES[0]] == plain[NAMES[0]]
    for task in NAMES[1:]:
        assert all(abs(ours[task][test][0] - plain[task][test][0]) > 1e-3 for test in NAMES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fourth_line_fuses(name: str, learned) -> None:
    line = "    model = get_peft_model(base, config)\n"
    assert line in source(name)
    fused, _ = learned(name, source(name).replace(line, f"{line}    print(mbf.fuse(model, strict=True))\n"))
    plain, _ = learned(name)
    for task, row in plain.items():
        for test, (loss, _) in row.items():
            assert fused[task][test][0] == pytest.approx(loss, abs=1e-3)


# -- what is asked wrongly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prepare", *SCRIPTS, *(f"plain/{name}" for name in SCRIPTS)])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(FOLDER / f"{name}.py", "--help")
    assert not ended.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_without_tasks_is_named(name: str, data: Path, tmp_path: Path) -> None:
    options = ["--use_cpu", "true"] if name != "loop" else []
    with pytest.raises(SystemExit, match=f"no task in {tmp_path}.*prepare.py"):
        run(FOLDER / f"{name}.py", "--model", data / "model", "--tasks", tmp_path, *options)
