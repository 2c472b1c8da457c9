"""Whatever the readers of a run's directory are given, they take it whole or refuse it in their own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf.report.result import ResultError
from mbf.run.directory import RunError
from tests.continual.test_readers import JSON
from tests.fuzz.targets.run_directory import GOOD, READERS

ROOT = Path("/run")


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_field_of_anything(name: str, data: st.DataObject) -> None:
    key, value = data.draw(st.sampled_from(sorted(GOOD[name]))), data.draw(JSON)
    read(name, {**GOOD[name], key: value})


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=100, deadline=None)
@given(content=JSON)
def test_anything(name: str, content: Any) -> None:
    read(name, content)


def read(name: str, content: Any) -> None:
    try:
        READERS[name](content, ROOT / name)
    except (RunError, ResultError) as error:
        assert str(ROOT) in str(error) and name in str(error)


@pytest.mark.parametrize("name", READERS)
def test_what_is_good_is_taken(name: str) -> None:
    READERS[name](GOOD[name], ROOT / name)
