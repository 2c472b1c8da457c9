from __future__ import annotations

import json

from tests.kernels.uninterpreted import run


def test_graphs_hold_the_launches() -> None:
    done = run("-m", "tests.kernels.scripts", "graphs")
    assert done.returncode == 0, done.stderr
    graphs, guards = json.loads(done.stdout)
    # One graph for any number of tokens, but of lilora_accumulate, where torch tells a sum over one part from others.
    assert len(guards) == 1 and all(guard.endswith(" < 2") for guard in guards)
    expected = {"forward": 3, "backward": 5, "turned": 1, "turned_back": 3, "nested": 4, "nested_back": 9}
    assert graphs.keys() == expected.keys()
    for name, graph in graphs.items():
        assert not [target for target in graph if "mbf" in target]
        assert sum("triton_kernel_wrapper" in target for target in graph) == expected[name], name
    assert all("aten.mm.default" in graphs[name] for name in ("forward", "backward"))


def test_run_time_values_compile_nothing_anew() -> None:
    done = run("-m", "tests.kernels.scripts", "compilations")
    assert done.returncode == 0, done.stderr
    first, after = json.loads(done.stdout)
    names = {"project", "accumulate", "output_gradient", "input_gradient", "reduce"}
    names |= {"square", "square_input_gradient", "square_gradient", "lilora_route", "lilora_unroute"}
    assert {name.removesuffix("_kernel") for name in first} == names
    assert after == first
