"""A LoRA learns one task after another in a plain PyTorch loop, and is tested on all of them after each.

Tasks are folders with train.jsonl and test.jsonl, whose rows have the columns "prompt" and "completion";
examples/prepare.py writes some, and a model.
"""

import argparse
import json
from pathlib import Path

import mbf
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="data/model", help="a causal language model: a folder, or an id of the hub")
    add("--tasks", default="data/tasks", help="folder of the tasks, learned in the order of their names")
    add("--output", default="runs/loop", help="where to save the adapter")
    add("--rank", type=int, default=8, help="r of the LoRA")
    add("--alpha", type=int, default=16, help="lora_alpha; the LoRA counts with alpha / r")
    add("--dropout", type=float, default=0.05, help="lora_dropout")
    add("--max-length", type=int, default=512, help="tokens that are kept of a prompt")
    add("--epochs", type=int, default=3, help="passes over a task")
    add("--batch-size", type=int, default=8, help="rows of a forward")
    add("--accumulation", type=int, default=1, help="forwards of an optimiser step")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--bf16", action="store_true", help="forward under autocast to bfloat16")
    add("--checkpointing", action="store_true", help="make activations again in backward instead of keeping them")
    add("--seed", type=int, default=0, help="of the LoRA's start, the batches and the dropout")
    return parser.parse_args()


def load_rows(file: Path, tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Token ids of prompt and completion; the loss is on the completion alone."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        prompt = tokenizer(example["prompt"], truncation=True, max_length=max_length)["input_ids"]
        answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def load_tasks(args: argparse.Namespace, tokenizer) -> dict[str, dict[str, list]]:
    """The rows of every task by split, in the order in which the tasks are learned."""
    found = sorted(path.parent for path in Path(args.tasks).glob("*/train.jsonl"))
    if not found:
        raise SystemExit(
            f"no task in {args.tasks}: it has no <task>/train.jsonl; run examples/prepare.py, or give --tasks"
        )
    return {
        task.name: {
            split: load_rows(task / f"{split}.jsonl", tokenizer, args.max_length) for split in ("train", "test")
        }
        for task in found
    }


def forward(model, batch, args: argparse.Namespace):
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        return model(**batch.to(device))


def train(model, loader: DataLoader, args: argparse.Namespace) -> None:
    steps = args.epochs * -(-len(loader) // args.accumulation)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    model.train()
    for _ in range(args.epochs):
        for n, batch in enumerate(loader, 1):
            loss = forward(model, batch, args).loss
            (loss / args.accumulation).backward()
            if n % args.accumulation == 0 or n == len(loader):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


@torch.no_grad()
def evaluate(model, loader: DataLoader, args: argparse.Namespace) -> tuple[float, float]:
    """The loss, and the share of rows whose completion is the most likely one, token by token."""
    model.eval()
    losses, right = [], []
    for batch in loader:
        output = forward(model, batch, args)
        labels = batch["labels"][:, 1:].to(output.logits.device)
        losses.append(output.loss)
        right.append(((output.logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1))
    return torch.stack(losses).mean().item(), torch.cat(right).float().mean().item()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.checkpointing:
        base.gradient_checkpointing_enable()
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    learner = mbf.ContinualLora(model)

    tasks = load_tasks(args, tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer)
    tests = {name: DataLoader(task["test"], args.batch_size, collate_fn=collator) for name, task in tasks.items()}
    for name, task in tasks.items():
        loader = DataLoader(task["train"], args.batch_size, shuffle=True, collate_fn=collator)
        with learner.task(name):
            train(model, loader, args)
        scores = {test: evaluate(model, rows, args) for test, rows in tests.items()}
        shown = [f"{test} {loss:.4f} {accuracy:.1%}" for test, (loss, accuracy) in scores.items()]
        print(f"after {name}: " + "   ".join(shown))
    model.save_pretrained(args.output)
    print(f"adapter in {args.output}")


if __name__ == "__main__":
    main()
