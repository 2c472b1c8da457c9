"""A stream of three tiny tasks, and settings with which a run over it takes seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["red", "blue", "green", "dog", "cat", "fish", "run", "walk", "jump", "sky", "sea", "land"]
TASKS = {"animal": ["dog", "cat"], "colour": ["red", "light blue", "light green"], "verb": ["run", "walk slowly"]}


def write_stream(root: Path, train: int = 12, test: int = 7) -> Path:
    """The layout ``<root>/<task>/<split>.jsonl``; labels of one and of several tokens, some beginning alike."""
    draw = random.Random(0)
    for task, labels in TASKS.items():
        for split, count in (("train", train), ("test", test)):
            rows = [
                {
                    "text": " ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + f" {split}{n}",
                    "label": labels[n % len(labels)],
                }
                for n in range(count)
            ]
            path = root / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def tiny_settings(stream: Path) -> dict[str, Any]:
    return {
        "stream": str(stream),
        "model": "tiny-random-llama",
        "methods": ["slao"],
        "lora": {"r": 2, "dropout": 0.1},
        "train": {
            "batch_size": 2,
            "accumulation": 2,
            "lr": 0.01,
            "warmup_steps": 1,
            "text_tokens": 16,
            "save_steps": 2,
        },
        "eval": {"batch_size": 4},
    }
