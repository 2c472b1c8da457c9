"""``mbf merge`` and ``mbf methods``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbf.cli import show, values
from mbf.cli.console import out as console

if TYPE_CHECKING:
    from mbf.continual import MergeReport


_SHOWN = 10


def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapters, in the order in which they were trained.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged adapter; an older one there is replaced.")],
    method: Annotated[str, typer.Option("--method", help="How to merge; see mbf methods.")] = "slao",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Re-compress the result: the largest rank that a layer of it may have."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method; repeat for more.")
    ] = None,
) -> None:
    """Merge trained PEFT LoRA adapters one after another into one.

    With --rank, B A of every layer above it becomes its best approximation, and the share of its norm kept is printed.

    One adapter alone is just re-compressed.

    Different ranks: --method inclora sums them; slao needs --option basis=rsvd --option B_start=preserve.
    """
    from mbf.continual import merge_adapters

    settings = values.settings("--option", option or [])
    if "rank" in settings:
        raise typer.BadParameter(
            "found rank; leave it out: the adapters decide it while they are merged, and --rank that of the result",
            param_hint="--option",
        )
    if own := sorted(settings.keys() & {"adapters", "out", "method"}):
        raise typer.BadParameter(
            f"found {own[0]}, which is no option of a method; give the adapters as arguments, --out and --method",
            param_hint="--option",
        )
    report = merge_adapters(adapters, out, method=method, rank=rank, **settings)
    if rank is not None:
        _show_compression(rank, report)
    some = "1 adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    console().print(f"{some} merged by {method}: {report.path}", markup=False, soft_wrap=True)


def _show_compression(rank: int, report: MergeReport) -> None:
    """The layers that keep least, and a line for all."""
    if not report.compressed:
        console().print(f"no layer has a rank above {rank}; nothing to re-compress")
        return
    worst = sorted(report.compressed, key=lambda layer: layer.kept)
    table = {
        layer.name: {
            "rank": f"{layer.before} → {layer.after}",
            "norm kept": _percent(layer.kept),
            "relative error": _percent(layer.lost / layer.norm if layer.norm else 0.0),
        }
        for layer in worst[:_SHOWN]
    }
    console().print(show.records("layer", table))
    if rest := worst[_SHOWN:]:
        console().print(f"and {len(rest)} more, which keep {_percent(rest[0].kept)} or more")
    console().print(
        f"re-compressed to rank {rank}: {_percent(report.kept)} of the Frobenius norm kept over {len(worst)} layers, "
        f"{_percent(worst[0].kept)} at least"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


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
        _show_methods(table)


HEADS = {
    "merge": "merge rule",
    "memory": "memory in tasks",
    "task_id": "needs task id",
    "foldable": "plain LoRA",
    "grade": "source grade",
}
GRADES = {
    "CODE": "the authors' public code",
    "NOTE": "a published note that has the equations",
    "3RD": "somebody else's implementation or formalisation",
    "ABS": "the abstract alone, so that most of the rule is ours",
    "standard": "common practice",
    "paper": "the paper's own text and equations",
}
NOTES = (
    "memory in tasks: all that persists, in sizes P of one LoRA, with T tasks",
    "data free: no rows of old tasks are kept; needs task id: inference is as trained only where the task is named",
    "plain LoRA: the result is one; otherwise what plain PEFT loads approximates it",
    "source grade: where the rule is from; what the source leaves open is an option of ours",
)
_LEAST, _WIDE = 100, 160  # columns


def _show_methods(table: dict[str, dict[str, Any]]) -> None:
    """Nothing is cut: in a terminal of less than 100 columns, the terminal wraps. Titles and sources need more."""
    screen = console()
    screen.width = max(screen.width, _LEAST)
    if screen.width < _WIDE:
        table = {name: {k: v for k, v in row.items() if k not in ("title", "source")} for name, row in table.items()}
    show.wrapped(screen, "method", table, HEADS)
    for line in NOTES:
        screen.print(line, markup=False, soft_wrap=True)
    for grade, meaning in GRADES.items():
        screen.print(f"  {grade:<8}  {meaning}", markup=False)
    more = "The" if screen.width >= _WIDE else "Titles, sources and the"
    screen.print(f"{more} options of each, with their defaults: mbf methods --json")


def _options(model: Any) -> dict[str, Any]:
    return {
        name: {"default": field.get_default(call_default_factory=True), "description": field.description}
        for name, field in model.model_fields.items()
    }
