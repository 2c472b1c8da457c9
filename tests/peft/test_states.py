"""The table of states × backends × dtypes: fused within the error rule, or PEFT's own result bit for bit."""

from __future__ import annotations

import pytest

import mbf

from .outcomes import check
from .states import CASES, DECLINED, FUSED, STATES, State
from .states_page import PAGE, written


def name(value: State | str) -> str:
    return value.name if isinstance(value, State) else value


@pytest.mark.parametrize(("state", "dtype"), CASES, ids=name)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_a_state(state: State, dtype: str, backend: str) -> None:
    if backend == "compiled":
        check(state, dtype)
    else:
        with mbf.use_backend("reference"):
            check(state, dtype)


def test_no_state_is_listed_twice() -> None:
    assert len(STATES) == len(FUSED) + len(DECLINED)
    assert all(state.fused for state in FUSED) and not any(state.fused for state in DECLINED)


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "python -m tests.peft.states_page writes it anew"
