"""Clean environments for the wheel: which Pythons and which releases, and how they are made."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """An environment to be made.

    ``oldest`` takes the lower bound of every requirement, otherwise it is the releases of constraints.txt; ``pythons``
    names the Pythons that may serve, first choice first, and without any the one that runs this does. ``gigabytes`` is
    what downloads and installation take, with room to spare: of the oldest torch there may be no build without CUDA.
    """

    name: str
    pythons: tuple[str, ...]
    oldest: bool
    gigabytes: int


PLANS = (
    Plan("pinned", (), oldest=False, gigabytes=4),
    Plan("oldest", ("3.10", "3.12", "3.13", "3.14"), oldest=True, gigabytes=20),
)


class CheckError(Exception):
    """The wheel, or this machine, lacks something; the message says what."""


def outside() -> dict[str, str]:
    """The variables of this process, without those that would show the checkout, or any mbf, to an environment."""
    hidden = ("MBF_", "PYTHON", "PYTEST", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    found = os.environ.get("PIP_FIND_LINKS", "")  # where a torch for the CPU may lie that no registry offers
    return kept | {"UV_FIND_LINKS": ",".join(found.split()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def uv(*arguments: str | Path, **variables: str) -> str:
    """Run uv, which ``make`` installs; returns what it says on standard output."""
    program = Path(sys.executable).parent / "uv"
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(
        command, env=outside() | variables, cwd=ROOT.anchor, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckError(f"this failed: uv {' '.join(command[1:])}\n{done.stderr.strip()}")
    return done.stdout.strip()


def find_python(versions: tuple[str, ...]) -> Path | None:
    """An interpreter of the first of ``versions`` that is there, pyenv's included; otherwise one that uv can bring."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    for version in versions:
        if found := sorted(pyenv.glob(f"{version}.*/bin/python{version}")):
            return found[-1]
        with suppress(CheckError):
            return Path(uv("python", "find", "--no-project", "--no-python-downloads", version))
    with suppress(CheckError):
        uv("python", "install", versions[0])
        return Path(uv("python", "find", "--no-project", "--managed-python", versions[0]))
    return None


def requirements(wheel: Path, extra: str = "") -> list[str]:
    """What ``wheel`` requires, with ``extra`` or without, as lines for an installer."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = []
    for line in metadata.get_all("Requires-Dist") or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        named = re.search(r'extra == ["\']([^"\']+)["\']', marker)
        if named is None or named[1] == extra:
            found.append(requirement)
    return found


def torch_of(plan: Plan, wheel: Path) -> str:
    """How the version of torch must begin in an environment of ``plan``."""
    lines = requirements(wheel) if plan.oldest else (ROOT / "constraints.txt").read_text().splitlines()
    (found,) = (match[1] for line in lines if (match := re.fullmatch(r"torch[>=]=([\d.]+)", line)))
    return found


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own in ``folder``."""

    plan: Plan
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def package(self) -> Path:
        """The folder of the installed mbf."""
        (found,) = (self.folder / "lib").glob("python*/site-packages/mbf")
        return found

    def install(self, distribution: Path, extra: str = "") -> None:
        """Install a wheel with what it requires: the pinned releases, or the oldest that it says will do."""
        target = f"mbf[{extra}] @ {distribution.as_uri()}" if extra else f"mbf @ {distribution.as_uri()}"
        if self.plan.oldest:
            chosen: list[str | Path] = ["--resolution", "lowest-direct", *requirements(distribution, extra)]
        else:
            chosen = ["--constraints", ROOT / "constraints.txt"]
        uv("pip", "install", "--python", self.python, *chosen, target)

    def install_sdist(self, sdist: Path) -> None:
        """Build and install an sdist in place of the wheel, with neither a C++ compiler nor nvcc to be found."""
        build = ["setuptools", "wheel", "ninja"]
        uv("pip", "install", "--python", self.python, "--constraints", ROOT / "constraints.txt", *build)
        flags = ["--no-build-isolation", "--no-deps", "--reinstall-package", "mbf"]
        none = {"CXX": "/nonexistent/c++", "CUDA_HOME": "/nonexistent"}
        uv("pip", "install", "--python", self.python, *flags, sdist, **none)

    def do(self, *command: str | Path) -> str:
        """Run this environment's Python, isolated, from its own folder; returns what it prints."""
        done = subprocess.run(
            [str(self.python), "-I", *map(str, command)],
            cwd=self.folder,
            env=outside(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode:
            raise CheckError(
                f"{self.plan.name}: this failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()


def make(plan: Plan, folder: Path) -> Environment:
    """An empty environment; of this Python, where no other is to be had."""
    interpreter = find_python(plan.pythons) if plan.pythons else None
    uv("venv", "--no-project", "--python", interpreter or sys.executable, folder)
    return Environment(plan, folder)
