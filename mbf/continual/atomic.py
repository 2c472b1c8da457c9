"""Files and directories that appear whole or not at all, whenever the machine stops; and what a file hashes to.

Everything is written beside its place first, as ``.<name>.new-<random>``, then synced and renamed. A process that is
killed leaves such a torso behind; ``sweep`` removes them, for a caller who knows that nobody else writes there. What
cannot be written (a full disk, say) is one ``OSError`` that names the place and the way out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_TORSO = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)-[0-9a-f]+")

_WAYS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "choose a place that can be written",
    errno.EEXIST: "move away the file that stands where a directory is wanted",
    errno.ENOTDIR: "move away the file that stands where a directory is wanted",
    errno.EISDIR: "move away the directory that stands where a file is wanted",
}


@contextmanager
def whole_directory(
    path: str | os.PathLike[str], mark: str | None = None, known: Collection[str] = (), keep: Collection[str] = ()
) -> Iterator[Path]:
    """Yield a temporary sibling to fill; at the end of the block it is synced and takes the place of ``path``.

    An existing directory at ``path`` is replaced. On an exception nothing of the attempt stays. Stopped between the two
    renames, the old directory is left beside as ``.<name>.old-*``, which ``recover_directory`` puts back.

    Args:
        path: the directory.
        mark: a file by which a directory is known as one that may be replaced; default: any may.
        known: with a mark, what else may be there and goes; a directory that holds more is not replaced.
        keep: files that stay as they are where the directory has them.

    Raises:
        ValueError: ``path`` holds something else: a file, or a directory that is neither empty nor has the mark, or
            that has something unknown beside it.
        OSError: it cannot be written; names ``path`` and the way out, and what was there is whole.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(Path(path), target, mark, {mark, *known, *keep})
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        temporary.mkdir()
        try:
            yield temporary
            for name in keep:
                if (target / name).is_file():
                    shutil.copy2(target / name, temporary / name)
            sync_tree(temporary)
            _exchange(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(target.parent)  # before the old one goes: the renames may not be on the disk yet
        _remove_old(target)


@contextmanager
def whole_files(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """Yield a temporary directory to fill; at the end its files take the places of those of their names in ``path``.

    All are written and synced before the first is renamed, so what cannot be written changes nothing. Where ``path``
    does not exist, they appear all at once. Other files there stay.

    Args:
        path: the directory.
        last: the file that is renamed after all others: where it is new, everything is.

    Raises:
        OSError: they cannot be written; names ``path`` and the way out.
    """
    target = Path(os.path.realpath(path))
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target if not target.is_dir() else target / target.name)
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            if target.is_dir():
                for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
                    os.replace(file, target / file.name)
                sync(target)
            else:
                temporary.rename(target)
                sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace the file's content in one step; text is written as UTF-8.

    Raises:
        OSError: it cannot be written; names ``path`` and the way out, and what was there is whole.
    """
    target = Path(path)
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(target.parent)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever the block cannot write is an OSError of ``path`` that says what to do, whoever wrote it."""
    try:
        yield
    except OSError as error:
        number, reason = error.errno, error.strerror or str(error)
    except SafetensorError as error:  # has the number in words alone
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        reason = os.strerror(number)
    except RuntimeError as error:  # of torch.save, which does not say what the system said
        if not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
        number, reason = None, "the file could not be written"
    else:
        return
    way = _WAYS.get(number or 0, "free some space or make it writable")
    raise OSError(number, f"{reason}; {way}, then do it again. What was there before is whole", str(path)) from None


def recover_directory(path: str | os.PathLike[str]) -> None:
    """Put back the old directory of a replacement that was stopped between its two renames.

    Others may do so at the same time, or be just about to finish that replacement.
    """
    target = Path(os.path.realpath(path))
    if not target.exists():
        for old in _olds(target):
            try:
                old.rename(target)
            except OSError:
                if not target.exists():
                    raise
            return


def sweep(root: Path) -> None:
    """Remove below ``root`` what killed processes left half written, and put back what they were about to replace.

    Only for a caller who holds the lock of ``root``: what another process is just writing looks the same.
    """
    for folder, directories, files in os.walk(root, topdown=True):
        for name in [*directories, *files]:
            if (torso := _TORSO.fullmatch(name)) is None:
                continue
            path, target = Path(folder, name), Path(folder, torso["name"])
            if torso["kind"] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        directories[:] = [name for name in directories if not is_torso(name)]


def is_torso(name: str) -> bool:
    """Whether a file or directory of this name is what a killed process left half written."""
    return _TORSO.fullmatch(name) is not None


def sync_tree(root: Path) -> None:
    """Have everything below ``root``, and it itself, on the disk and not just in memory."""
    for path in [*root.rglob("*"), root]:
        sync(path)


def sync(path: Path) -> None:
    """Have a file's content, or a directory's names, on the disk; where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _exchange(new: Path, target: Path, attempts: int = 3) -> None:
    """Put ``new`` in the place of ``target``, which goes beside; on an exception ``target`` is what it was."""
    if not target.exists():
        new.rename(target)
        return
    _remove_old(target)  # from a replacement that was stopped after both renames
    for attempt in range(attempts):
        old = _beside(target, "old")
        target.rename(old)
        try:
            new.rename(target)
            return
        except BaseException:
            if not target.exists():
                old.rename(target)
                raise
            if attempt == attempts - 1:  # a reader has put the old one back each time
                raise


def _check_replaceable(shown: Path, target: Path, mark: str | None, known: Collection[str | None]) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{shown}: found a file, wanted a directory; move it away, or choose another place")
    if mark is None or not target.is_dir():
        return
    found = sorted(file.name for file in target.iterdir())
    if found and mark not in found:
        raise ValueError(
            f"{shown}: found a directory with {found[0]} and without {mark}, which writing there would remove; "
            "choose another place"
        )
    if foreign := next((name for name in found if name not in known), None):
        raise ValueError(
            f"{shown}: found {foreign} beside {mark}, which writing there would remove; move it away, or choose "
            "another place"
        )


def _beside(target: Path, kind: str = "new") -> Path:
    return target.parent / f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}"


def _olds(target: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.old-[0-9a-f]+")
    return sorted(path for path in target.parent.glob(".*") if pattern.fullmatch(path.name))


def _remove_old(target: Path) -> None:
    for old in _olds(target):
        shutil.rmtree(old, ignore_errors=True)
