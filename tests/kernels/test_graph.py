from __future__ import annotations

import json

from tests.kernels.uninterpreted import run


def test_graphs_hold_the_launches() -> None:
    done = run("-m", "tests.kernels.scripts", "graphs")
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout)
    for graph, launches in ((forward, 2), (backward, 5)):
        assert not [target for target in graph if "mbf" in target]
        assert sum("triton_kernel_wrapper" in target for target in graph) == launches
        assert "aten.mm.default" in graph


def test_run_time_values_compile_nothing_anew() -> None:
    done = run("-m", "tests.kernels.scripts", "compilations")
    assert done.returncode == 0, done.stderr
    first, after = json.loads(done.stdout)
    names = {"project", "accumulate", "output_gradient", "input_gradient", "reduce"}
    assert {name.removesuffix("_kernel") for name in first} == names
    assert after == first
