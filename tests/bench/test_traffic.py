"""Bytes counted by ``bench/traffic.py`` against bytes counted by hand, and the scripts end to end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has wheels for Linux only")
import triton
import triton.language as tl

BENCH = Path(__file__).resolve().parents[2] / "bench"
T, D_IN, D_OUT, RANK = 70, 72, 40, 3  # no multiple of any tile


@pytest.fixture(scope="module")
def traffic() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import traffic

        yield traffic


@pytest.fixture(scope="module")
def roofline() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import roofline

        yield roofline


def counted(traffic: ModuleType, run: Any, *weights: torch.Tensor) -> dict[str, tuple[int, int, int]]:
    """Launches, bytes loaded and bytes stored by kernel or operator, of what ``run()`` calls."""
    meter = traffic.Meter(weights)
    with meter.kernels(), meter:
        run()
    return {name: (one.launches, one.loaded, one.stored) for name, one in meter.counts["forward"].items()}


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def add_one_kernel(x, bias, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < size, other=0.0) + tl.load(bias)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < size)


@pytest.mark.parametrize("size", [1, 8, 13])
def test_lanes_that_a_mask_leaves_out_are_not_counted(traffic: ModuleType, size: int) -> None:
    x, bias, out = torch.ones(size), torch.ones(1), torch.empty(size, dtype=torch.bfloat16)
    programs = -(-size // 8)

    found = counted(traffic, lambda: add_one_kernel[(programs,)](x, bias, out, size, BLOCK=8))

    # Each program loads the one bias; x has 4 bytes an element and out 2.
    assert found == {"add_one_kernel": (1, 4 * size + 4 * programs, 2 * size)}
    assert torch.equal(out, torch.full((size,), 2.0, dtype=torch.bfloat16))


def test_an_atomic_access_is_refused(traffic: ModuleType) -> None:
    @triton.jit
    def atomic_kernel(x):
        tl.atomic_add(x, 1.0)

    x = torch.zeros(1)
    with pytest.raises(Exception, match="atomic access"):
        counted(traffic, lambda: atomic_kernel[(1,)](x))


def test_nothing_is_counted_outside_of_the_block(traffic: ModuleType) -> None:
    meter = traffic.Meter([])
    with meter.kernels(), meter:
        pass
    add_one_kernel[(1,)](torch.ones(3), torch.ones(1), torch.empty(3), 3, BLOCK=8)
    torch.ones(3).add_(1)
    assert meter.counts == {"forward": {}, "backward": {}}


# -- operators of torch ------------------------------------------------------------------------------------------------


def test_operators_read_their_tensors_and_write_their_results(traffic: ModuleType) -> None:
    x, y, half = torch.ones(6, 5), torch.ones(6, 5), torch.ones(6, 5, dtype=torch.bfloat16)
    row, out = torch.ones(5), torch.empty(6, 5)
    size = 4 * 30
    cases: dict[str, tuple[Any, str, tuple[int, int]]] = {
        "two tensors": (lambda: x + y, "add", (2 * size, size)),
        "a number": (lambda: x * 2.0, "mul", (size, size)),
        "one tensor twice": (lambda: x * x, "mul", (size, size)),
        "in place": (lambda: x.add_(y), "add_", (2 * size, size)),
        "copied over": (lambda: x.copy_(y), "copy_", (size, size)),
        "zeroed": (lambda: x.zero_(), "zero_", (0, size)),
        "into out": (lambda: torch.add(x, y, out=out), "add", (2 * size, size)),
        "a row for all rows": (lambda: x + row.expand(6, 5), "add", (size + 20, size)),
        "a cast": (lambda: half.float(), "_to_copy", (size // 2, size)),
        "a mask beside": (lambda: torch.native_dropout(x, 0.5, True), "native_dropout", (size, size + 30)),
    }
    for what, (run, name, (read, written)) in cases.items():
        found = counted(traffic, run)
        assert found == {name: (1, read, written)}, what


def test_views_and_allocations_move_nothing(traffic: ModuleType) -> None:
    x = torch.ones(6, 5)
    assert counted(traffic, lambda: (x.t(), x.view(5, 6), x[1:], x.detach(), x.expand(2, 6, 5), x.reshape(30))) == {}
    assert counted(traffic, lambda: (torch.empty(3), torch.empty_like(x), x.new_empty(4))) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_the_frozen_weight_are_left_out(traffic: ModuleType, dtype: torch.dtype) -> None:
    x, W, A = (torch.randn(shape).to(dtype) for shape in ((7, 16), (12, 16), (3, 16)))
    each = x.element_size()

    assert counted(traffic, lambda: torch.nn.functional.linear(x, W), W) == {}
    found = counted(traffic, lambda: torch.nn.functional.linear(x, A), W)
    assert found == {"mm": (1, each * (7 + 3) * 16, each * 7 * 3)}

    # Of a sum with a product, what the accumulator adds to the product's own traffic is its reading.
    total, dy = torch.randn(7, 16).to(dtype), torch.randn(7, 12).to(dtype)
    expected = total.double() + dy.double() @ W.double()
    assert counted(traffic, lambda: total.addmm_(dy, W), W) == {"addmm_": (0, each * 7 * 16, 0)}
    torch.testing.assert_close(total.double(), expected, rtol=2**-7, atol=1e-5)


# -- one layer ---------------------------------------------------------------------------------------------------------


def test_peft_by_hand(traffic: ModuleType) -> None:
    """A layer in bf16 with dropout: each operator's traffic, written down one by one."""
    case = traffic.Case(f"{D_IN}x{D_OUT}", RANK, 0.1, T)
    found = traffic.eager(case)["peft-nocast"]
    x, y, h, A, B = T * D_IN, T * D_OUT, T * RANK, RANK * D_IN, D_OUT * RANK
    forward = {
        "native_dropout": 2 * x + 2 * x + x,
        "mm": 2 * (x + A + h) + 2 * (h + B + y),
        "mul": 2 * (y + y),
        "add": 2 * (y + y + y),
    }
    backward = {
        "mul": 2 * (y + y),
        "mm": 2 * (y + B + h) + 2 * (y + h + B) + 2 * (h + A + x) + 2 * (h + x + A),
        "native_dropout_backward": 2 * x + x + 2 * x,
        "add": 2 * (x + x + x),
    }
    for part, expected in (("forward", forward), ("backward", backward)):
        assert {name: count.moved for name, count in found[part].items()} == expected


