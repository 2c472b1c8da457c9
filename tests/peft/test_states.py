"""The table of states × backends × dtypes: fused within the error rule, or PEFT's own result bit for bit."""

from __future__ import annotations

import pytest

import mbf

from .outcomes import check
from .states import CASES, State


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
