"""``mbf merge`` and ``mbf methods``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mbf.cli import show, values
from mbf.cli.console import out as console


def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapters, in the order in which they were trained.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged adapter.")],
    method: Annotated[str, typer.Option("--method", help="How to merge; see mbf methods.")] = "slao",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method; repeat for more.")
    ] = None,
) -> None:
    """Merge trained PEFT LoRA adapters one after another into one."""
    from mbf.continual import merge_adapters

    written = merge_adapters(adapters, out, method=method, **values.settings("--option", option or []))
    console().print(f"{len(adapters)} adapters merged by {method}: {written}", markup=False, soft_wrap=True)


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with each method's options.")] = False,
) -> None:
    """List the continual-learning methods."""
    from mbf import methods as known

    table = {name: dataclasses.asdict(known.get(name).info) for name in known.available()}
    if as_json:
        for name, row in table.items():
            row["options"] = _options(known.get(name).Options)
        print(json.dumps(table, indent=2, ensure_ascii=False))
    else:
        console().print(show.records("method", table))
        console().print("The options of each, with their defaults: mbf methods --json")


def _options(model: Any) -> dict[str, Any]:
    return {
        name: {"default": field.get_default(call_default_factory=True), "description": field.description}
        for name, field in model.model_fields.items()
    }
