"""The written report: numbers equal to the matrix, pictures that show something, and nothing that data can break."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mbf.continual.metrics import FORMULAS, ScoreMatrix
from mbf.report import ResultError, RunResult, summary_rows, write_report
from mbf.report.style import OUTLINE, heat, number, size
from tests.report.examples import run, skipping

BACK = ("trec", "agnews", "sst2")


class Page(HTMLParser):
    """Tables by id as rows of cell texts, and every tag with its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[str]] | None = None
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attributes).get("id", ""), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self._rows[-1][-1] += data

    def scores(self, table: str) -> list[list[str]]:
        """The numbers of a score matrix: without head rows and task names."""
        return [row[1:] for row in self.tables[table][2:]]


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[list[RunResult], Path, Page]:
    """Two methods and the upper bound on two orders, one method with two seeds."""
    results = [
        run("slao", offset=5.0, method_options={"start": "last_ft"}),
        run("slao", offset=6.5, seed=1, method_options={"start": "last_ft"}),
        run("slao", offset=3.0, tasks=BACK, order=2, method_options={"start": "last_ft"}),
        run("seqlora"),
        run("seqlora", offset=1.75, tasks=BACK, order=2),
        run("multitask", joint=True, offset=7.0),
    ]
    path = write_report(results, tmp_path_factory.mktemp("runs") / "new" / "report")
    return results, path, Page(path)


def test_numbers_of_the_page_are_those_of_the_matrices(several):
    results, _, page = several
    for result in results:
        table = page.scores(f"matrix-quickstart-{result.label}-o{result.order}-s{result.seed}")
        m = result.matrix
        if m.joint:
            wanted = [[number(z), number(row[-1])] for z, row in zip(m.zero_shot, m.scores, strict=True)]
        else:
            wanted = [
                [number(score) for score in (z, *row, m.forgetting_by_task[task])]
                for task, z, row in zip(m.tasks, m.zero_shot, m.scores, strict=True)
            ]
        assert table == wanted


def test_measures_of_the_page(several):
    results, _, page = several
    listed = {(row[0], row[1], row[2]): row[3:7] for row in page.tables["runs-s1"][1:]}
    for result in results:
        m = result.matrix
        wanted = [number(m.aa, 2), number(m.bwt, 2, sign=True), number(m.fwt, 2, sign=True), number(m.forgetting, 2)]
        assert listed[result.label, str(result.order), str(result.seed)] == wanted
    slao = next(row for row in summary_rows(results) if row.label == "slao")
    shown = next(row for row in page.tables["summary-s1"] if row[0] == "slao")
    assert shown[1:3] == ["3", f"{slao.aa.mean:.2f} ± {slao.aa.sd:.2f}"]
    assert shown[6:8] == [number(slao.disparity.mopd, 2), number(slao.disparity.aopd, 2)]
    opd = {row[0]: row[1] for row in page.tables["orders-s1"][1:]}
    assert opd["sst2"] == number(slao.disparity.opd["sst2"], 2)
    assert opd["AOPD"] == number(slao.disparity.aopd, 2)
    for formula in FORMULAS.values():
        assert formula in page.text


def test_page_stands_alone(several):
    _, path, page = several
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 4  # methods, memory, and one of accuracy an order
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    assert all(a["href"].startswith("#") for tag, a in page.tags if tag == "a")
    ids = {a["id"] for _, a in page.tags if a.get("id")}
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= ids
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


def test_pictures_have_their_text_and_their_files(several):
    _, path, page = several
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert all(len(alt) > 40 for alt in alts)
    assert "slao: AA" in alts[0]
    files = {file.name for file in path.parent.glob("*.png")}
    assert {"methods-quickstart.png", "memory-quickstart.png"} <= files
    assert {"accuracy-quickstart-o1.png", "accuracy-quickstart-o2.png"} <= files
    assert len([name for name in files if name.startswith("heatmap-")]) == 6
    for name in files:
        with Image.open(path.parent / name) as image:
            colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
            assert image.width >= 400 and image.height >= 180, name
        assert len(colours) > 30, name
        assert max(n for n, _ in colours) < 0.97 * sum(n for n, _ in colours), name


