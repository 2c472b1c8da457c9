"""What is wrong with a user's values, in lines that a user can act on."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """One line for every value that an ``error`` is about: the dotted key, what is wrong, the way out.

    With ``model``, the class that was to be made, an unknown key is told those that there are.
    """
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if not _names_a_type(part))
        problems.setdefault(where, []).append(problem)
    return [f"{where}: {message}" if where else message for where, message in _messages(problems, model)]


def _messages(problems: dict[str, list[Any]], model: type[BaseModel] | None) -> list[tuple[str, str]]:
    found = []
    for where, ways in problems.items():
        wanted = []  # a union complains of each of its members
        for problem in ways:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                found.append((where, _unknown(problem["loc"], model)))
            elif problem["type"] == "missing":
                found.append((where, "is missing; add it"))
            elif problem["type"] == "value_error":
                found.append((where, message))
            elif problem["type"] != "callable_type" or len(ways) == 1:  # which no file and no command line can give
                wanted.append(message.removeprefix("Input should be ").partition(", unable to")[0])
        if wanted:
            found.append((where, f"found {ways[0]['input']!r}, wanted {' or '.join(dict.fromkeys(wanted))}"))
    return found


def _unknown(location: tuple[str | int, ...], model: type[BaseModel] | None) -> str:
    if model is None:
        return "unknown option"
    known = _keys_at(model, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known: {', '.join(known)}"


def _names_a_type(part: str | int) -> bool:
    """Pydantic puts the member of a union into the location; that is no key of ours."""
    return isinstance(part, str) and (part in ("str", "int", "float", "callable") or "[" in part)


def _keys_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return list(model.model_fields)
