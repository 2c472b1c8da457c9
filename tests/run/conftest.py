"""A tiny stream, and configurations over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbf.run import RunConfig
from tests.run.tiny import tiny_settings, write_stream


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream") / "tiny")


@pytest.fixture
def config(stream: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``config(methods=[...], ...)`` over the tiny stream, with its output in ``tmp_path / "run"``."""

    def make(**settings: Any) -> RunConfig:
        return RunConfig.model_validate(tiny_settings(stream) | {"output": tmp_path / "run"} | settings)

    return make
