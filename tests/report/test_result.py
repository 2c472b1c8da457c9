"""Reading results back, and what is said when they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from mbf.report import RESULT_FILE, ResultError, RunResult, load_results
from tests.report.examples import run, skipping


def write(directory: Path, result: RunResult) -> Path:
    directory.mkdir(parents=True)
    path = directory / RESULT_FILE
    path.write_text(result.model_dump_json())
    return path


def test_results_are_found_below_and_come_back_equal(tmp_path):
    slao, seqlora = run("slao"), run("seqlora", offset=1.0)
    write(tmp_path / "b" / "slao", slao)
    file = write(tmp_path / "a", seqlora)
    assert load_results([tmp_path]) == [seqlora, slao]
    assert load_results([str(file), tmp_path, file]) == [seqlora, slao]


def test_skipped_tasks_come_back_and_are_those_of_the_matrix(tmp_path):
    result = skipping(run(), "agnews", "the loss is nan")
    write(tmp_path / "a", result)
    assert load_results([tmp_path]) == [result]
    assert "skipped" not in json.loads(run().model_dump_json())
    with pytest.raises(ValidationError, match="skipped has no task, but the matrix agnews"):
        RunResult.model_validate(result.model_dump() | {"skipped": {}})


def test_missing_results(tmp_path):
    with pytest.raises(ResultError, match="nowhere does not exist; name a run directory"):
        load_results([tmp_path / "nowhere"])
    with pytest.raises(ResultError, match=r"no result\.json in or below .*mbf resume"):
        load_results([tmp_path])
    with pytest.raises(ResultError, match="no results to report"):
        load_results([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("seed"), "seed: Field required"),
        (lambda d: d.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda d: d.update(schema_version=2), "schema_version 2, this mbf reads 1; update mbf"),
        (
            lambda d: d["matrix"]["scores"][1].__setitem__(2, 300),
            r"matrix\.scores\.1\.2.*less than or equal to 100.*300",
        ),
        (lambda d: d.update(order_tasks=["a"]), "order_tasks is a, but the matrix is of sst2, agnews, trec"),
        (lambda d: d.update(train_tokens=[1] * 4), "train_tokens has 4 entries for 3 tasks"),
        (lambda d: d["memory"][0].update(adapter_bytes=-1), "greater than or equal to 0"),
    ],
)
def test_a_malformed_result_is_one_line_with_the_file(tmp_path, change, message):
    data = json.loads(run().model_dump_json())
    change(data)
    (tmp_path / RESULT_FILE).write_text(json.dumps(data))
    with pytest.raises(ResultError, match=message) as caught:
        load_results([tmp_path])
    assert str(tmp_path / RESULT_FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_json(tmp_path):
    (tmp_path / RESULT_FILE).write_text("{'seed'")
    with pytest.raises(ResultError, match="cannot be read as JSON"):
        load_results([tmp_path])


def test_the_same_run_twice_names_both_files(tmp_path):
    first, second = write(tmp_path / "a", run()), write(tmp_path / "b", run(offset=1.0))
    with pytest.raises(ResultError) as caught:
        load_results([tmp_path])
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    assert "slao, quickstart order 1, seed 0" in str(caught.value)


def test_a_result_checks_itself():
    with pytest.raises(ValidationError, match="order_tasks is agnews, sst2, trec"):
        run(order_tasks=("agnews", "sst2", "trec"))
