"""Reading results back, and what is said when they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mbf.report import RESULT_FILE, ResultError, RunResult, load_results, write_comparison, write_report
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


INFINITE = float("inf")


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels else {}


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
        (lambda d: d["memory"][0].update(state_bytes=10**400), r"memory\.0\.state_bytes: .*less than or equal to 922"),
        (lambda d: d.update(train_tokens=[10**400]), r"train_tokens\.0: .*less than or equal to 922"),
        (lambda d: d.update(train_seconds=[INFINITE]), r"train_seconds\.0: .*finite number, found inf"),
        (lambda d: d.update(train_seconds=[1e308] * 2), r"train_seconds\.0: .*less than or equal to 922"),
        (lambda d: d.update(order=10**400), "order: .*less than or equal to 922"),
        (lambda d: d.update(config={"a": "\ud800"}), "config: found half a surrogate pair at 'a', wanted text in Unic"),
        (
            lambda d: d.update(config={"a": [{"\ud800": 1}]}),
            r"config: found half a surrogate pair at 'a\.0', wanted te",
        ),
        (lambda d: d.update(method_options={"\ud800": 1}), "method_options: found half a surrogate pair"),
        (
            lambda d: d.update(method_options={"a": {"b": INFINITE}}),
            r"method_options: found inf at 'a\.b', wanted a fin",
        ),
        (lambda d: d.update(config=nested(101)), r"config: found more than 100 levels at 'a\.a\..*', wanted fewer"),
        (lambda d: d.update(config=nested(700)), r"config: found more than 100 levels at 'a\.a\..*', wanted fewer"),
        (lambda d: d.update(command="mbf \ud800"), "command: found 'mbf .*ud800', wanted text in Unicode"),
        (lambda d: d.update(versions={"a": "\ud800"}), r"versions\.a: found '.*ud800', wanted text in Unicode"),
        (lambda d: d.update(label="a\nb"), r"label: found 'a\\nb', wanted a name that is printable and not empty"),
        (lambda d: d.update(stream="\x1b[1m"), r"stream: found '\\x1b\[1m', wanted a name that is printable"),
        (lambda d: d.update(method=""), "method: found '', wanted a name that is printable"),
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


def test_the_largest_that_is_taken_is_written(tmp_path):
    most = 2**63
    large = run(
        order=most,
        seed=most,
        memory=[{"adapter_bytes": most, "state_bytes": most}] * 3,
        train_seconds=[float(most)] * 3,
        train_tokens=[most] * 3,
        config=nested(100),
        method_options=nested(100),
    )
    write(tmp_path / "run", large)
    (found,) = load_results([tmp_path])
    assert found == large
    write_report([found, run(method_options=nested(99))], tmp_path / "report")
    write_comparison([found], tmp_path / "report")
    dump = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    assert dump["results"][0]["config"] == nested(100)
