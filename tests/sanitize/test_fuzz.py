"""A few of the random calls of ``make sanitize`` in every run of the tests, without its sanitizers."""

from __future__ import annotations

import pytest
import torch

from mbf.ops import native_status
from tests.sanitize.arguments import VALID
from tests.sanitize.fuzz import call, operators, references


def test_every_operator_has_arguments_and_a_reference() -> None:
    assert set(operators()) == set(VALID) == set(references())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
@pytest.mark.parametrize("name", sorted(VALID))
def test_random_calls(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        outcomes = [call(name, number, 0, references()[name], huge=False) for number in range(24)]
    finally:
        torch.set_num_threads(threads)
    assert {"right", "refused"} <= set(outcomes) <= {"right", "refused", "computed"}
