"""Which cells a comparison has: what a call asks for, what was asked for before, and how far each cell is.

``compare.json`` holds the cells in the order of asking. What was asked for is the union of all calls; stream, model,
adapter, training and evaluation are those of the first, or scores would not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictInt

from mbf import methods
from mbf.continual.metrics import MALFORMED, first_error
from mbf.report import RunResult
from mbf.report.result import parse_result
from mbf.run.cell import CellKey, cells_of
from mbf.run.config import ConfigError, MethodSpec, RunConfig, differences, parse_config, read_source, set_keys
from mbf.run.directory import COMPARISON, CellDirectory, RunDirectory, RunError, check_free, read_json, write_json
from mbf.run.ledger import Ledger

FORMAT = 1
FAILED = "failed.json"
_PLAN_WAY = "restore it from a copy, or remove it and ask for the cells again"
_ASKED = ("methods", "orders", "seeds")  # what may grow; all else of a configuration is settings


class _Cell(BaseModel):
    model_config = ConfigDict(extra="forbid")

    method: MethodSpec
    order: StrictInt
    seed: StrictInt


class _Plan(BaseModel):
    """``compare.json``."""

    model_config = ConfigDict(extra="forbid")

    format: int
    cells: list[_Cell]


class _Failure(BaseModel):
    """``failed.json``, as far as it is read."""

    reason: str


@dataclass(frozen=True)
class CellState:
    """How far a cell is; ``detail`` is why it failed, or how many tasks are learned."""

    key: CellKey
    state: Literal["finished", "failed", "begun", "missing"]
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    """What a call left behind.

    Attributes:
        directory: where; ``report/`` in it has table, picture and numbers once a cell is finished.
        cells: the state of every cell asked for so far.
        results: of those that are finished.
        failed: the reason by cell, of those that this call ran.
    """

    directory: Path
    cells: tuple[CellState, ...]
    results: list[RunResult]
    failed: Mapping[str, str]

    @property
    def left(self) -> list[str]:
        """Cells that are neither finished nor failed in this call."""
        return [one.key.name for one in self.cells if one.state != "finished" and one.key.name not in self.failed]

    def asked(self) -> dict[str, int]:
        """Cells asked for, by label."""
        labels = [one.key.method.label for one in self.cells]
        return {label: labels.count(label) for label in dict.fromkeys(labels)}

    def reasons(self) -> dict[str, str]:
        """Why cells failed, by cell, whichever call ran them."""
        return {one.key.name: one.detail for one in self.cells if one.state == "failed"}


# -- what is asked for -------------------------------------------------------------------------------------------------


def ask(source: str | Path | None, settings: Mapping[str, Any] | None = None) -> tuple[RunConfig, list[CellKey]]:
    """The configuration and the cells of one call.

    What the call leaves out is as the comparison in its directory has it: without methods, orders and seeds it adds no
    cell; with orders or seeds alone it adds them to all labels that are there; else orders are [1] and seeds [0].

    Args:
        source: as for ``load_config``; None where ``settings`` has the stream, or an output that holds a comparison.
        settings: values over those of the file by dotted key.

    Returns:
        (configuration, whose ``output`` is the directory; cells to add).

    Raises:
        ConfigError, RunError: see ``load_config``; no methods, or no stream; a directory that holds something else.
    """
    data = set_keys({}, settings or {}) if source is None else read_source(source, settings)
    where = str(source) if source is not None and Path(source).suffix else ""
    output = data.get("output")
    if "stream" not in data and not (output and is_run(Path(output))):
        raise ConfigError("stream: is missing; name one, a --config that has one, or an --out that holds a comparison")
    if "stream" in data:
        output = output_of(parse_config(data, where))
    root = Path(str(output))
    named = [key for key in _ASKED if key in data]
    if is_run(root):
        run = RunDirectory.open(root)
        data = _over(settings_of(run.facts["config"]), data)
        if named and "methods" not in named:
            data["methods"] = list(
                {key.method.label: key.method.model_dump(mode="json") for key in planned_cells(run)}.values()
            )
    elif "methods" not in named:
        raise ConfigError("methods: are missing; name some, --methods slao,seqlora, or have them in a --config")
    config = parse_config(data, where).model_copy(update={"output": root})
    return config, cells_of(config) if named else []


def _over(there: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with what it leaves out, in its sections, too."""
    merged = {**there, **data}
    for section in ("lora", "train", "eval"):
        if isinstance(data.get(section), Mapping):
            merged[section] = {**there[section], **data[section]}
    return merged


def output_of(config: RunConfig) -> Path:
    """Without a name of its own it is one that the same call finds again."""
    return config.output or Path("runs", f"{config.stream_name}-compare")


def is_run(root: Path) -> bool:
    """Whether a run or a comparison was started there."""
    return (root / "run.json").exists()


