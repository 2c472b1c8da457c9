"""What a result was computed with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("mbf", "torch", "transformers", "peft", "accelerate", "datasets")


def versions() -> dict[str, str | None]:
    """Version by name: packages, Python, mbf's commit where it runs from a checkout; and the device and its threads."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {**found, "commit": commit(), "device": device, "threads": str(torch.get_num_threads())}


def commit() -> str | None:
    """The commit that mbf's own files are of, with a ``+`` where they differ from it; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(package, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True, text=True)
    return done.stdout.strip()
