"""``docs/errors.md`` from the source; ``python -m tests.documents.errors_page`` writes it, a test compares the two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from mbf import methods
from mbf.run.config import RunConfig

from .messages import ROOT, Message, described, messages, native_messages

PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- written by python -m tests.documents.errors_page -->", "<!-- end -->"

AREAS = {
    "mbf.streams": "Streams and data",
    "mbf.run": "Runs and configurations",
    "mbf.cli": "The command line",
    "mbf.report": "Reports",
    "mbf.continual": "The learner, its checkpoints, merging adapters",
    "mbf.methods": "Methods",
    "mbf.peft": "PEFT layers and adapters",
    "mbf.ops": "Operators",
    "mbf.kernels": "Triton kernels",
    "mbf": "The package",
}


# What stands inside of another message, which has the way out: module → beginnings of the messages.
INNER = {
    "mbf.continual.checkpoint": ("‹…›: ‹error›",),
    "mbf.continual.offline": ("the layers of one adapter",),
    "mbf.methods._state": ("",),
    "mbf.report.result": ("order_tasks is", "skipped has", "‹name› has"),
    "mbf.run.config": ("‹name›: ‹…›",),
    "mbf.run.directory": ("null",),
    "mbf.streams.columns": ("task ‹name›, split ‹split›: ‹error›",),
    "mbf.streams.sources": ("‹name› has more",),
    "mbf.streams.tables": ("found ‹word›",),
    "mbf.streams.yaml_file": ("",),
}


class _Schema(GenerateJsonSchema):
    """JSON has no functions; some options are."""

    def callable_schema(self, schema: Any) -> dict[str, Any]:
        return {"type": "callable"}


# Where the way out begins; what comes first in this list wins.
_SENTENCE = re.compile(r"; |\. (?=[A-Z])")
_HALF = re.compile(r", (?=wanted )|: (?=call |pass |use |let |give |pip )")


def parts(text: str) -> tuple[str, str]:
    """What a message says is wrong, and its way out; "" where it has none but what must be, which it says itself."""
    for border in (_SENTENCE, _HALF):
        if found := border.search(text):
            way = text[found.start() :].lstrip("; ,:.")
            return text[: found.start()], way
    return text, ""


def page() -> str:
    """The part of the page between its marks."""
    blocks = []
    found = whole_messages()
    for prefix, heading in AREAS.items():
        here = [one for one in found if area(one.module) == prefix]
        found = [one for one in found if one not in here]
        if here:
            blocks.append("\n".join([f"## {heading}", "", *table(here)]))
    blocks.append("\n".join(["## Operators called directly", "", NATIVE, "", *native_table()]))
    blocks.append("\n".join(["## Values of a configuration", "", CONFIGURATION, "", *keys()]))
    blocks.append("\n".join(["## Options of the methods", "", OPTIONS, "", *method_options()]))
    blocks.append("\n".join(["## Classes", "", *classes()]))
    return "\n\n".join(blocks)


NATIVE = (
    "`torch.ops.mbf.…` raise `RuntimeError`, headed by operator and argument. The functions of `mbf.ops` look first, "
    "so these are met only where the operators are called themselves."
)
CONFIGURATION = (
    "Of a YAML file, `--set` and the options of `mbf run`. A wrong value is `ConfigError: ‹key›: found ‹value›, wanted "
    "…`; an unknown key names the nearest known one."
)
OPTIONS = (
    "In Python a wrong value is a `pydantic.ValidationError`, in a configuration a `ConfigError`; both name option and "
    "value."
)


def whole_messages() -> list[Message]:
    """Those that a user gets to see as they are."""
    return [
        one for one in messages() if one.text is not None and not one.text.startswith(INNER.get(one.module, ("\0",)))
    ]


def area(module: str) -> str:
    return next(prefix for prefix in AREAS if module == prefix or module.startswith(f"{prefix}."))


def table(found: list[Message]) -> list[str]:
    rows = {(cell(cause), f"`{one.error}`", cell(way)) for one in found for cause, way in [parts(one.text or "")]}
    return ["| what is wrong | error | way out |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in sorted(rows))]


def native_table() -> list[str]:
    rows = {tuple(map(cell, parts(text))) for text in native_messages()}
    return ["| what is wrong | way out |", "|---|---|", *(f"| {' | '.join(row)} |" for row in sorted(rows))]


def keys() -> list[str]:
    schema = RunConfig.model_json_schema(schema_generator=_Schema)
    rows = [f"| `{key}` | {wanted} |" for key, wanted in fields(schema, schema["$defs"])]
    return ["| key | wanted |", "|---|---|", *rows]


def method_options() -> list[str]:
    rows = []
    for name in methods.available():
        schema = methods.get(name).Options.model_json_schema(schema_generator=_Schema)
        rows += [f"| `{name}` | `{key}` | {wanted} |" for key, wanted in fields(schema, schema.get("$defs", {}))]
    return ["| method | option | wanted |", "|---|---|---|", *rows]


def fields(schema: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys, and what each takes."""
    for key, field in schema.get("properties", {}).items():
        reference = field.get("$ref") or (field.get("allOf") or [{}])[0].get("$ref")
        section = defs[reference.rsplit("/", 1)[-1]] if reference else {}
        if "properties" in section:
            yield from fields(section, defs, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", cell(wanted({**field, **section}, defs))


def wanted(field: dict[str, Any], defs: dict[str, Any]) -> str:
    """A JSON schema of one value in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(wanted(one, defs) for one in field["anyOf"]))
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return "a method's name, or its name and options" if name == "MethodSpec" else wanted(defs[name], defs)
    if "enum" in field or "const" in field:
        return " or ".join(f"`{one}`" for one in field.get("enum", [field.get("const")]))
    kinds = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    kinds |= {"array": "a list", "object": "keys and values", "null": "nothing", "callable": "a function"}
    words = kinds.get(field.get("type", ""), "a value, see its description")
    if field.get("type") == "array" and "items" in field:
        words += f" of: {wanted(field['items'], defs)}"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {field[name]:g}" for name, word in limits.items() if name in field]
    if field.get("minItems"):
        bounds.append("not empty")
    return ", ".join([words, *bounds])


def classes() -> list[str]:
    """What each of the package's own errors means, by name; those of the command line are printed, not caught."""
    raised = {one.error for one in messages()}
    return [f"- `{name}`: {text}" for name, text in sorted(described().items()) if name in raised]


def cell(text: str) -> str:
    """For a table in Markdown: one line, nothing of it taken as HTML, as emphasis or as a column's end."""
    line = " ".join(text.split()).replace("|", "\\|")
    spans = line.split("`") if line.count("`") % 2 == 0 else [line.replace("`", "\\`")]
    for n in range(0, len(spans), 2):  # the others are code
        spans[n] = re.sub(r"([*_\[\]])", r"\\\1", spans[n]).replace("<", "&lt;").replace(">", "&gt;")
        spans[n] = spans[n].replace("{", "&#123;")  # at the end of a cell it would be a list of attributes
    return "`".join(spans)


def written(text: str) -> str:
    """The page with the tables in their place."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{page()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
