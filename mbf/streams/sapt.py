"""Read the folders of the public continual-learning benchmarks, as SAPT and O-LoRA lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mbf.streams.spec import TaskSpec
from mbf.streams.task import Content, Example, Split, StreamError

FILES: dict[Split, list[str]] = {
    "train": ["train.json"],
    "validation": ["dev.json", "validation.json"],
    "test": ["test.json"],
}


def read_sapt(spec: TaskSpec) -> Content:
    """``{train,dev,test}.json``: ``{"Definition": [..], "Instances": [{"input": .., "output": str or [..]}]}``.

    ``labels.json`` beside them, a list, makes it a classification.
    """
    folder = spec.path or Path()
    splits = {}
    for split, names in FILES.items():
        candidates = [folder / name for name in ([spec.splits[split]] if split in spec.splits else names)]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is not None:
            splits[split] = _examples(spec.name, path)
        elif split != "validation":
            raise StreamError(f"task {spec.name!r}: no {candidates[0]}; the SAPT layout wants train, dev and test.json")
    labels = folder / "labels.json"
    return Content(splits, [str(label) for label in _json(spec.name, labels)] if labels.is_file() else None)


def _examples(name: str, path: Path) -> list[Example]:
    content = _json(name, path)
    if not isinstance(content, dict) or not isinstance(content.get("Instances"), list):
        raise StreamError(f"task {name!r}: {path} has no list 'Instances', which the SAPT layout wants")
    given = content.get("Definition", "")
    definition = given if isinstance(given, str) else (given or [""])[0]
    examples = []
    for number, instance in enumerate(content["Instances"], 1):
        output = instance.get("output") if isinstance(instance, dict) else None
        outputs = [output] if isinstance(output, str) else output
        if not outputs or "input" not in instance:
            raise StreamError(
                f"task {name!r}: {path}, instance {number}: wanted 'input' and 'output', found {instance}"
            )
        examples.append(Example(str(instance["input"]), str(definition), tuple(map(str, outputs))))
    return examples


def _json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StreamError(f"task {name!r}: {path} is not JSON: {error}") from error
