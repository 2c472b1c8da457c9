"""Read the folders of the public continual-learning benchmarks, as SAPT and O-LoRA lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mbf.streams.spec import TaskSpec
from mbf.streams.tables import as_text
from mbf.streams.task import Content, Example, Split, StreamError

MAX_JSON = 1 << 30
"""Bytes of a file, which is read as one value."""

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
    return Content(splits, _labels(spec.name, labels) if labels.is_file() else None)


def _examples(name: str, path: Path) -> list[Example]:
    content = _json(name, path)
    if not isinstance(content, dict) or not isinstance(content.get("Instances"), list):
        raise StreamError(
            f"task {name!r}: {path} has no list 'Instances'; the SAPT layout wants "
            '{"Definition": [..], "Instances": [{"input": .., "output": ..}]}'
        )
    given = content.get("Definition", "")
    definition = (given or [""])[0] if isinstance(given, list) else given
    definition = as_text(definition, f"task {name!r}: {path}", "Definition")
    examples = []
    for number, instance in enumerate(content["Instances"], 1):
        where = f"task {name!r}: {path}, instance {number}"
        output = instance.get("output") if isinstance(instance, dict) else None
        outputs = output if isinstance(output, list) else [output]
        if not outputs or outputs == [None] or instance.get("input") is None:
            raise StreamError(
                f"{where}: wanted 'input' and 'output', found {str(instance)[:200]}; fill it in, or remove it"
            )
        text = as_text(instance["input"], where, "input")
        examples.append(Example(text, definition, tuple(as_text(one, where, "output") for one in outputs)))
    return examples


def _labels(name: str, path: Path) -> list[str]:
    labels = _json(name, path)
    if not isinstance(labels, list):
        raise StreamError(f"task {name!r}: {path} holds {type(labels).__name__}, wanted a list of labels")
    return [as_text(label, f"task {name!r}: {path}", "a label") for label in labels]


def _json(name: str, path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) <= MAX_JSON:
            return json.loads(content)
    except OSError as error:
        raise StreamError(f"task {name!r}: {path} cannot be read: {error.strerror}; name a file that can") from None
    except UnicodeDecodeError as error:
        raise StreamError(f"task {name!r}: {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise StreamError(f"task {name!r}: {path} is nested too deep; wanted the SAPT layout") from None
    except ValueError as error:
        raise StreamError(f"task {name!r}: {path} is not JSON: {error}; mend it, or restore it from a copy") from None
    raise StreamError(
        f"task {name!r}: {path} is longer than {MAX_JSON} bytes; split the task, or write its rows as JSONL"
    )
