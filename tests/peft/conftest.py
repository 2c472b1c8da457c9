"""What is computed, seen by the tests of groups and MLPs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import mbf.peft.groups


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every group that is computed."""
    sizes: list[int] = []
    compute = mbf.peft.groups.lora_group

    def counted(x: Tensor, layers: Any) -> Any:
        sizes.append(len(layers))
        return compute(x, layers)

    monkeypatch.setattr(mbf.peft.groups, "lora_group", counted)
    return sizes
