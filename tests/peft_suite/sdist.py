"""PEFT's sdist from the package index into the cache, verified; its tests unpacked; packages beside them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from urllib.parse import urldefrag

import requests
from filelock import FileLock

from mbf.streams.artifacts import Artifact
from mbf.streams.fetch import TIMEOUT, FetchError, Progress, cache_dir, fetch, listing, package_indexes

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def suite_dir(cache: str | Path | None) -> Path:
    """What the suite keeps in the cache, apart from the sdists."""
    return cache_dir(cache) / "peft-suite"


def peft_tests(version: str, *, cache: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The folder with PEFT's ``tests`` of that version, fetched and unpacked if it is not there.

    Raises:
        FetchError: the index lists no such sdist or gives no sha256 for it, or it cannot be downloaded.
    """
    archive = fetch(_pinned(version, cache), cache=cache, progress=progress)
    folder = suite_dir(cache) / f"peft-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unpack(archive, Path(scratch))
                (Path(scratch) / "tests" / "__init__.py").touch()  # the sdist lacks it; relative imports need it
                shutil.move(scratch, folder)
                Path(scratch).mkdir()  # for the clean-up
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """The files of ``<sdist>/tests`` into ``folder/tests``.

    Raises:
        FetchError: one of them is no ordinary file or leads out of the folder.
    """
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, inside = member.name.partition("/")
            if inside.startswith("tests/") and not member.isdir():
                if not member.isfile() or ".." in Path(inside).parts:
                    raise FetchError(
                        f"{archive.name}: {member.name} is no ordinary file of tests/; nothing of it is run"
                    )
                tar.extract(member.replace(name=inside), folder, filter="data")


def packages(version: str, *, cache: str | Path | None = None) -> Path:
    """A folder for the front of PYTHONPATH: what PEFT's tests import, and PEFT itself if another version is installed.

    The environment stays as it is: torch, transformers and all else come from there.

    Raises:
        FetchError: pip cannot install them.
    """
    wanted = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    if version != metadata.version("peft"):
        wanted.append(f"peft=={version}")
    key = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:12]
    folder = suite_dir(cache) / f"packages-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                target = Path(scratch, "packages")
                options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(target)]
                command = [sys.executable, "-m", "pip", "install", *options, *wanted]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
                    raise FetchError(f"pip cannot install {', '.join(wanted)}: {'; '.join(lines) or result.stderr}")
                target.rename(folder)
    return folder


def _pinned(version: str, cache: str | Path | None) -> Artifact:
    """The sdist with the sha256 that the index gave when it was first asked for."""
    filename = f"peft-{version}.tar.gz"
    record = suite_dir(cache) / f"{filename}.json"
    if record.exists():
        return Artifact(**json.loads(record.read_text(encoding="utf-8")))
    artifact = _listed(version, filename)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(vars(artifact)), encoding="utf-8")
    return artifact


def _listed(version: str, filename: str) -> Artifact:
    reasons = []
    indexes, session = package_indexes()
    with session:
        for index in indexes:
            try:
                files = listing(session, index, "peft")
                if filename not in files:
                    reasons.append("the index lists no such file")
                    continue
                address, fragment = urldefrag(files[filename])
                digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
                if digest is None:
                    reasons.append("the index gives no sha256 for it")
                    continue
                head = session.head(address, allow_redirects=True, timeout=TIMEOUT)
                head.raise_for_status()
                return Artifact("peft", version, filename, int(head.headers["Content-Length"]), digest[1], "Apache-2.0")
            except requests.RequestException as error:
                reasons.append(re.sub(r"//[^/@\s]+@", "//", str(error)))
    raise FetchError(
        f"no sdist {filename} to be had: {'; '.join(reasons) or 'pip knows no index by HTTP'}. "
        f"Check --peft-version, the network and pip's index-url."
    )
