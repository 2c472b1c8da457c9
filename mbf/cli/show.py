"""Facts as tables and lists for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False}
_LONGEST, _SHORTEST = 16, 8  # words that are kept whole where there is room, and in any case


def records(key: str, table: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a record, one column a field; a flag is a tick."""
    grid = Table(**STYLE)
    grid.add_column(key, no_wrap=True)
    for field in next(iter(table.values()), {}):
        grid.add_column(field.replace("_", " "))
    for name, record in table.items():
        grid.add_row(Text(name, style="bold"), *(Text(_cell(value)) for value in record.values()))
    return grid


def wrapped(console: Console, key: str, table: Mapping[str, Mapping[str, Any]], heads: Mapping[str, str]) -> None:
    """Print the same with nothing cut: texts wrap, and words are broken only where they would not fit otherwise.

    Args:
        console: its width is raised where even that is not enough; a terminal then wraps the lines.
        key: the head of the names.
        table: at least one record, by name.
        heads: by field, where its own name is not what a reader needs.
    """
    fields = next(iter(table.values()))
    texts = [[heads.get(field, field.replace("_", " ")) for field in fields]]
    texts += [[_cell(value) for value in record.values()] for record in table.values()]
    columns = [[key, *table], *map(list, zip(*texts, strict=True))]
    widths = _widths(columns, console.width - 2 * len(columns) - 1)
    console.width = max(console.width, sum(widths) + 2 * len(columns) + 1)
    grid = Table(**STYLE, padding=(0, 1, 0, 0))
    for (head, *_), width in zip(columns, widths, strict=True):
        grid.add_column(head, width=width, overflow="fold")
    for name, *cells in list(zip(*columns, strict=True))[1:]:
        grid.add_row(Text(name, style="bold"), *map(Text, cells))
    console.print(grid)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths for ``columns``, each a head and its cells, that sum to ``room`` at most, if that is enough for words of
    eight letters; names are never broken. What remains goes where texts need most lines."""
    words = [max(len(word) for text in column for word in text.split() or [""]) for column in columns]
    for longest in range(_LONGEST, _SHORTEST - 1, -1):
        widths = [words[0], *(min(word, longest) for word in words[1:])]
        if sum(widths) <= room:
            break
    most = [max(map(len, cells)) for _, *cells in columns]
    while sum(widths) < room and (narrow := [n for n, width in enumerate(widths) if width < most[n]]):
        widths[max(narrow, key=lambda n: most[n] / widths[n])] += 1
    return widths


def _cell(value: Any) -> str:
    return ("✓" if value else "") if isinstance(value, bool) else str(value)


def sections(console: Console, data: dict[str, dict[str, Any]]) -> None:
    """Nested facts as indented lines; a dict inside is a list of sizes in bytes."""
    for section, items in data.items():
        console.print(Text(section, style="bold"))
        for item, value in items.items():
            if isinstance(value, dict):
                console.print(Text(f"  {item}: {'' if value else 'none'}".rstrip()))
                for name, size in value.items():
                    console.print(Text(f"    {size / 1e6:>9.1f} MB  {name}"), soft_wrap=True)
            else:
                console.print(Text(f"  {item}: {_fact(value)}"), soft_wrap=True)


def _fact(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
