"""Writes what the other examples learn from: a model, and tasks as JSONL files with "prompt" and "completion".

python examples/prepare.py                                   # SmolLM2-135M and three real tasks, into data/
python examples/prepare.py --model tiny-random-llama         # a random model of two layers, to try things out
python examples/prepare.py --stream real-5 --order 2         # or a folder or YAML file as in docs/data.md
"""

import argparse
import json
import shutil
from pathlib import Path

from mbf.run.model import PACKAGED, SMOLLM2, load_model
from mbf.streams import load_stream


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--to", type=Path, default=Path("data"), help="where to write model/ and tasks/ (default: data)")
    add("--model", default=SMOLLM2, help=f"{', '.join(PACKAGED)}, a folder or an id of the hub")
    add("--stream", default="quickstart", help="a packaged stream, a folder or a YAML file (default: quickstart)")
    add("--order", type=int, default=1, help="which of the stream's orders (default: 1)")
    add("--train-rows", type=int, help="at most so many rows a task")
    add("--test-rows", type=int, help="at most so many rows a task")
    add("--text-length", type=int, default=800, help="characters that are kept of a text (default: 800)")
    return parser.parse_args()


def write(file: Path, rows, text_length: int) -> None:
    """The question comes after the text, so the text is what is cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            prompt = row["text"][:text_length] + row["question"]
            print(json.dumps({"prompt": prompt, "completion": f" {row['answer']}"}), file=out)


def main() -> None:
    args = arguments()
    stream = load_stream(args.stream, train_rows=args.train_rows, test_rows=args.test_rows)
    model, tokenizer = load_model(args.model)
    for part in (model, tokenizer):
        part.save_pretrained(args.to / "model")
    tasks = args.to / "tasks"
    shutil.rmtree(tasks, ignore_errors=True)  # of another stream
    for number, name in enumerate(stream.orders[args.order], 1):
        for split in ("train", "test"):
            write(tasks / f"{number}-{name}" / f"{split}.jsonl", getattr(stream.tasks[name], split), args.text_length)
    print(f"model in {args.to / 'model'}, tasks in {tasks}: {', '.join(sorted(path.name for path in tasks.iterdir()))}")


if __name__ == "__main__":
    main()
