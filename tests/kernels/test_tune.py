from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mbf.kernels import _tune
from mbf.kernels._configs import (
    FAMILIES,
    Config,
    multiprocessors,
    neighbours,
    of_capability,
    programs,
    shipped,
    smaller,
)
from mbf.kernels._launch import recorded, spans, tracing
from mbf.kernels._operands import at_once, most_rank, padded, together
from mbf.kernels._project import project
from mbf.kernels._specimens import Terms
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from mbf.ops import lora_linear, lora_linear_ref
from mbf.ops._operands import prepare
from tests.ops import test_mora
from tests.ops.lora_cases import SEED, check_error_rule, operands

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MBF_CACHE", str(tmp_path))
    return tmp_path


def timer(times: dict[str, float], asked: list[str]) -> object:
    """Stands in for a clock: a trial returns its name."""

    def time(trial: object) -> float:
        name = trial()
        asked.append(name)
        if times[name] < 0:
            raise RuntimeError("out of resource: shared memory")
        return times[name]

    return time


def test_the_fastest_is_taken_and_kept(own_cache: Path) -> None:
    asked: list[str] = []
    clock = timer({"base": 2.0, "epilogue": 1.0}, asked)
    for _ in range(2):
        assert _tune.best("forward 4096", CPU, ["base", "epilogue"], lambda c: c, clock) == "epilogue"
    assert asked == ["base", "epilogue"]
    (file,) = (own_cache / "kernels").iterdir()
    assert json.loads(file.read_text()) == {"forward 4096": "epilogue"}


def test_one_that_fails_is_out_and_the_first_stands_if_all_do() -> None:
    for times, expected in [({"a": -1.0, "b": 3.0}, "b"), ({"a": -1.0, "b": -1.0}, "a")]:
        assert _tune.best(f"{times}", CPU, ["a", "b"], lambda c: c, timer(times, [])) == expected


@pytest.mark.parametrize("content", ["", "[1]", '{"key": ["not one of them"]}', "\0"])
def test_a_cache_that_cannot_be_used_is_measured_anew(content: str) -> None:
    path = _tune.cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    configs = [Config(64, 64), Config(32, 64)]
    found = _tune.best("key", CPU, configs, lambda c: c, lambda trial: trial().rows)
    assert found == Config(32, 64)
    assert Config(*_tune.read(path)["key"]) == found


def test_a_folder_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    (own_cache / "file").write_text("")
    monkeypatch.setenv("MBF_CACHE", str(own_cache / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert _tune.best("key", CPU, ["base"], lambda c: c, lambda trial: 1.0) == "base"
    again = _tune.best("key", CPU, ["base", "epilogue"], lambda c: c, lambda trial: pytest.fail("timed again"))
    assert again == "base"


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="no space left"):
        _tune.best("key", CPU, ["base"], lambda c: c, lambda trial: 1.0)
    assert [*(own_cache / "kernels").iterdir()] == []


def test_without_a_home_answers_last_as_long_as_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MBF_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    _tune._file.cache_clear()
    asked: list[str] = []
    for _ in range(2):
        assert _tune.best("homeless", CPU, ["a", "b"], lambda c: c, timer({"a": 2.0, "b": 1.0}, asked)) == "b"
    assert asked == ["a", "b"]
    _tune._file.cache_clear()


@pytest.mark.parametrize("other", [{"dtype": torch.float32}, {"dropout_p": 0.1}, {"count": 2}, {"rank": 8}])
def test_an_answer_is_for_launches_of_one_form(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    keys: list[str] = []
    monkeypatch.setattr(_tune, "_tuning", lambda device: True)
    monkeypatch.setattr(_tune, "best", lambda key, device, candidates, trial: keys.append(key) or candidates[0])

    def run(dtype: torch.dtype = torch.bfloat16, dropout_p: float = 0.0, count: int = 1, rank: int = 32) -> None:
        A = torch.zeros(rank, 64, dtype=torch.bfloat16)
        x = torch.zeros(70, 64, dtype=dtype)
        given = [prepare(x, A, torch.zeros(8, rank).bfloat16(), 1.0, None, None, dropout_p, 1, None, None)] * count
        with recorded():
            project(x, given)

    run()
    run()
    run(**other)
    assert len(keys) == 3 and keys[0] == keys[1] != keys[2]


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBF_AUTOTUNE", "1")
    A = torch.zeros(16, 8)
    config = _tune.config_for("project", 16, A, torch.float32, (1, 8), (), lambda c: pytest.fail("timed"))
    assert config == shipped("project", 16, 4, "sm_90")
    assert _tune.tier_for("forward", A, (1, 8), (), lambda tier: pytest.fail("timed")) == "base"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (99, 9)])
