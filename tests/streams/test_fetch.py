"""Fetching against a package index of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mbf.streams.artifacts import ARTIFACTS, Artifact
from mbf.streams.fetch import CHUNK, FetchError, cache_dir, cached, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
ARTIFACT = Artifact(
    "Some.Data", "1.0", "some_data-1.0.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "MIT"
)


@dataclass
class Index:
    """What the server serves, how it misbehaves, and what it was asked."""

    content: bytes = CONTENT
    html: bool = False
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)  # bytes after which the next answers end
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    address: str = "../../files/" + ARTIFACT.filename  # what the listing says of the file
    page: bytes | None = None  # what the listing is instead
    other: bytes = b""  # what a second index, /other, has as the file


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    state = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append((self.path, self.headers.get("Range")))
            if self.path == "/simple/some-data/":
                self.listing()
            elif self.path == "/files/some_data-1.0.tar.gz":
                self.file()
            elif self.path == "/other/some-data/":
                files = [{"filename": ARTIFACT.filename, "url": f"{state.url}/other/{ARTIFACT.filename}"}]
                self.answer(200, json.dumps({"files": files}).encode(), {"Content-Type": "application/json"})
            elif self.path == f"/other/{ARTIFACT.filename}":
                self.answer(200, state.other, {})
            else:
                self.send_error(404)

        def listing(self) -> None:
            if state.html:
                kind, page = "text/html", f'<a href="{state.address}#sha256=0">some_data</a>'
            else:
                kind = "application/vnd.pypi.simple.v1+json"
                page = json.dumps({"files": [{"filename": ARTIFACT.filename, "url": state.address}]})
            self.answer(200, page.encode() if state.page is None else state.page, {"Content-Type": kind})

        def file(self) -> None:
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(start[1]) if start and state.ranges else 0
            self.answer(206 if first else 200, state.content[first:], {}, state.breaks.pop(0) if state.breaks else None)

        def answer(self, status: int, body: bytes, headers: dict[str, str], end: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:end])

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PIP_INDEX_URL", f"{state.url}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield state
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
def test_fetches_verifies_and_then_needs_no_network(index: Index, tmp_path: Path, html: bool) -> None:
    index.html = html
    seen: list[tuple[str, int, int]] = []
    path = fetch(ARTIFACT, cache=tmp_path, progress=lambda *step: seen.append(step))
    assert path == cached(ARTIFACT, tmp_path)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (ARTIFACT.filename, len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})

    asked = len(index.asked)
    assert fetch(ARTIFACT, cache=tmp_path) == path
    assert len(index.asked) == asked


def test_a_break_is_continued_where_it_stopped(index: Index, tmp_path: Path) -> None:
    index.breaks = [5 * CHUNK, 3 * CHUNK]
    assert fetch(ARTIFACT, cache=tmp_path).read_bytes() == CONTENT
    ranges = [asked for path, asked in index.asked if path.startswith("/files")]
    assert ranges == [None, f"bytes={5 * CHUNK}-", f"bytes={8 * CHUNK}-"]


def test_a_part_of_an_earlier_process_is_continued(index: Index, tmp_path: Path) -> None:
    part = cached(ARTIFACT, tmp_path).with_name(f"{ARTIFACT.filename}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:700_000])
    assert fetch(ARTIFACT, cache=tmp_path).read_bytes() == CONTENT
    assert index.asked[-1][1] == "bytes=700000-"
    assert not part.exists()


def test_a_server_without_ranges_starts_over(index: Index, tmp_path: Path) -> None:
    index.ranges = False
    index.breaks = [300_000]
    assert fetch(ARTIFACT, cache=tmp_path).read_bytes() == CONTENT


def test_another_file_never_enters_the_cache(index: Index, tmp_path: Path) -> None:
    index.content = CONTENT[::-1]
    with pytest.raises(FetchError, match=f"wanted {ARTIFACT.sha256}"):
        fetch(ARTIFACT, cache=tmp_path)
    assert [file.name for file in cached(ARTIFACT, tmp_path).parent.iterdir() if file.suffix != ".lock"] == []


def test_a_damaged_file_in_the_cache_is_replaced(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = cached(ARTIFACT, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        assert fetch(ARTIFACT, cache=tmp_path).read_bytes() == CONTENT
    assert "damaged" in caplog.text


def test_unreachable_says_where_to_put_the_file(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(FetchError, match="not in the cache and could not be downloaded") as raised:
        fetch(ARTIFACT, cache=tmp_path)
    assert str(tmp_path / "packages") in str(raised.value)
    assert "secret" not in str(raised.value)


def test_what_only_pip_can_reach_comes_through_pip(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr(
            "some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    artifact = replace(
        ARTIFACT,
        filename=wheel.name,
        size=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    assert fetch(artifact, cache=tmp_path / "cache").read_bytes() == wheel.read_bytes()
    with pytest.raises(FetchError, match="pip: "):
        fetch(replace(artifact, sha256="0" * 64), cache=tmp_path / "other")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBF_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    assert cache_dir(tmp_path / "there") == tmp_path / "there"
    monkeypatch.delenv("MBF_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "mbf"


def test_every_artifact_is_pinned() -> None:
    for package, artifact in ARTIFACTS.items():
        assert artifact.package == package
        assert artifact.version in artifact.filename
        assert re.fullmatch(r"[0-9a-f]{64}", artifact.sha256)


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "FILE:/etc/passwd", "javascript:alert(1)", "ftp://host/file"]
)
@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
def test_an_index_may_name_http_addresses_only(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, html: bool
) -> None:
    monkeypatch.setattr("mbf.streams.fetch._download_with_pip", lambda *_: "pip: not asked here")
    index.html, index.address = html, f"{address}/{ARTIFACT.filename}"
    with pytest.raises(FetchError, match="which is not http or https; pip: not asked here"):
        fetch(ARTIFACT, cache=tmp_path)
    assert not cached(ARTIFACT, tmp_path).exists()


@pytest.mark.parametrize("page", [b"{", b"[]", b'{"files": 7}', b'{"files": [{"filename": "a"}]}', b"[" * 100_000])
def test_an_index_that_answers_nonsense(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    monkeypatch.setattr("mbf.streams.fetch._download_with_pip", lambda *_: "pip: not asked here")
    index.page = page
    with pytest.raises(FetchError, match=r"the package index lists no files \(.*\); pip: not asked here"):
        fetch(ARTIFACT, cache=tmp_path)


def test_no_more_is_taken_than_the_file_has(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.streams.fetch._download_with_pip", lambda *_: "pip: not asked here")
    index.content = CONTENT * 3
    with pytest.raises(FetchError, match=f"more than the {len(CONTENT)} bytes of {ARTIFACT.filename} came"):
        fetch(ARTIFACT, cache=tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= len(CONTENT)


@pytest.mark.parametrize("given", [CONTENT[::-1], CONTENT[::-1] * 2, b"<html>log in</html>"])
def test_what_a_wrong_index_gave_is_not_continued(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bytes
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/other")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index.url}/simple")
    index.other = given
    assert fetch(ARTIFACT, cache=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [700_000, len(CONTENT), len(CONTENT) + 1])
def test_a_damaged_part_is_fetched_from_the_start(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    part = cached(ARTIFACT, tmp_path).with_name(f"{ARTIFACT.filename}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * size)
    with caplog.at_level(logging.WARNING):
        assert fetch(ARTIFACT, cache=tmp_path).read_bytes() == CONTENT
    assert index.asked[-1][1] is None
    assert ("fetching it from the start, once" in caplog.text) == (size <= len(CONTENT))


def test_a_full_disk_says_where_and_what_to_do(index: Index, tmp_path: Path) -> None:
    part = cached(ARTIFACT, tmp_path).with_name(f"{ARTIFACT.filename}.part")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; free some space, or name another folder in") as error:
        fetch(ARTIFACT, cache=tmp_path)
    assert error.value.filename == str(part)


def test_a_page_that_never_ends(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbf.streams.fetch._download_with_pip", lambda *_: "pip: not asked here")
    monkeypatch.setattr("mbf.streams.fetch.MAX_PAGE", 1000)
    index.page = json.dumps({"files": [{"filename": ARTIFACT.filename, "url": index.address}]}).encode() + b" " * 1000
    with pytest.raises(FetchError, match=r"/simple/some-data/ is longer than 1000 bytes; pip: not asked here"):
        fetch(ARTIFACT, cache=tmp_path)


def test_what_enters_the_cache_is_synced(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("mbf.streams.disk._sync", lambda path: synced.append(path.name))
    fetch(ARTIFACT, cache=tmp_path)
    assert synced == [f"{ARTIFACT.filename}.part", "packages"]
