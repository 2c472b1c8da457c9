"""Values of options: lists with commas, and ``key=value``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import typer

from mbf.streams.yaml_file import YamlError, parse_yaml


def words(option: str, text: str) -> list[str]:
    """``"slao,seqlora"`` → ``["slao", "seqlora"]``."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise typer.BadParameter(f"found {text!r}, wanted names with commas between them", param_hint=option)
    return found


def numbers(option: str, text: str) -> list[int]:
    """``"1,2"`` → ``[1, 2]``."""
    try:
        return [int(word) for word in words(option, text)]
    except ValueError:
        wanted = "wanted whole numbers with commas between them"
        raise typer.BadParameter(f"found {text!r}, {wanted}", param_hint=option) from None


def settings(option: str, pairs: Iterable[str]) -> dict[str, Any]:
    """``["train.epochs=3"]`` → ``{"train.epochs": 3}``: values are YAML; whoever uses them checks their types."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key.strip() and equals):
            raise typer.BadParameter(f"found {pair!r}, wanted key=value", param_hint=option)
        try:
            found[key.strip()] = parse_yaml(value)
        except YamlError as error:
            reason = f"whose value is no YAML ({error}); put it in quotes"
            raise typer.BadParameter(f"found {pair!r}, {reason}", param_hint=option) from None
    return found


def methods(option: str, text: str) -> list[str | dict[str, Any]]:
    """``"slao,mean={name: slao, schedule: 1/i}"`` → ``["slao", {"name": "slao", "schedule": "1/i", "label": "mean"}]``.

    A label stands before its method with options, which is YAML; without a name in it the label is the method's.
    """
    found: list[str | dict[str, Any]] = []
    for piece in _pieces(text):
        label, equals, mapping = (part.strip() for part in piece.partition("="))
        if not label or (equals and not mapping.startswith("{")):
            wanted = "wanted names with commas between them, or label={name: method, option: value}"
            raise typer.BadParameter(f"found {piece.strip()!r} in {text!r}, {wanted}", param_hint=option)
        if not equals:
            found.append(label)
            continue
        data = settings(option, [piece])[label]
        found.append({"name": label, **data, "label": label})
    return found


def _pieces(text: str) -> list[str]:
    """Split at the commas outside braces, brackets and quotes."""
    pieces, depth = [""], 0
    for token in re.findall(r"\"[^\"]*\"|'[^']*'|.", text, re.DOTALL):
        depth += (token in "{[") - (token in "}]")
        if token == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return pieces
