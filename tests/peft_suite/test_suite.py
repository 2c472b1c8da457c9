"""The suite counts calls, and fails when and only when the fused layer fails where PEFT's own does not."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mbf.streams.fetch import FetchError
from tests.peft_suite.run import STOCK, Outcome, Result, SuiteError, compare, run
from tests.peft_suite.sdist import peft_tests, unpack
from tests.peft_suite.selections import SELECTIONS, Selection

LAYERS = """
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def model():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False, lora_alpha=16, r=8)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)


def expected(layer, x):
    return layer.base_layer(x) + 2 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T


@pytest.mark.parametrize("rows", [3, 5])
def test_branch(rows):  # two fast calls
    made, x = model(), torch.randn(rows, 8)
    first, second = made.base_model.model
    torch.testing.assert_close(made(x), expected(second, expected(first, x)))


def test_disabled():  # two slow calls
    made, x = model(), torch.randn(3, 8)
    with made.disable_adapter():
        made(x)


def test_names():
    assert importlib.util.find_spec("torchao") is None
    from peft.tuners.lora.layer import Linear
    assert type(model().base_model.model[0]) is Linear and repr(Linear) == "<class 'peft.tuners.lora.layer.Linear'>"
"""
TROUBLE = """
import os
from unittest import mock

import pytest


def test_fails_in_any_case():
    assert 1 + 1 == 3


@pytest.fixture
def broken():
    raise OSError("no such thing")


def test_fixture_fails_in_any_case(broken): ...


def test_hub():
    from transformers import AutoConfig

    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", False):
        AutoConfig.from_pretrained("nobody/nothing")


@pytest.mark.xfail
def test_expected():
    assert False


@pytest.mark.skip(reason="not here")
def test_left_out(): ...
"""
CRASH = "import os\ndef test_dies(): os._exit(3)\n"
BRANCH = Selection("branch", "test_layers.py", ("TEST_branch",))
REST = Selection("rest", "test_layers.py", without=("names",))
NAMES = Selection("names", "test_layers.py")
TROUBLES = Selection("trouble", "test_trouble.py")
LACKING = Selection("lacking", "test_of_another_version.py")
ALL = (BRANCH, REST, NAMES, TROUBLES, LACKING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ``tests`` in the place of PEFT's."""
    made: Path = tmp_path_factory.mktemp("peft")
    (made / "tests").mkdir()
    for name, text in (("__init__", ""), ("test_layers", LAYERS), ("test_trouble", TROUBLE), ("test_crash", CRASH)):
        (made / "tests" / f"{name}.py").write_text(text)
    return made


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return compare(folder, ALL, workers=2)


def names(tests: Any) -> set[str]:
    return {name.rpartition("::")[2] for name in tests}


def test_calls_of_both_workers_are_counted_by_selection(result: Result) -> None:
    assert {**result.counts("branch")} == {"passed": 2, "fast": 4, "slow": 0}
    assert {**result.counts("rest")} == {"passed": 1, "fast": 0, "slow": 2}
    assert {**result.counts("names")} == {"passed": 1, "fast": 0, "slow": 0}
    assert result.fast == 4


def test_failures_that_stock_peft_shares_do_not_fail_the_suite(result: Result) -> None:
    assert names(result.stock_fails) == {"test_fails_in_any_case", "test_fixture_fails_in_any_case"}
    assert result.broken == [] and result.verdict() is None


def test_what_needs_the_hub_or_is_skipped_is_set_apart(result: Result) -> None:
    counts = result.counts("trouble")
    assert {**counts} == {"stock fails too": 2, "hub": 1, "xfailed": 1, "skipped": 1, "fast": 0, "slow": 0}
    hub = next(test for name, test in result.tests.items() if name.endswith("test_hub"))
    assert hub.seconds < 20  # the refusal is at once, not after retries


