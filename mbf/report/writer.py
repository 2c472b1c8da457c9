"""A report on disk: the page, the same pictures as PNG files, and the numbers as CSV and JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mbf.continual.atomic import whole_files
from mbf.report import figures, page, style
from mbf.report.result import RunResult
from mbf.report.summary import SummaryRow, prepare, summary_rows

PAGE = "report.html"


def write_report(results: Iterable[RunResult], out_dir: str | Path) -> Path:
    """Write ``report.html`` and, beside it, its pictures and numbers.

    ``report.html`` is one file without outside resources. Beside it: ``summary.csv`` (one row a method),
    ``matrix-<run>.csv`` and ``heatmap-<run>.png`` (one a run), ``accuracy-<stream>-o<order>.png``,
    ``methods-<stream>.png``, ``memory-<stream>.png`` and ``results.json`` (everything, as it was given).

    Args:
        results: any number of methods, streams, orders and seeds.
        out_dir: made if it does not exist; files of the same names are replaced once all are written, the page last.

    Returns:
        The path of ``report.html``.

    Raises:
        ResultError: before anything is written; see ``mbf.report.summary.prepare``.
        OSError: they cannot be written, and an older report is whole.
    """
    results = prepare(results)
    rows = summary_rows(results)
    with whole_files(out_dir, PAGE) as out:
        _write(out, results, rows)
    return Path(out_dir, PAGE)


def _write(out: Path, results: Sequence[RunResult], rows: Sequence[SummaryRow]) -> None:
    slugs = slugs_of(results)
    for result in results:
        (out / f"heatmap-{slugs[result.cell]}.png").write_bytes(figures.to_png(figures.heat_map(result)))
    streams = list(dict.fromkeys(row.stream for row in rows))
    parts = [
        _stream_part(name, slug, [row for row in rows if row.stream == name], results)
        for name, slug in zip(streams, _slugs(streams), strict=True)
    ]
    for part in parts:
        for picture in (part.methods, part.memory, *part.accuracy.values()):
            if picture is not None:
                (out / picture.name).write_bytes(picture.png)
    for file, text in texts(results, rows, parts, slugs).items():
        (out / file).write_text(text, encoding="utf-8", newline="")


def texts(
    results: Sequence[RunResult], rows: Sequence[SummaryRow], parts: Sequence[page.StreamPart], slugs: Mapping[str, str]
) -> dict[str, str]:
    """By its name, what every file of a report but the pictures holds."""
    dump = {"schema_version": 1, "results": [result.model_dump(mode="json") for result in results]}
    return {
        **{f"matrix-{slugs[result.cell]}.csv": result.matrix.to_csv() for result in results},
        "summary.csv": _summary(rows),
        "results.json": json.dumps(dump, indent=1, ensure_ascii=False) + "\n",
        PAGE: page.render(parts, results, slugs),
    }


def _stream_part(name: str, slug: str, rows: Sequence[SummaryRow], results: Sequence[RunResult]) -> page.StreamPart:
    look = style.looks(rows)
    runs = {row.label: [r for r in results if r.stream == name and r.label == row.label] for row in rows}
    accuracy: dict[int, page.Picture] = {}
    for order in sorted({r.order for of in runs.values() for r in of}):
        of_order = {label: some for label, of in runs.items() if (some := [r for r in of if r.order == order])}
        png = figures.to_png(figures.accuracy_over_time(of_order, look))
        accuracy[order] = page.Picture(f"accuracy-{slug}-o{order}.png", png, page.accuracy_alt(order, of_order))
    memory = None
    if any(r.memory for of in runs.values() for r in of):
        png = figures.to_png(figures.memory_over_tasks(runs, look))
        memory = page.Picture(f"memory-{slug}.png", png, page.memory_alt(rows))
    png = figures.to_png(figures.method_comparison(rows, look, runs))
    methods = page.Picture(f"methods-{slug}.png", png, page.methods_alt(rows))
    return page.StreamPart(name, rows, runs, methods, memory, accuracy)


def slugs_of(results: Sequence[RunResult]) -> dict[str, str]:
    """A part of file names for each run, by its ``cell``."""
    cells = {r.cell: f"{r.stream}-{r.label}-o{r.order}-s{r.seed}" for r in results}
    return dict(zip(cells, _slugs(cells.values()), strict=True))


def _slugs(names: Iterable[str]) -> list[str]:
    """File-name parts, distinct also where file systems ignore case."""
    taken: set[str] = set()
    slugs: list[str] = []
    for name in names:
        base = slug = re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.")[:100] or "x"
        for n in itertools.count(2):
            if slug.lower() not in taken:
                break
            slug = f"{base}-{n}"
        taken.add(slug.lower())
        slugs.append(slug)
    return slugs


def _summary(rows: Sequence[SummaryRow]) -> str:
    flat = [row.flat() for row in rows]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
