"""What is wrong with a user's values, in lines that a user can act on."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for every problem in an ``error`` about ``model``: the dotted key, what is wrong, the way out."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if not _names_a_type(part))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _keys_at(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            message = f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known: {', '.join(known)}"
        elif problem["type"] == "missing":
            message = "is missing; add it"
        elif problem["type"] != "value_error":
            message = f"found {problem['input']!r}, wanted {message.removeprefix('Input should be ')}"
        lines.append(f"{where}: {message}" if where else message)
    return lines


def _names_a_type(part: str | int) -> bool:
    """Pydantic puts the member of a union into the location; that is no key of ours."""
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


def _keys_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return list(model.model_fields)