def test_the_floors_of_a_square_layer(traffic: ModuleType) -> None:
    case = traffic.Case("64x64", 8, 0.0, 16)
    each = {
        (name, part): traffic.moved(counts) / case.elements
        for name, parts in traffic.floors(case).items()
        for part, counts in parts.items()
    }
    assert each == {
        ("passes", "forward"): 6,
        ("passes", "backward"): 8,
        ("ideal", "forward"): 2,
        ("ideal", "backward"): 4,
    }


def test_of_a_product_of_its_own_a_kernel_counts_the_branch(traffic: ModuleType) -> None:
    from mbf.kernels._configs import Config
    from mbf.kernels._tune import forced

    case, rows, columns = traffic.Case(f"{D_IN}x{D_OUT}", RANK, 0.1, T), 16, 32
    with forced({**traffic.EPILOGUE, "epilogue": Config(rows, columns)}):
        found = traffic.count_mbf(case)

    # Every block of columns loads z or dh, every block of rows B or A, and for the mask each program its seed.
    def branch(width: int) -> int:
        return 2 * RANK * (T * -(-width // columns) + width * -(-T // rows))

    seeds = 8 * -(-D_IN // columns) * -(-T // rows)
    counts = [found[part]["epilogue_kernel"] for part in traffic.PARTS]
    assert [(one.loaded, one.stored) for one in counts] == [(branch(D_OUT), 0), (branch(D_IN) + seeds, 0)]


def test_a_decoder_layer_is_the_sum_of_its_projections(traffic: ModuleType) -> None:
    counts = {shape: n * 10**6 for n, shape in enumerate(traffic.DECODER, start=1)}
    found = {
        traffic.Case(shape, 16, 0.1, 8): {"mbf": {part: {"": traffic.Count(1, n, n)} for part in traffic.PARTS}}
        for shape, n in counts.items()
    }
    elements = 8 * 10 * 4096  # a token has 4096 of 4096 x 4096, and ten times as many of all together
    each = 2 * (1 + 2 + 3 + 4) * 10**6 / elements
    shown = traffic.decoder(found).split()
    assert shown[-5:] == ["mbf", f"{each:.2f}", f"{each:.2f}", f"{2 * each:.2f}", "40.0"]

    found.popitem()
    assert traffic.decoder(found) == ""


def test_a_wrong_result_is_found(traffic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = traffic.run_mbf

    def spoilt(*args: Any) -> Any:
        found = run(*args)
        found["dA0"] *= 1.05
        return found

    monkeypatch.setattr(traffic, "run_mbf", spoilt)
    wrong = traffic.count_mbf(traffic.Case(f"{D_IN}x{D_OUT}", RANK, 0.1, T))
    assert len(wrong) == 1 and wrong[0].startswith("dA0 is off")


# -- the scripts -------------------------------------------------------------------------------------------------------


def test_the_scripts(
    traffic: ModuleType, roofline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, image, predicted = tmp_path / "traffic.csv", tmp_path / "traffic.png", tmp_path / "roofline.csv"

    assert traffic.main(["--quick", "--csv", str(counts)]) == 0
    _, rows = sys.modules["common"].read_csv(counts)
    ours = {(row["shape"], row["part"]): int(row["bytes"]) for row in rows if row["variant"] == "mbf"}
    least = {(row["shape"], row["part"]): int(row["bytes"]) for row in rows if row["variant"] == "passes"}
    assert len(ours) == 2 * len(traffic.QUICK)
    fewer = {(row["shape"], row["part"]): int(row["bytes"]) for row in rows if row["variant"] == "mbf-epilogue"}
    assert fewer and all(count < least[key] for key, count in fewer.items())
    assert all(ours[key] >= least[key] for key in least)

    import traffic_plot  # from the folder that the fixture put on the path

    traffic_plot.main([str(counts), "--out", str(image)])
    assert image.read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    assert roofline.main(["--traffic", str(counts), "--csv", str(predicted)]) == 0
    assert "PREDICTED" in capsys.readouterr().out
    header, times = sys.modules["common"].read_csv(predicted)
    assert "prediction" in header
    floats = [float(row[f"predicted_{name}_us"]) for row in times for name in ("frozen", "peft_nocast", "mbf")]
    assert floats and all(time > 0 for time in floats)
    assert all(float(row["predicted_mbf_over_frozen"]) >= 1 for row in times)


def test_predictions_without_counts_say_how_to_make_them(
    roofline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        roofline.main(["--traffic", str(tmp_path / "none.csv")])
    assert "python bench/traffic.py" in capsys.readouterr().err
