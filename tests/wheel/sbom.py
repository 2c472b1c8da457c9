"""The bill of materials of a wheel, put into the wheel itself: what it holds and what it asks for.

``python -m tests.wheel.sbom dist/*.whl`` adds ``<name>.dist-info/sboms/mbf.cdx.json`` (CycloneDX, where PEP 770 wants
it). The wheel bundles no other package: its files are its own, each with its sha256. Every requirement is a component
with the release that this environment has, the one it was tested with, and the range that it may have as a property.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PLACE = "sboms/mbf.cdx.json"  # in the wheel's .dist-info


def bill(wheel: Path) -> Bom:
    """What ``wheel`` holds and requires; the same wheel gives the same bill but for serial number and time."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(info).decode("utf-8"))
        own = package(metadata)
        bom = Bom()
        bom.metadata.component = own
        for name in sorted(names):
            if ".dist-info/" not in name:
                own.components.add(
                    Component(type=ComponentType.FILE, name=name, bom_ref=name, hashes=[sha256(archive.read(name))])
                )
    asked = [requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    one_each = {component.bom_ref.value: component for component in asked if component.name != own.name}
    bom.components.update(one_each.values())
    bom.register_dependency(own, one_each.values())
    return bom


def package(metadata: Message) -> Component:
    name, number = str(metadata["Name"]), str(metadata["Version"])
    licence = metadata.get("License-Expression")
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=number,
        description=metadata.get("Summary"),
        licenses=[LicenseExpression(str(licence))] if licence else [],
        purl=PackageURL("pypi", name=name, version=number),
        bom_ref=f"{name}=={number}",
    )


def requirement(line: str) -> Component:
    """A package that the wheel asks for; one of an extra alone is optional."""
    asked = Requirement(line)
    name = canonicalize_name(asked.name)
    try:
        number = version(name)
    except PackageNotFoundError:
        number = None
    optional = asked.marker is not None and "extra" in str(asked.marker)
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=number,
        scope=ComponentScope.OPTIONAL if optional else ComponentScope.REQUIRED,
        purl=PackageURL("pypi", name=name, version=number),
        properties=[Property(name="mbf:requires", value=str(asked))],
        bom_ref=name,
    )


def sha256(content: bytes) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(content).hexdigest())


def add(wheel: Path) -> None:
    """Put the bill into ``wheel``, whose RECORD is written anew; nothing else changes."""
    text = JsonV1Dot6(bill(wheel)).output_as_string(indent=1)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        tool = [sys.executable, "-m", "wheel"]
        subprocess.run([*tool, "unpack", "--dest", folder, str(wheel)], check=True, capture_output=True)
        (unpacked,) = Path(folder).iterdir()
        (info,) = unpacked.glob("*.dist-info")
        (info / PLACE).parent.mkdir(exist_ok=True)
        (info / PLACE).write_text(text + "\n", encoding="utf-8")
        packed = Path(folder, "packed")
        packed.mkdir()
        subprocess.run([*tool, "pack", "--dest-dir", str(packed), str(unpacked)], check=True, capture_output=True)
        (packed / wheel.name).replace(wheel)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args(arguments)
    add(options.wheel)
    with zipfile.ZipFile(options.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(PLACE)]
        found = json.loads(archive.read(name))
    print(f"bill of materials: {len(found['components'])} packages asked for, in {options.wheel}/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
