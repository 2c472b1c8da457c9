"""One run of the selections in a pytest of its own, and what came of them beside stock PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.peft_suite.selections import Selection

FUSED = "mbf.peft.linear:FusedLinear"
STOCK = ""
PLUGIN = Path(__file__).parent / "plugin"
OUTCOMES = ("passed", "failed", "skipped", "xfailed", "hub")


class SuiteError(RuntimeError):
    """pytest could not run the tests."""


@dataclass
class Outcome:
    """What came of one test, over its set-up, call and tear-down."""

    selection: str
    outcome: str = "passed"
    fast: int = 0
    slow: int = 0
    seconds: float = 0.0
    reason: str = ""

    def add(self, event: dict[str, Any]) -> None:
        self.fast += event["fast"]
        self.slow += event["slow"]
        self.seconds += event["seconds"]
        if event["outcome"] != "passed" and self.outcome != "failed":
            self.outcome, self.reason = event["outcome"], event["reason"]


@dataclass
class Result:
    """All tests of the fused run, and of those that failed in it the ones that stock PEFT fails, too."""

    tests: dict[str, Outcome]
    stock_fails: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)  # required selections without a test

    @property
    def broken(self) -> list[str]:
        """Tests that fail with the fused layer only."""
        return [name for name, test in self.tests.items() if test.outcome == "failed" and name not in self.stock_fails]

    @property
    def fast(self) -> int:
        return sum(test.fast for test in self.tests.values())

    def verdict(self) -> str | None:
        """Why the suite fails, or None."""
        if self.broken:
            return f"{len(self.broken)} of PEFT's tests fail with the fused layer and pass with PEFT's own"
        if self.missing:
            return f"no test found for {', '.join(self.missing)}: have PEFT's tests other names now? See selections.py"
        if not self.fast:
            return "no call was computed by the fused operator, so nothing is proved"
        return None

    def counts(self, selection: str) -> Counter[str]:
        """Tests by outcome, and calls, of one selection."""
        found: Counter[str] = Counter()
        for name, test in self.tests.items():
            if test.selection == selection:
                found["stock fails too" if name in self.stock_fails else test.outcome] += 1
                found.update(fast=test.fast, slow=test.slow)
        return found


Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while tests run."""


def compare(folder: Path, selections: Sequence[Selection], *, layer: str = FUSED, **options: Any) -> Result:
    """Run the selections of ``folder/tests`` with ``layer`` as PEFT's Linear; what fails, once more with stock PEFT."""
    result = Result(run(folder, selections, layer=layer, **options))
    if not options.get("keyword"):
        found = {test.selection for test in result.tests.values()}
        result.missing = [s.name for s in selections if s.required and s.name not in found]
    failed = [name for name, test in result.tests.items() if test.outcome == "failed"]
    if failed:
        few = {"workers": 0} if len(failed) < 32 else {}  # one process starts sooner
        files = {name.partition("::")[0] for name in failed}
        there = [selection for selection in selections if f"tests/{selection.file}" in files]
        again = run(folder, there, layer=STOCK, only=failed, **{**options, **few})
        result.stock_fails = {name for name in failed if again.get(name, Outcome("")).outcome == "failed"}
    return result


def run(
    folder: Path,
    selections: Sequence[Selection],
    *,
    layer: str,
    only: Sequence[str] | None = None,
    keyword: str = "",
    packages: Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """What came of each test, by its name.

    Args:
        folder: where PEFT's ``tests`` lie.
        selections: those whose file this version lacks are passed over.
        layer: ``module:Class`` to put in place of PEFT's ``lora.layer.Linear``; empty for PEFT's own.
        only: the names of the tests to run; default all that are selected.
        keyword: a further pytest -k.
        packages: a folder for the front of PYTHONPATH.
        workers: processes of pytest-xdist; 0 runs the tests in one.

    Raises:
        SuiteError: pytest stopped before all tests had been run.
    """
    there = [selection for selection in selections if (folder / "tests" / selection.file).exists()]
    files = list(dict.fromkeys(f"tests/{selection.file}" for selection in there))
    with tempfile.TemporaryDirectory() as scratch:
        events, plan = Path(scratch, "events"), Path(scratch, "plan.json")
        settings = {"layer": layer, "only": only, "selections": [asdict(s) for s in there], "events": str(events)}
        plan.write_text(json.dumps(settings), encoding="utf-8")
        events.touch()
        paths = [str(path) for path in (packages, PLUGIN) if path] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
        environment = os.environ | {
            "MBF_PEFT_SUITE": str(plan),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-q", "-W", "ignore"]
        command += ["-p", "no:cacheprovider", "-p", "fused_everywhere", "--timeout", "300", "--tb", "short"]
        command += [
            "--continue-on-collection-errors",
            "-k",
            keyword,
            *(f"-n{workers} --dist load".split() * bool(workers)),
        ]
        with Path(scratch, "output").open("w+", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*command, *files], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                _watch(process, events, progress, "stock PEFT" if layer == STOCK else "fused")
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            output.seek(0)
            if process.returncode not in (0, 1, 5):  # 5: no test was left to run
                tail = "\n".join(output.read().splitlines()[-30:])
                raise SuiteError(f"pytest ended with exit status {process.returncode}:\n{tail}")
        return _tests(events)


def _watch(process: subprocess.Popen[bytes], events: Path, progress: Progress | None, what: str) -> None:
    while True:
        ended = process.poll() is not None
        if progress is not None:
            lines = events.read_text(encoding="utf-8").splitlines()
            total = max((json.loads(line)["total"] for line in lines if '"total"' in line[:40]), default=0)
            progress(what, sum('"when": "teardown"' in line for line in lines), total)
        if ended:
            return
        time.sleep(1.0 if progress is not None else 0.05)


def _tests(events: Path) -> dict[str, Outcome]:
    tests: dict[str, Outcome] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if "id" in event:
            tests.setdefault(event["id"], Outcome(event["selection"])).add(event)
    return tests
