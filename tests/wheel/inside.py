"""What a clean environment must be able to do; run there by its own Python, outside the checkout, one part a process.

``python -I inside.py PART FOLDER``: PART is a function below, FOLDER is where it leaves what the next part, or the
comparison with another installation, reads. Nothing but the standard library is imported before a part begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TASKS = {"vowels": ("a", "e"), "digits": ("1", "2")}


def library(folder: Path) -> None:
    """An operator, and a learner."""
    operator(folder)
    learner(folder)


def operator(folder: Path) -> None:
    """mbf is the one that is installed here; its fused layer, forward and backward, agrees with its reference."""
    import torch

    import mbf
    from mbf import ops

    assert Path(mbf.__file__).is_relative_to(sys.prefix), f"mbf comes from {mbf.__file__}, not from {sys.prefix}"
    torch.manual_seed(1)
    shapes = [(37, 48), (24, 48), (4, 48), (24, 4)]
    start = [torch.randn(shape) for shape in shapes]
    dy = torch.randn(37, 24)
    found = []
    for compute in (ops.lora_linear, ops.lora_linear_ref):
        tensors = [tensor.clone().requires_grad_(n != 1) for n, tensor in enumerate(start)]
        y = compute(*tensors, scale=0.5, dropout_p=0.1, seed=torch.tensor(5))
        y.backward(dy)
        found.append([y.detach(), *(tensor.grad for tensor in tensors if tensor.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.save(found[0], folder / "operator.pt")
    status = ops.native_status()
    print(f"mbf {mbf.__version__} under torch {torch.__version__}, compiled extension: {status.reason}")


def doctor(folder: Path) -> None:
    """``mbf doctor`` runs as a command, and leaves what it says as JSON."""
    said = subprocess.run([command(), "doctor", "--json"], check=True, capture_output=True, text=True).stdout
    (folder / "doctor.json").write_text(said)
    found = json.loads(said)
    print(f"doctor: {found['compiled extension']['reason']}; CUDA kernels: {found['gpu']['CUDA kernels']}")


def refused(folder: Path) -> None:
    """Without the packages of the command line, ``mbf`` says in one line what to install."""
    run = subprocess.run([command(), "doctor"], check=False, capture_output=True, text=True)
    lines = run.stderr.strip().splitlines()
    assert run.returncode == 2 and len(lines) == 1 and 'pip install "mbf[run]"' in lines[0], run
    print(f"mbf doctor: {lines[0]}")


def learner(folder: Path) -> None:
    """A tiny Llama is fused, learns two tasks by fast calls, and is saved with its logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import mbf
    from mbf.peft import calls

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]))
    mbf.fuse(model, strict=True)
    continual = mbf.ContinualLora(model, method="slao")
    for name in TASKS:
        with continual.task(name):
            model.train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
            for _ in range(3):
                ids = torch.randint(61, (4, 9))
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert calls["fast"] > 0 and calls["slow"] == 0, f"calls of the fused layers: {dict(calls)}"
    continual.save(folder / "adapter")
    ids = torch.randint(61, (4, 9))
    with torch.no_grad():
        tuned = model.eval()(ids).logits
        with model.disable_adapter():
            assert (tuned - model(ids).logits).abs().max() > 1e-3, "two tasks changed nothing"
    torch.save({"ids": ids, "logits": tuned}, folder / "learner.pt")
    print(f"two tasks learned: {calls['fast']} fast calls, none slow")


def plain(folder: Path) -> None:
    """PEFT alone, where mbf cannot be imported, loads the adapter and computes the same logits."""
    sys.modules["mbf"] = None  # type: ignore[assignment]
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    saved = torch.load(folder / "learner.pt")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(saved["ids"]).logits, saved["logits"], rtol=1e-4, atol=1e-4)
    print("plain PEFT computes the same from what was saved")


def run(folder: Path) -> None:
    """``mbf run`` learns two tasks from JSONL files of one's own, and writes matrix, adapter and report."""
    stream = folder / "letters"
    for task, labels in TASKS.items():
        for split, rows in (("train", 16), ("test", 6)):
            path = stream / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"text": f"{split} {n} {labels[n % 2] * 3}", "label": labels[n % 2]} for n in range(rows)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [part for value in ("model=tiny-random-llama", "train.batch_size=4") for part in ("--set", value)]
    subprocess.run(
        [command(), "run", stream, "--output", folder / "run", *settings], check=True, stdout=subprocess.DEVNULL
    )
    (cell,) = (folder / "run" / "cells").iterdir()
    matrix = json.loads((cell / "result.json").read_text())["matrix"]
    assert len(matrix["scores"]) == len(TASKS) and (folder / "run" / "report" / "report.html").stat().st_size > 10_000
    print(f"mbf run: tasks {', '.join(matrix['tasks'])}, scores {matrix['scores']}")


def command() -> str:
    """The console script that the wheel installed beside this Python."""
    return str(Path(sys.executable).parent / "mbf")


PARTS = {part.__name__: part for part in (refused, doctor, library, plain, run)}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Path(sys.argv[2]))
