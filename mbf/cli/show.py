"""Facts as tables and lists for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False}


def records(key: str, table: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a record, one column a field; a flag is a tick."""
    grid = Table(**STYLE)
    grid.add_column(key, no_wrap=True)
    for field in next(iter(table.values()), {}):
        grid.add_column(field.replace("_", " "))
    for name, record in table.items():
        cells = [("✓" if value else "") if isinstance(value, bool) else str(value) for value in record.values()]
        grid.add_row(Text(name, style="bold"), *map(Text, cells))
    return grid


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