def test_every_gpu_has_a_table(capability: tuple[int, int]) -> None:
    assert of_capability(*capability) in FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_answers_for_every_launch(family: str) -> None:
    assert programs(family) > 0
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (1, 8, 16, 17, 64, 100, most_rank(dtype)):
            alike = Terms(torch.empty(rank, 8, dtype=dtype), *[None] * 8)
            kernels = ["project", "accumulate", "output_gradient", "input_gradient"]
            kernels += ["square", "square_input_gradient", "square_gradient"]
            kernels += ["project_group", "input_gradient_group"] if at_once(alike) > 1 else []
            for kernel in kernels:
                config = shipped(kernel, padded(rank), dtype.itemsize, family)
                assert min(config) > 0 and config.rows >= 16 and config.columns >= 16
                assert all(min(one) > 0 for one in neighbours(config))


def test_wide_activations_have_the_tiles_of_wide_types_as_far_as_there_are() -> None:
    for ranks, itemsize in ((32, 4), (256, 2)):
        B = torch.zeros(8, ranks, dtype=torch.bfloat16)
        found = _tune.config_for("output_gradient", ranks, B, torch.float32, (1, 8), (), lambda c: pytest.fail("timed"))
        assert found == shipped("output_gradient", ranks, itemsize, "sm_90")


def test_there_are_as_many_programs_as_the_gpu_has_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 PCIe has 114 of them, the SXM form 132."""
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(multi_processor_count=114)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    multiprocessors.cache_clear()
    gpu = torch.device("cuda", 1)
    assert [_tune.programs_for(gpu) for _ in range(2)] == [114, 114] and asked == [gpu]
    multiprocessors.cache_clear()
    with _tune.forced({"family": "sm_80"}):
        assert _tune.programs_for(gpu) == _tune.programs_for(CPU) == 108 and asked == [gpu]
    assert _tune.programs_for(CPU) == programs("sm_90")


def test_branches_go_together_if_they_are_alike() -> None:
    def branch(rank: int, p: float, dtype: torch.dtype = torch.bfloat16) -> Terms:
        terms = Terms(torch.empty(rank, 8, dtype=dtype), *[None] * 8)
        return terms._replace(dropout_p=p)

    alike = [branch(16, 0.1) for _ in range(4)]
    assert together(alike) == [[0, 1, 2], [3]]
    assert together([branch(16, 0.1), branch(8, 0.1), branch(16, 0.1), branch(16, 0.0)]) == [[0, 2], [1], [3]]
    assert together([branch(64, 0.1, torch.float32)] * 2) == [[0], [1]]


@pytest.mark.parametrize("size", [1, 31, 512, 4097])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("others", [1, 8, 500])
def test_parts_cover_the_axis(size: int, block: int, others: int) -> None:
    span, parts = spans(size, block, others, 132, 256)
    assert span % block == 0 and (parts - 1) * span < size <= parts * span
    assert parts == 1 or (parts * others <= 132 and span >= 256)
    with tracing():
        assert spans(size, block, others, 132, 256) == (span, parts)


def test_what_has_no_room_is_made_smaller_until_it_fits_or_is_the_smallest() -> None:
    tried: list[Config] = []

    def run(config: Config) -> str:
        tried.append(config)
        if config.rows * config.columns > 16 * 32:
            raise OutOfResources(98304, 65536, "shared memory")
        return "done"

    assert _tune.launched(Config(64, 32, 4, 2), run) == "done"
    assert [tuple(one) for one in tried] == [(64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)]
    config, least = Config(128, 512, 8, 3), None
    while config is not None:
        least, config = config, smaller(config)
    assert least == Config(16, 16, 8, 1)


def no_room(*_: object) -> None:
    raise OutOfResources(98304, 65536, "shared memory")


def test_the_smallest_that_has_no_room_is_an_error() -> None:
    with pytest.raises(OutOfResources, match="Required: 98304"):
        _tune.launched(Config(32, 32), no_room)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch, on_triton: list[str]) -> list[str]:
    """Refuse, before they run, launches that are pipelined or whose tiles are not the smallest; yields what ran."""
    run = InterpretedFunction.run

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        across = kwargs.get("PAIRS", kwargs.get("COLUMNS"))
        if across is not None and (kwargs["num_stages"] > 1 or kwargs["ROWS"] * across > 256):
            no_room()
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", refuse)
    return on_triton


@pytest.mark.parametrize("form", ["plain", "everything"])
def test_a_gpu_of_little_room_computes_with_smaller_tiles(little_room: list[str], form: str) -> None:
    case = operands(form, (2, 20), 70, 50, 12, torch.bfloat16)
    check_error_rule(lora_linear, lora_linear_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)
    assert {"project", "accumulate", "output_gradient", "input_gradient"} <= set(little_room)


@pytest.mark.parametrize("kind", test_mora.KINDS)
def test_so_do_the_square_kernels(little_room: list[str], kind: int) -> None:
    case = test_mora.case_of((2, 9), 41, 50, 24, *test_mora.DTYPES["fp32"])
    test_mora.check_error_rule(case, kind=kind, scale=1.7, dropout_p=0.3, seed=SEED)
    assert {"square", "square_input_gradient", "square_gradient"} <= set(little_room)
