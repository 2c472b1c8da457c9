"""pytest plugin, loaded into runs of PEFT's tests: the layer in place of PEFT's, the selections, the counts.

It reads its plan from the JSON file that ``$MBF_PEFT_SUITE`` names (see ``tests/peft_suite/run.py``) and appends one
JSON line per phase of a test to the plan's ``events`` file. It is imported by name from its own folder, because PEFT's
tests call their package ``tests``, too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PLAN = json.loads(Path(os.environ["MBF_PEFT_SUITE"]).read_text(encoding="utf-8"))
UNREACHED = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")  # what huggingface_hub raises offline


def selection_of(nodeid: str) -> str | None:
    """The first selection to which the test belongs."""
    path, _, name = nodeid.partition("::")
    for selection in PLAN["selections"]:
        if Path(path).name == selection["file"]:
            # As pytest's -k: any case, the names of file, class, function and parameters.
            text = f"{selection['file']}::{name}".lower()
            if all(word.lower() in text for word in selection["needs"]) and not any(
                word.lower() in text for word in selection["without"]
            ):
                return selection["name"]
    return None


def hide_torchao() -> None:
    """PEFT until 0.20 fails for any LoRA where a newer torchao is installed; quantised bases are for tests/peft."""
    sys.modules["torchao"] = None  # type: ignore[assignment]  # then find_spec finds none


def stay_offline() -> None:
    """Refuse requests to the hub at once: PEFT's tests lift HF_HUB_OFFLINE, and each try would wait for its retries."""
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    def refuse() -> Any:
        raise OfflineModeIsEnabled("the suite runs without the hub")

    huggingface_hub.set_client_factory(refuse)


def stand_in_for_quotes() -> None:
    """Until 0.18 a module of PEFT's tests loads a data set of quotes from the hub while it is imported."""
    if not Path("tests", "testing_utils.py").exists():
        return
    import datasets

    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if path == "ybelkada/english_quotes_copy":
            rows = {"quote": [f"A saying of {number} words or so." for number in range(64)]}
            return datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
        return load(path, *args, **kwargs)

    datasets.load_dataset = load_dataset


def install(layer: str) -> Any:
    """Make ``module:Class`` PEFT's ``lora.layer.Linear``, which its dispatcher creates; the module's call counter."""
    import peft.tuners.lora.layer

    stock = peft.tuners.lora.layer.Linear
    module, _, name = layer.partition(":")
    replacement = getattr(importlib.import_module(module), name)
    # It goes by PEFT's name, which is how pickle finds it and what messages print.
    replacement.__module__, replacement.__qualname__ = stock.__module__, stock.__qualname__
    peft.tuners.lora.layer.Linear = replacement
    from mbf.peft import calls

    return calls


class Worker:
    """In the process that runs the tests."""

    def __init__(self) -> None:
        hide_torchao()
        stay_offline()
        stand_in_for_quotes()
        self.calls = install(PLAN["layer"]) if PLAN["layer"] else {"fast": 0, "slow": 0}
        self.seen = dict(self.calls)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        only = None if PLAN["only"] is None else set(PLAN["only"])
        for item in items:
            item.user_properties.append(("selection", selection_of(item.nodeid)))
        wanted = [
            item for item in items if item.user_properties[-1][1] is not None and (only is None or item.nodeid in only)
        ]
        kept = {id(item) for item in wanted}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = wanted

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
        report = yield
        if report.failed and call.excinfo is not None and _offline(call.excinfo.value):
            report.user_properties.append(("hub", True))
        for path in ("fast", "slow"):
            report.user_properties.append((path, self.calls[path] - self.seen[path]))
        self.seen = dict(self.calls)
        return report


class Controller:
    """In the process that gets all reports."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # the workers have them otherwise
            _event(when="collected", total=len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        _event(
            id=report.nodeid,
            when=report.when,
            selection=found.get("selection") or selection_of(report.nodeid),
            outcome="hub" if found.get("hub") else outcome,
            seconds=report.duration,
            fast=found.get("fast", 0),
            slow=found.get("slow", 0),
            reason=_reason(report),
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            name = next((s["name"] for s in PLAN["selections"] if s["file"] == Path(report.nodeid).name), "")
            _event(id=report.nodeid, when="collect", selection=name, outcome="failed", reason=_reason(report))


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    distributes = bool(config.getoption("numprocesses", None))
    if is_worker or not distributes:
        config.pluginmanager.register(Worker(), "mbf-worker")
    if not is_worker:
        config.pluginmanager.register(Controller(), "mbf-controller")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    _event(when="collected", total=len(ids))


def _offline(error: BaseException | None) -> bool:
    """Whether the hub, which is switched off, is what the test lacked."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if type(error).__name__ in UNREACHED or any(name in str(error) for name in UNREACHED):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message)
    return str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")


def _event(**event: Any) -> None:
    with Path(PLAN["events"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
