from __future__ import annotations

import json

from tests.kernels.uninterpreted import run

COMPILE = ("-m", "mbf.kernels.compile")


def test_a_subset_follows_the_rules() -> None:
    done = run(*COMPILE, "--target", "sm_80,sm_90,sm_100", "--dtype", "bf16", "--rank", "16", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0, [row for row in rows if row["broken"]]
    kernels = {"project", "accumulate", "output_gradient", "input_gradient", "reduce", "route", "unroute", "epilogue"}
    kernels |= {"square", "square_input_gradient", "square_gradient", "lilora_route", "lilora_unroute"}
    kernels |= {"activation", "activation_gradient", "dropout_mask"}
    for target in ("sm_80", "sm_90", "sm_100"):
        mine = [row for row in rows if row["target"] == target]
        assert {row["kernel"] for row in mine} == kernels
        for row in mine:
            assert row["spills"] == 0 and row["registers"] > 0 and not row["broken"]
            assert row["tensor_cores"] > 0 or row["kernel"] in (
                "reduce",
                "activation",
                "activation_gradient",
                "dropout_mask",
            )
            assert row["loads"].get("128", 0) > 0 or row["kernel"] == "dropout_mask"


def test_amd() -> None:
    done = run(*COMPILE, "--target", "gfx942", "--dtype", "bf16", "--rank", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of them against the rules" in done.stdout


def test_a_spill_is_seen() -> None:
    done = run("-m", "tests.kernels.scripts", "spilling")
    assert done.returncode == 0, done.stderr
    assert any("spills" in what for broken in json.loads(done.stdout) for what in broken)


def test_a_form_alone() -> None:
    done = run(*COMPILE, "--target", "sm_90", "--dtype", "fp32", "--rank", "32", "--form", "turned drop", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0, [row for row in rows if row["broken"]]
    assert {row["kernel"] for row in rows} == {"square", "square_input_gradient", "square_gradient", "reduce"}
    assert {(row["form"], row["rank"]) for row in rows} == {("turned drop", 184)}


def test_errors() -> None:
    assert "target is 'sm90'; it must be such as sm_90" in run(*COMPILE, "--target", "sm90").stderr
    assert "--dtype" in run(*COMPILE, "--help").stdout
