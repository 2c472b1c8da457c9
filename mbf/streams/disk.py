"""Files of the cache: each appears whole or not at all, is synced, and is known by its sha256."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system cannot write in the block is an OSError of ``path`` that says what to do."""
    try:
        yield
    except OSError as error:
        number, reason = error.errno, error.strerror or str(error)
        if number is None:  # of the network: requests' errors are OSErrors, too
            raise
    else:
        return
    way = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    raise OSError(
        number, f"{reason}; {way}, or name another folder in MBF_CACHE, then do it again", str(path)
    ) from None


def write_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step.

    Raises:
        OSError: it cannot be written; names ``path`` and the way out.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        part.write_bytes(content)
    place(part, path)


def place(part: Path, path: Path) -> None:
    """Sync ``part`` and rename it to ``path``.

    Raises:
        OSError: that cannot be done; names ``path`` and the way out.
    """
    with writing(path):
        _sync(part)
        part.replace(path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot sync a directory
            raise
    finally:
        os.close(descriptor)