def test_heat_map_has_the_colour_of_each_score(several):
    results, path, _ = several
    with Image.open(path.parent / "heatmap-quickstart-slao-o1-s0.png") as image:
        found = {"#{:02x}{:02x}{:02x}".format(*rgb) for _, rgb in image.convert("RGB").getcolors(1 << 24)}

    def near(wanted: str) -> bool:  # the picture's colour map has 256 steps
        parts = [int(wanted[n : n + 2], 16) for n in (1, 3, 5)]
        return any(
            all(abs(int(f[n : n + 2], 16) - p) <= 3 for n, p in zip((1, 3, 5), parts, strict=True)) for f in found
        )

    assert all(near(heat(score)[0]) for row in results[0].matrix.scores for score in row)


def test_files_of_numbers(several):
    results, path, _ = several
    for result in results:
        text = (path.parent / f"matrix-quickstart-{result.label}-o{result.order}-s{result.seed}.csv").read_text()
        assert ScoreMatrix.from_csv(text) == result.matrix
    dump = json.loads((path.parent / "results.json").read_text())
    assert [RunResult.model_validate(entry) for entry in dump["results"]] == results
    with (path.parent / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [row.label for row in summary_rows(results)]
    assert float(rows[0]["aa_mean"]) == results[-1].matrix.aa
    assert rows[0]["bwt_mean"] == ""


def test_facts_to_reproduce(several):
    _, _, page = several
    for fact in ("2.13.0", "hash-of-agnews", "training.lr", "0.0001", "mbf run quickstart --seed 1", "last_ft"):
        assert fact in page.text


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a/../b $x_{ %s {{ 7*7 }} 任务", "=cmd()")


def test_hostile_strings_are_shown_as_they_are(tmp_path):
    evil = HOSTILE[0]
    result = run(
        evil,
        method=evil,
        tasks=HOSTILE,
        stream="../../" + evil,
        config={evil: evil},
        versions={evil: evil},
        command=evil,
        data_hashes={evil: evil},
        method_options={evil: HOSTILE[1]},
    )
    result = skipping(result, evil, HOSTILE[1])
    path = write_report([result, run("../x y", tasks=HOSTILE, stream="../../" + evil)], tmp_path / "out")
    page = Page(path)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [a for tag, a in page.tags if any(name.startswith("on") for name in a)]
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    for text in HOSTILE:
        assert text in page.text
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.parent for file in files} == {tmp_path / "out"} and len(files) == 10
    assert len(list((tmp_path / "out").glob("heatmap-*.png"))) == 2


def test_names_that_make_the_same_file_name_keep_their_own_files(tmp_path):
    results = [run("a b", offset=1.0), run("a/b", offset=2.0), run("A b", offset=3.0)]
    path = write_report(results, tmp_path)
    stored = [ScoreMatrix.from_csv(file.read_text()) for file in sorted(tmp_path.glob("matrix-*.csv"))]
    assert len(stored) == 3 and all(result.matrix in stored for result in results)
    assert len([name for name in Page(path).tables if name.startswith("matrix-")]) == 3


def test_missing_entries_are_dashes_and_noted(tmp_path):
    result = run(memory=[], train_seconds=[], train_tokens=[], command=None, versions={}, config={}, data_hashes={})
    result.matrix.scores[1][2] = None
    result.matrix.zero_shot[:] = [None] * 3
    path = write_report([result], tmp_path)
    page = Page(path)
    row = page.scores("matrix-quickstart-slao-o1-s0")[1]
    assert row[0] == "–" and row[3] == "–" and row[4] == "–"
    assert page.tables["runs-s1"][1][3:] == ["–"] * 6
    assert "slao, quickstart order 1, seed 0: no final score on agnews" in page.text
    assert "memory-s1" not in page.tables and not list(tmp_path.glob("memory-*"))


def test_nothing_evaluated_yet(tmp_path):
    result = run()
    empty = result.model_copy(update={"matrix": ScoreMatrix.empty(result.order_tasks)})
    page = Page(write_report([empty], tmp_path))
    assert page.tables["summary-s1"][1][2] == "–"


def test_one_task(tmp_path):
    page = Page(write_report([run(tasks=("sst2",))], tmp_path))
    assert page.scores("matrix-quickstart-slao-o1-s0") == [["11.2", "66.9", "0.0"]]


def test_differences_between_runs_are_noted(tmp_path):
    other = run("seqlora", versions={"mbf": "0.1.0", "torch": "2.12.0"}, data_hashes={"agnews": "other"})
    page = Page(write_report([run(), other], tmp_path))
    assert "quickstart: the data of agnews is not the same in all runs" in page.text
    assert "different versions of torch" in page.text


def test_settings_that_a_mean_runs_over_are_noted(tmp_path):
    configs = [{"seeds": [n], "train": {"lr": 1e-3 * (n + 1), "epochs": 1}, "output": f"r{n}"} for n in (0, 1)]
    page = Page(write_report([run(seed=n, config=config) for n, config in enumerate(configs)], tmp_path / "a"))
    assert "The runs differ in train.lr, and a row may be a mean over runs that do" in page.text
    configs[1]["train"]["lr"] = 1e-3
    page = Page(write_report([run(seed=n, config=config) for n, config in enumerate(configs)], tmp_path / "b"))
    assert "The runs differ in" not in page.text


def test_streams_have_their_own_parts(tmp_path):
    page = Page(write_report([run(), run(stream="real-5", tasks=("yahoo", "imdb"))], tmp_path))
    assert [row[0] for row in page.scores("matrix-real-5-slao-o1-s0")] == ["11.2", "12.2"]
    assert {"summary-s1", "summary-s2"} <= set(page.tables)


def test_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ResultError, match="two results are"):
        write_report([run(), run()], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_written_twice_is_the_same_bytes(tmp_path):
    results = [run(), run("seqlora", offset=-1.5)]
    paths = [write_report(results, tmp_path / name) for name in ("a", "b")]
    for file in paths[0].parent.iterdir():
        assert file.read_bytes() == (paths[1].parent / file.name).read_bytes(), file.name


def test_numbers_as_text():
    assert [number(x) for x in (-0.04, 0.05, -3.25, None)] == ["0.0", "0.1", "−3.2", "–"]
    assert [number(x, 2, sign=True) for x in (1.5, -0.001, 0.0)] == ["+1.50", "0.00", "0.00"]
    assert [size(x) for x in (0, 1023, 1024, 3_686_400, None)] == ["0 B", "1023 B", "1.00 KiB", "3.52 MiB", "–"]


def test_text_on_the_heat_scale_contrasts():
    def luminance(colour: str) -> float:
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for score in range(101):
        low, high = sorted(map(luminance, heat(float(score))))
        assert (high + 0.05) / (low + 0.05) >= 4.0, score


def test_a_skipped_task_is_shown(tmp_path):
    """Its column is named as one that was not learned, nothing in it is outlined, and a note gives the reason."""
    plain, left_out = run("slao"), skipping(run("magmax"), "agnews", "task 2 'agnews', step 3: the loss is <nan>")
    path = write_report([plain, left_out], tmp_path)
    page = Page(path)
    assert "magmax, quickstart order 1, seed 0: agnews was skipped and not learned: task 2" in page.text
    assert "step 3: the loss is <nan>. AA counts its score all the same;" in page.text
    assert "<nan>" not in path.read_text(encoding="utf-8")
    table = page.tables["matrix-quickstart-magmax-o1-s0"]
    assert table[3][0] == "2 agnews skipped" and table[3][-1] == "–"
    assert page.tables["matrix-quickstart-slao-o1-s0"][3][0] == "2 agnews"
    titles = [attributes.get("title") for tag, attributes in page.tags if tag == "th" and attributes.get("title")]
    assert titles.count("skipped: agnews") == 1 and titles.count("after agnews") == 1
    outlined = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "learned"]
    assert len(outlined) == 3 + 2
    pictures = [(tmp_path / f"heatmap-quickstart-{name}-o1-s0.png") for name in ("slao", "magmax")]
    marks = []
    for picture in pictures:
        with Image.open(picture) as image:
            colours = {rgb: n for n, rgb in image.convert("RGB").getcolors(1 << 24)}
            marks.append(colours[tuple(int(OUTLINE[n : n + 2], 16) for n in (1, 3, 5))])
    assert marks[1] < 0.75 * marks[0]  # two frames in the place of three
    assert (
        (tmp_path / "matrix-quickstart-magmax-o1-s0.csv").read_text().startswith("task,zero-shot,after sst2,skipped a")
    )
    (row,) = [row for row in summary_rows([left_out])]
    assert row.task_seconds.mean == 20.0 / 2
