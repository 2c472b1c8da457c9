"""Install the wheel of DIST into clean environments outside the checkout and use it there.

Two environments: this Python with the releases of constraints.txt, and another Python with the oldest release of every
requirement, torch 2.10.0 among them. In each: what the bare library says of its command line; an operator against its
reference; mbf doctor; a fused Llama that learns two tasks; plain PEFT on what that saved, with mbf blocked; mbf run on
JSONL files. Then the compiled parts are hidden, and again with the sdist, installed where there is no compiler: the
reference serves, mbf doctor says so, and the results are the same. An environment for which the disk has no room is
left out, and a line says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.wheel.clean import PLANS, CheckError, Environment, Plan, make, torch_of

COMPARE = """
import sys, torch
from pathlib import Path
one, other = map(Path, sys.argv[1:])
for name in ("operator.pt", "learner.pt"):
    torch.testing.assert_close(torch.load(one / name), torch.load(other / name), rtol=1e-3, atol=1e-3)
"""


class Check:
    """The parts of ``inside.py`` in one environment, each with a line that says what came of it."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.script = Path(shutil.copy(Path(__file__).with_name("inside.py"), environment.folder))
        self.passed = 0

    def say(self, line: str) -> None:
        print(f"  [{time.monotonic() - START:5.0f} s] {line}", flush=True)

    def part(self, name: str, folder: Path) -> None:
        for line in self.environment.do(self.script, name, folder).splitlines():
            self.say(line)
        self.passed += 1

    def installation(self, name: str, compiled: bool, parts: tuple[str, ...] = ("library", "plain", "run")) -> Path:
        """Everything that an installation must do; returns the folder of what it left."""
        folder = self.environment.folder / name
        folder.mkdir()
        for part in ("doctor", *parts):
            self.part(part, folder)
        loaded = json.loads((folder / "doctor.json").read_text())["compiled extension"]["loaded"]
        if loaded is not compiled:
            raise CheckError(f"{name}: mbf doctor says loaded: {loaded} of the compiled extension; wanted {compiled}")
        return folder

    def same(self, one: Path, other: Path) -> None:
        self.environment.do("-c", COMPARE, one, other)
        self.say(f"the results of {one.name} and {other.name} are the same")
        self.passed += 1

    def wheel(self, wheel: Path) -> Path:
        self.environment.install(wheel)
        self.part("refused", self.environment.folder)
        self.environment.install(wheel, "run")
        return self.installation("wheel", compiled=True)

    def hidden(self, compiled: Path) -> None:
        for library in self.environment.package.glob("*.so"):
            library.rename(self.environment.folder / library.name)
        self.same(compiled, self.installation("hidden", compiled=False))

    def sdist(self, sdist: Path, compiled: Path) -> None:
        self.environment.install_sdist(sdist)
        self.same(compiled, self.installation("sdist", compiled=False, parts=("library",)))


def check(plan: Plan, wheel: Path, sdist: Path, folder: Path) -> int:
    """All parts in the environment of ``plan``; returns how many passed."""
    environment = make(plan, folder)
    found = Check(environment)
    version = environment.do("-c", "import sys; print(*sys.version_info[:2], sep='.')")
    found.say(f"{plan.name}: Python {version}")
    if plan.pythons and version not in plan.pythons:
        found.say(f"NO OTHER PYTHON: none of {', '.join(plan.pythons)} is here, nor can uv bring one")
    compiled = found.wheel(wheel)
    torch = json.loads((compiled / "doctor.json").read_text())["versions"]["torch"]
    if not torch.startswith(torch_of(plan, wheel)):
        raise CheckError(f"{plan.name}: torch {torch} was installed; wanted {torch_of(plan, wheel)}")
    found.hidden(compiled)
    if not plan.oldest:
        found.sdist(sdist, compiled)
    return found.passed


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CheckError(f"{folder} holds {len(found)} of {pattern}; wanted one: make wheel")
    return found[0].resolve()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.wheel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="the folder with one wheel and one sdist, as make wheel leaves it")
    names = [plan.name for plan in PLANS]
    parser.add_argument("--environment", choices=names, action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    passed = failed = 0
    try:
        wheel, sdist = only(options.dist, "*.whl"), only(options.dist, "*.tar.gz")
        for plan in PLANS:
            if plan.name in (options.environment or names):
                with tempfile.TemporaryDirectory(prefix=f"mbf-{plan.name}-") as folder:
                    free = shutil.disk_usage(folder).free / 1e9
                    if free < plan.gigabytes:
                        print(f"LEFT OUT {plan.name}: {free:.0f} GB are free, wanted {plan.gigabytes}", flush=True)
                        continue
                    passed += check(plan, wheel, sdist, Path(folder))
    except CheckError as error:
        print(error, file=sys.stderr)
        failed = 1
    print(f"wheel: {passed} passed, {failed} failed")
    return failed


START = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
