"""A tiny stream and configurations over it; the files of bench/."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
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


@pytest.fixture
def bench_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """``bench_file("lora_linear")`` imports a file of bench/, which isn't a package."""
    folder = Path(__file__).parents[2] / "bench"
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (folder / f"{name}.py").exists():
            del sys.modules[name]
