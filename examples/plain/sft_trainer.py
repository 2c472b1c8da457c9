"""A LoRA learns one task after another with TRL's SFTTrainer, and is tested on all of them after each.

Tasks are folders with train.jsonl and test.jsonl, whose rows have the columns "prompt" and "completion";
examples/prepare.py writes some, and a model. Options are the ones below and those of SFTConfig.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer


@dataclass
class Arguments:
    model: str = field(
        default="data/model", metadata={"help": "A causal language model: a folder, or an id of the hub."}
    )
    tasks: str = field(
        default="data/tasks", metadata={"help": "Folder of the tasks, learned in the order of their names."}
    )
    rank: int = field(default=8, metadata={"help": "r of the LoRA."})
    alpha: int = field(default=16, metadata={"help": "lora_alpha; the LoRA counts with alpha / r."})
    dropout: float = field(default=0.05, metadata={"help": "lora_dropout."})


def load_tasks(folder: str) -> dict[str, DatasetDict]:
    """The tasks by name, in the order in which they are learned."""
    found = sorted(path.parent for path in Path(folder).glob("*/train.jsonl"))
    if not found:
        raise SystemExit(f"no task in {folder}: it has no <task>/train.jsonl; run examples/prepare.py, or give --tasks")
    files = {task: {split: str(task / f"{split}.jsonl") for split in ("train", "test")} for task in found}
    return {task.name: load_dataset("json", data_files=files[task]) for task in found}


def main() -> None:
    parser = HfArgumentParser((Arguments, SFTConfig), description=__doc__)
    parser.set_defaults(
        output_dir="runs/sft_trainer", learning_rate=1e-3, bf16=False, save_strategy="no", report_to="none"
    )
    args, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)

    tasks = load_tasks(args.tasks)
    tests = {name: task["test"] for name, task in tasks.items()}
    for name, task in tasks.items():
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=task["train"],
            eval_dataset=tests,
            processing_class=tokenizer,
        )
        trainer.train()
        scores = {test: trainer.evaluate(rows) for test, rows in trainer.eval_dataset.items()}
        shown = [
            f"{test} {found['eval_loss']:.4f} {found['eval_mean_token_accuracy']:.1%}" for test, found in scores.items()
        ]
        print(f"after {name}: " + "   ".join(shown))
    model.save_pretrained(training.output_dir)
    print(f"adapter in {training.output_dir}")


if __name__ == "__main__":
    main()