def test_a_wrong_layer_fails_the_suite(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text(
        "from mbf.peft import FusedLinear\n"
        "class Doubled(FusedLinear):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return y if self.disable_adapters else 2 * y - self.base_layer(x)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = compare(folder, (BRANCH, REST), layer="planted:Doubled")
    assert names(result.broken) == {"test_branch[3]", "test_branch[5]"}
    assert result.stock_fails == set() and result.fast > 0
    assert "2 of PEFT's tests fail" in (result.verdict() or "")


def test_no_fast_call_and_a_required_selection_without_tests_fail_the_suite(folder: Path) -> None:
    renamed = Selection("renamed", "test_layers.py", ("test_of_old",), required=True)
    result = compare(folder, (BRANCH, REST, renamed), layer="peft.tuners.lora.layer:Linear")
    assert {test.outcome for test in result.tests.values()} == {"passed"}
    assert result.missing == ["renamed"] and "no test found for renamed" in (result.verdict() or "")
    result.missing.clear()
    assert "no call was computed by the fused operator" in (result.verdict() or "")


def test_keyword_and_only_choose_among_the_selected(folder: Path) -> None:
    only = [f"tests/test_layers.py::test_{name}" for name in ("branch[3]", "disabled")]
    assert names(run(folder, ALL, layer=STOCK, only=only, keyword="not branch")) == {"test_disabled"}


def test_a_pytest_that_dies_is_an_error_and_a_worker_that_dies_a_failure(folder: Path) -> None:
    crash = (Selection("crash", "test_crash.py"),)
    with pytest.raises(SuiteError, match="exit status 3"):
        run(folder, crash, layer=STOCK)
    assert [test.outcome for test in run(folder, crash, layer=STOCK, workers=1).values()] == ["failed"]


def test_a_failed_teardown_outweighs_a_passed_call() -> None:
    test = Outcome("any")
    for outcome in ("passed", "failed", "passed"):
        test.add({"outcome": outcome, "fast": 1, "slow": 0, "seconds": 0.5, "reason": outcome})
    assert (test.outcome, test.fast, test.reason) == ("failed", 3, "failed")


def test_selections_have_names_of_their_own() -> None:
    assert len({selection.name for selection in SELECTIONS}) == len(SELECTIONS)


# -- the sdist ---------------------------------------------------------------------------------------------------------


def archive(path: Path, *members: tuple[str, str]) -> Path:
    """An sdist with files of the given contents; a content ``-> x`` makes a link to x."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content.startswith("-> "):
                info.type, info.linkname = tarfile.SYMTYPE, content[3:]
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    return path


def test_only_tests_are_unpacked(tmp_path: Path) -> None:
    made = archive(tmp_path / "a.tar.gz", ("peft-1/setup.py", "1"), ("peft-1/tests/test_a.py", "2"))
    unpack(made, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.py")] == [
        "tests/test_a.py"
    ]


@pytest.mark.parametrize(("name", "content"), [("peft-1/tests/a", "-> /etc"), ("peft-1/tests/../../b", "b")])
def test_links_and_ways_out_are_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(FetchError, match="no ordinary file"):
        unpack(archive(tmp_path / "a.tar.gz", (name, content)), tmp_path / "out" / "deeper")
    assert not (tmp_path / "b").exists() and not list((tmp_path / "out").rglob("[ab]"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package index of plain files with PEFT 1.0; returns the page's path."""
    made = archive(tmp_path / "peft-1.0.tar.gz", ("peft-1.0/tests/test_a.py", "def test(): ..."))
    page = tmp_path / "simple" / "peft" / "index.html"
    page.parent.mkdir(parents=True)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    page.write_text(f'<a href="../../peft-1.0.tar.gz#sha256={digest}">peft-1.0.tar.gz</a>')

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield page
    server.shutdown()
    server.server_close()


def test_the_sdist_is_fetched_verified_and_then_needs_no_index(index: Path, tmp_path: Path) -> None:
    folder = peft_tests("1.0", cache=tmp_path / "cache")
    assert {path.name for path in (folder / "tests").iterdir()} == {"__init__.py", "test_a.py"}
    index.unlink()
    assert peft_tests("1.0", cache=tmp_path / "cache") == folder


def test_another_file_than_the_index_names_is_refused(index: Path, tmp_path: Path) -> None:
    index.write_text(f'<a href="../../peft-1.0.tar.gz#sha256={"0" * 64}">peft-1.0.tar.gz</a>')
    with pytest.raises(FetchError, match="wanted 0000"):
        peft_tests("1.0", cache=tmp_path / "cache")


def test_an_unknown_version_and_a_missing_digest_are_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"peft-9\.9\.tar\.gz.*lists no such file"):
        peft_tests("9.9", cache=tmp_path / "cache")
    index.write_text('<a href="../../peft-1.0.tar.gz">peft-1.0.tar.gz</a>')
    with pytest.raises(FetchError, match=r"peft-1\.0\.tar\.gz.*no sha256"):
        peft_tests("1.0", cache=tmp_path / "cache")
