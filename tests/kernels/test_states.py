"""The states of a PEFT layer on the kernels: they compute what is fused, as accurately as PEFT does, and no more."""

from __future__ import annotations

import pytest

from tests.peft.outcomes import check
from tests.peft.states import FUSED, STATES, State

DTYPES = ("fp32", "bf16", "fp16", "fp32 on bf16")
# Of those left to PEFT the calls that the kernels would compute wrongly rather than not at all.
DECLINED = ("disabled", "merged", "mixed batch (`adapter_names`)", "variant: DoRA", "`lora_bias`")
CASES = [(state, dtype) for state in (*FUSED, *map(STATES.get, DECLINED)) for dtype in DTYPES if dtype in state.dtypes]


def name(value: State | str) -> str:
    return value.name if isinstance(value, State) else value


@pytest.mark.parametrize(("state", "dtype"), CASES, ids=name)
def test_a_state_on_triton(state: State, dtype: str, on_triton: list[str]) -> None:
    check(state, dtype)
    assert bool(on_triton) == (state.fused and state.x().numel() > 0)
