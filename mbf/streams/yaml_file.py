"""Read YAML that somebody else wrote: plain values only, bounded in size, depth and aliases, every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_ALIASES = 100
MAX_VALUES = 100_000


class YamlError(ValueError):
    """No YAML that is taken; the text is one line and names the line where there is one."""


_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(yaml.SafeLoader):
    """Aliases can make a few lines stand for a billion values, and brackets overrun the stack: both are counted.

    Values are those that JSON has, too; what looks like a date is text, and ``!!binary``, ``!!set`` and other tags are
    refused.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
        first: [(tag, form) for tag, form in found if tag in _TAGS or tag.endswith(":merge")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*_TAGS, None)}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise YamlError(f"line {mark.line + 1}: more than {MAX_ALIASES} aliases (*name); write the values out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(f"line {mark.line + 1}: nested deeper than {MAX_DEPTH}; make it flatter")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse_yaml_file(path: Path) -> Any:
    """``parse_yaml`` of a file, of which no more is read than it takes.

    Raises:
        YamlError: as there.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return parse_yaml(file.read(MAX_BYTES + 1))


def parse_yaml(content: bytes | str) -> Any:
    """The plain values of a YAML document; of bytes in UTF-8, with or without a byte order mark.

    At most 1 MiB, 50 levels, 100 aliases, and 100,000 values where each alias counts with all that it stands for.

    Raises:
        YamlError: anything else.
    """
    if len(content) > MAX_BYTES:
        raise YamlError(f"has more than {MAX_BYTES} bytes; rows belong into files of their own")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        line = bytes(error.object[: error.start]).count(b"\n") + 1
        raise YamlError(f"line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise YamlError(where + " ".join(f"{error.context or ''} {error.problem or ''}".split())) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except YamlError:
        raise
    # SafeLoader lets a few through: "0x" is no number, "{{}: 1}" no key.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise YamlError(
            f"a value is not what it looks like: {' '.join(str(error).split()) or type(error).__name__}; "
            f"put it in quotes"
        ) from None


def _size(node: Any, known: dict[int, int]) -> int:
    """The values below ``node``, each alias counted with all that it stands for.

    Keys are compared here, as they are written: once merges are resolved, a key may rightly be there twice.

    Raises:
        YamlError: they are too many, a value holds itself, or a key is there twice.
    """
    if (size := known.get(id(node))) is None:
        known[id(node)] = 0  # until it is known: who meets it now is inside of it
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        size = known[id(node)] = 1 + sum(_size(inner, known) for inner in _inner(node))
    if size == 0 or size > MAX_VALUES:
        found = "holds itself" if size == 0 else f"stands for more than {MAX_VALUES} values"
        raise YamlError(f"line {node.start_mark.line + 1}: what is named by & {found}; write the values out")
    return size


def _check_keys(node: Any) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise YamlError(f"line {line}: key {key.value!r} is there twice; leave one of them out")
            seen.add((key.tag, key.value))


def _inner(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
