"""Files and directories that appear whole or not at all, whenever the machine stops; and what a file hashes to."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling to fill; at the end of the block it is synced and takes the place of ``path``.

    An existing directory at ``path`` is replaced. On an exception nothing of the attempt stays. Stopped between the two
    renames, the old directory is left beside as ``.<name>.old-*``, which ``recover_directory`` puts back.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.new-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(target)
    _sync(target.parent)


def recover_directory(path: str | os.PathLike[str]) -> None:
    """Put back the old directory of a replacement that was stopped between its two renames."""
    target = Path(path)
    if not target.exists():
        for old in sorted(target.parent.glob(f".{target.name}.old-*")):
            old.rename(target)
            return


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file's text in one step."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.new-{uuid.uuid4().hex[:8]}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems refuse to sync a directory
        os.fsync(descriptor)
    os.close(descriptor)
