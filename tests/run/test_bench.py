"""``mbf bench`` at tiny sizes: what it prints, that it refuses a wrong layer, and what it says to bad values.

Of ``bench/lora_linear.py``, the long form: what ``--device cuda`` chooses, prints and says where there is no GPU.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mbf.cli.app import app
from mbf.cli.errors import FAILURE, USER
from mbf.ops import draw_seed, lora_linear, native_status
from mbf.run.bench import RANKS, Case, Samples, bench
from mbf.run.bench import _cases as cases
from mbf.run.layers import Variant, _launches

TINY = ("--tokens", "8", "--rounds", "2", "--shape", "16x24", "--rank", "4")
RATIO = re.compile(r"\d+\.\d\d\b")


def mbf(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], prog_name="mbf")


def lines_of(result: Any, shape: str) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.lstrip().startswith(shape)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_each_row_has_its_times(dtype: str) -> None:
    report = bench(shapes=["64x96", "96x64"], rank=4, tokens=8, rounds=2, dtype=dtype)
    assert [row.case for row in report.rows] == [
        Case(*sizes, 4, p, 8, dtype) for sizes in ((64, 96), (96, 64)) for p in (0.0, 0.1)
    ]
    for row in report.rows:
        assert row.problems == () and row.rounds == 2
        assert list(row.milliseconds) == ["frozen", "peft", "mbf"] and min(row.milliseconds.values()) > 0
        assert row.over_frozen("frozen") == 1
        assert row.against_peft() == pytest.approx(row.over_frozen("peft") / row.over_frozen("mbf"))


def test_the_command_prints_facts_and_ratios() -> None:
    result = mbf(*TINY, "--threads", "1")
    assert result.exit_code == 0, result.output
    assert f"torch: {torch.__version__}" in result.stdout
    assert "threads: 1\n" in result.stdout
    assert f"compiled extension: {'loaded' if native_status().loaded else 'not loaded'}" in result.stdout
    rows = lines_of(result, "16x24")
    assert [row.split()[:5] for row in rows] == [["16x24", "r=4", f"p={p}", "T=8", "fp32"] for p in ("0", "0.1")]
    assert all(len(RATIO.findall(row.split("fp32")[1])) >= 3 for row in rows)


def test_nothing_stays_changed() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    bench(shapes=["16x24"], tokens=8, rounds=1, threads=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_defaults() -> None:
    found = cases((), (), None, 512, "fp32")
    assert [(f"{case.d_in}x{case.d_out}", case.rank, case.p) for case in found] == [
        (shape, rank, p) for shape, rank in RANKS.items() for p in (0.0, 0.1)
    ]
    assert [case.rank for case in cases(["7x5"], [0.0], None, 512, "fp32")] == [16]
    assert {case.rank for case in cases((), (), 3, 512, "fp32")} == {3}


# -- planted errors ------------------------------------------------------------------------------------------------


def wrong_y(*args: Any, **kwargs: Any) -> torch.Tensor:
    return lora_linear(*args, **kwargs) * 1.00001


def wrong_gradients(*args: Any, **kwargs: Any) -> torch.Tensor:
    y = lora_linear(*args, **kwargs)
    return y + 0.001 * (y - y.detach())


def not_a_number(*args: Any, **kwargs: Any) -> torch.Tensor:
    return lora_linear(*args, **kwargs) * float("nan")


@pytest.mark.parametrize(
    ("planted", "names"),
    [(wrong_y, {"y", "dx", "dA", "dB"}), (wrong_gradients, {"dx", "dA", "dB"}), (not_a_number, {"y", "dx"})],
)
def test_a_wrong_layer_has_no_ratio(monkeypatch: pytest.MonkeyPatch, planted: Any, names: set[str]) -> None:
    monkeypatch.setattr("mbf.peft.linear.lora_linear", planted)
    result = mbf(*TINY)
    assert result.exit_code == FAILURE
    rows = lines_of(result, "16x24")
    assert len(rows) == 2
    assert all(row.split("fp32")[1].split() == ["wrong"] for row in rows)
    assert names <= set(re.findall(r"p=0\.1 .*: not timed: (\w+) is off", result.stderr))


def wrong_with_dropout(*args: Any, **kwargs: Any) -> torch.Tensor:
    return lora_linear(*args, **kwargs) * (1.00001 if kwargs["dropout_p"] else 1)


def nothing_dropped(*args: Any, **kwargs: Any) -> torch.Tensor:
    return lora_linear(*args, **kwargs | {"dropout_p": 0.0})


def another_probability(*args: Any, **kwargs: Any) -> torch.Tensor:
    return lora_linear(*args, **kwargs | {"dropout_p": 1.1 * kwargs["dropout_p"]})


def mask_of_another_seed(*args: Any, **kwargs: Any) -> torch.Tensor:
    return lora_linear(*args, **kwargs, seed=3)


@pytest.mark.parametrize("planted", [wrong_with_dropout, nothing_dropped, another_probability, mask_of_another_seed])
def test_dropout_is_judged(monkeypatch: pytest.MonkeyPatch, planted: Any) -> None:
    monkeypatch.setattr("mbf.peft.linear.lora_linear", planted)
    without, dropped = bench(shapes=["16x24"], rank=4, tokens=8, rounds=2).rows
    assert without.case.p == 0 and without.problems == () and without.milliseconds
    assert dropped.case.p == 0.1 and dropped.milliseconds == {}
    assert {"y", "dx", "dA", "dB"} <= {what.split()[0] for what in dropped.problems}


def test_a_mask_that_stays_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[torch.Tensor] = []

    def first_seed(*args: Any, **kwargs: Any) -> torch.Tensor:
        seeds.append(draw_seed("cpu"))
        return lora_linear(*args, **kwargs, seed=seeds[0])

    monkeypatch.setattr("mbf.peft.linear.lora_linear", first_seed)
    (row,) = bench(shapes=["16x24"], ps=[0.1], rank=4, tokens=8, rounds=2).rows
    (problem,) = row.problems
    assert problem.startswith("in a second forward, y is off by")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("p", [1e-5, 0.5, 0.999])
def test_masks_of_few_elements_are_right(p: float, dtype: str) -> None:
    """All of x may be dropped, or nothing of it twice in a row."""
    assert bench(shapes=["3x2", "65x24"], ps=[p], rank=2, tokens=1, rounds=1, dtype=dtype).correct


def test_a_layer_left_to_peft_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.run.layers.fuse", lambda layer: None)
    report = bench(shapes=["16x24"], ps=[0.0], tokens=8, rounds=2)
    assert not report.correct
    assert [(row.milliseconds, row.problems) for row in report.rows] == [({}, ("the layer was left to PEFT",))]


def test_launches_are_counted() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has wheels for Linux only")
    from mbf.kernels._launch import launch

    def twice(x: torch.Tensor) -> torch.Tensor:
        launch(twice, (1,), x)
        launch(twice, (1,), x)
        return x

    x = torch.zeros(1)
    assert _launches(Variant(twice, ()), x) == 2
    assert _launches(Variant(torch.clone, ()), x) == 0


def test_no_launches_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.ops._gpu.obstacle", lambda: "no triton")
    assert _launches(Variant(lambda x: pytest.fail("needless"), ()), torch.zeros(1)) == 0


# -- bad values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("shape", "576", "DINxDOUT"),
        ("shape", "0x8", "DINxDOUT"),
        ("shape", "8x8x8", "DINxDOUT"),
        ("dtype", "fp8", "fp32, bf16, fp16"),
        ("p", "1", "below 1"),
        ("p", "-0.1", "at least 0"),
        ("p", "nan", "below 1"),
        ("rank", "0", "above 0"),
        ("tokens", "-1", "above 0"),
        ("rounds", "0", "above 0"),
        ("threads", "0", "from 1 to"),
        ("threads", "1000000", "from 1 to"),
    ],
)
def test_a_bad_value_is_one_line(option: str, value: str, wanted: str) -> None:
    result = mbf(f"--{option}={value}")
    assert result.exit_code == USER
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mbf: {option}: found ") and value in line and wanted in line


# -- bench/lora_linear.py on a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "found", "way"),
    [(None, "built for CPUs only", "install a build of torch for CUDA"), ("13.0", "sees no GPU", "with a GPU and its")],
)
def test_without_a_gpu_it_is_one_error(
    bench_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, built: str | None, found: str, way: str
) -> None:
    script = bench_file("lora_linear")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--device", "cuda", "--quick"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    error = printed.err.splitlines()[-1]
    assert f"--device cuda: found torch {torch.__version__}" in error and found in error and way in error


def test_rows_of_a_gpu(bench_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = bench_file("lora_linear")
    monkeypatch.setattr(script, "missing_gpu", lambda: None)
    cases = script.arguments(["--device", "cuda"]).cases
    assert {case.shape for case in cases} == {"4096x4096", "4096x1024", "4096x14336", "14336x4096"}
    assert {case[1:] for case in ((0, c.rank, c.p, c.tokens, c.dtype) for c in cases)} == {
        (rank, p, tokens, "bf16") for rank in (16, 64) for p in (0.0, 0.1) for tokens in (2048, 8192)
    }
    assert len(cases) == len(set(cases)) == 32
    chosen = script.arguments(["--device=cuda", "--dtype=fp16", "--shape=64x96", "--rank=8", "--p=0"]).cases
    assert chosen == [Case(64, 96, 8, 0.0, tokens, "fp16") for tokens in (2048, 8192)]
    assert script.arguments(["--rank", "8"]).cases == [Case(2048, 2048, 8, p, 512, "fp32") for p in (0.0, 0.1)]


def test_clocks_stand_before_and_after(
    bench_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    common = bench_file("common")
    asked = []
    monkeypatch.setattr(common, "facts", lambda device: asked.append(device) or {"clocks before": "slow"})
    monkeypatch.setattr(common, "clocks", lambda: "fast")
    target = tmp_path / "rows.csv"
    args = Namespace(device="cuda", threads=None, csv=str(target), cases=["one"])
    status = common.run_script(
        "x.py", [], lambda argv: args, lambda case, args: 7, lambda case, result, add: add([case, result]), ["a", "b"]
    )
    assert status == 0 and asked == ["cuda"]
    assert capsys.readouterr().out.splitlines()[0::3] == ["clocks before: slow", "clocks after: fast"]
    notes, rows = common.read_csv(target)
    assert notes == {"clocks before": "slow", "command": "python bench/x.py", "clocks after": "fast"}
    assert rows == [{"a": "one", "b": "7"}]


def test_what_was_not_captured_is_marked(bench_file: Any, capsys: Any) -> None:
    script = bench_file("lora_linear")
    times = {"frozen": [(1.0, 1.0, 2.0)] * 3, "peft": [(2.0, 2.0, 4.0)] * 3}
    result = script.Result(Samples(times, 3, 1), {"frozen": 1.0, "peft": 2.0}, {"peft": "ValueError: it waits"})
    rows: list[Any] = []
    script.report(Case(64, 96, 4, 0.1, 33, "bf16"), result, rows.append)
    assert [row[5] for row in rows[::3]] == ["frozen", "peft (not captured)"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("peft (not captured) ") and lines[-3].startswith("frozen ")
    assert lines[-1] == "peft was not captured, so its launches are timed, too: ValueError: it waits"