def settings_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What all cells have in common, of ``RunConfig.plain()``."""
    return {key: value for key, value in plain.items() if key not in _ASKED}


# -- the cells of a directory ------------------------------------------------------------------------------------------


def survey(config: RunConfig, cells: Sequence[CellKey] | None = None) -> Comparison:
    """How far the comparison of ``config`` would be with ``cells`` added; nothing is written.

    Raises:
        RunError: as ``compare``.
    """
    root = output_of(config)
    asked = cells_of(config) if cells is None else cells
    if not is_run(root):
        check_free(root)
        return state_of(root, grown(root, [], asked), {})
    run = RunDirectory.open(root)
    check_settings(run, config)
    return state_of(root, grown(root, planned_cells(run), asked), {})


def planned_cells(run: RunDirectory) -> list[CellKey]:
    """The cells asked for so far; of a run that never was compared, its own."""
    path = run.root / COMPARISON
    data = read_json(path, _PLAN_WAY)
    return cells_of(run.config) if data is None else check_plan(data, path)


def check_plan(data: Any, path: Path) -> list[CellKey]:
    """The cells that ``data``, of the file ``path``, asks for.

    Raises:
        RunError: another format, or something else than ``write_plan`` writes.
    """
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise RunError(
            f"{path.parent}: {path.name} has format {data.get('format')!r}, this mbf reads {FORMAT}; use that mbf"
        )
    try:
        cells = _Plan.model_validate(data).cells
    except MALFORMED as error:
        raise RunError(f"{path}: found {first_error(error)}, wanted the cells asked for; {_PLAN_WAY}") from None
    return [CellKey(cell.method, cell.order, cell.seed) for cell in cells]


def write_plan(root: Path, cells: Iterable[CellKey]) -> None:
    """Replace ``compare.json`` in one step."""
    written = [{"method": key.method.model_dump(mode="json"), "order": key.order, "seed": key.seed} for key in cells]
    write_json(root / COMPARISON, {"format": FORMAT, "cells": written})


def grown(root: Path, planned: Sequence[CellKey], asked: Sequence[CellKey]) -> list[CellKey]:
    """Both, each cell once; a label stands for one method with one set of options."""
    known = {key.method.label: key.method for key in planned}
    cells = {key.name: key for key in planned}
    for key in asked:
        there = known.setdefault(key.method.label, key.method)
        if _rule(there) != _rule(key.method):
            raise RunError(
                f"{root}: the label {key.method.label!r} stands for {_words(there)} there, and {_words(key.method)} is "
                "asked for; give it another label"
            )
        cells.setdefault(key.name, replace(key, method=there))
    return list(cells.values())


def _rule(method: MethodSpec) -> tuple[str, Any]:
    """Equal where the results would be: options left out have their defaults."""
    return method.name, methods.get(method.name).Options(**method.options)


def _words(method: MethodSpec) -> str:
    return method.name + "".join(f", {key}={value}" for key, value in method.options.items())


def state_of(root: Path, cells: Sequence[CellKey], failed: Mapping[str, str]) -> Comparison:
    """How far ``cells`` are on disk, of which ``failed`` are the call's own failures."""
    states, results = [], []
    for key in cells:
        directory = CellDirectory(root / "cells" / key.name)
        if (data := read_json(directory.result)) is not None:
            results.append(parse_result(data, directory.result))
            states.append(CellState(key, "finished"))
        elif (failure := read_json(directory.root / FAILED)) is not None:
            states.append(CellState(key, "failed", check_failure(failure, directory.root / FAILED)))
        elif (data := read_json(directory.progress)) is not None:
            ledger = Ledger.parse(data, directory.progress)
            states.append(CellState(key, "begun", _progress(ledger)))
        else:
            begun = directory.root.exists() and any(directory.root.rglob("checkpoint-*"))
            states.append(CellState(key, "begun", "in the first task") if begun else CellState(key, "missing"))
    return Comparison(root, tuple(states), results, failed)


def check_failure(data: Any, path: Path) -> str:
    """Why a cell failed, as the file ``path`` has it.

    Raises:
        RunError: ``data`` does not say.
    """
    try:
        return _Failure.model_validate(data).reason
    except MALFORMED as error:
        raise RunError(
            f"{path}: found {first_error(error)}, wanted the reason of a failure; remove it, and the cell is run again"
        ) from None


def _progress(ledger: Ledger) -> str:
    skipped = sum(one.skipped is not None for one in ledger.learned)
    learned = f"{len(ledger.learned) - skipped} of {len(ledger.tasks)} tasks learned"
    return f"{learned}, {skipped} skipped" if skipped else learned


def check_settings(run: RunDirectory, config: RunConfig) -> None:
    """Raise RunError where ``config`` would have made the cells otherwise."""
    changed = differences(settings_of(run.facts["config"]), settings_of(config.plain()))
    if changed:
        raise RunError(
            f"{run.root}: what is there was made with other settings than those asked for: {'; '.join(changed)}. "
            "Ask for the same, or name another --out"
        )
