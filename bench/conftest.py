"""Benchmarks run side by side; ``--csv FILE`` keeps the figures with the device and versions that made them."""

from __future__ import annotations

from typing import Any

import pytest
from common import csv_rows, facts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csv", metavar="FILE", help="write medians and quartiles, device, versions and commit to FILE")


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Called once all benchmarks have run and the JSON is asked for."""
    target = config.getoption("--csv")
    if not target:
        return
    columns = ["group", "name", "median_us", "q1_us", "q3_us", "rounds"]
    with csv_rows(target, columns, facts()) as add:
        for one in output_json["benchmarks"]:
            stats = one["stats"]
            times = [f"{1e6 * stats[key]:.1f}" for key in ("median", "q1", "q3")]
            add([one["group"], one["params"]["variant"], *times, stats["rounds"]])
