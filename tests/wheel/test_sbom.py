"""The bill of materials names what a wheel holds and asks for, is valid CycloneDX, and leaves the wheel a wheel."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cyclonedx") is None, reason="needs cyclonedx-python-lib: pip install 'mbf[dev]'"
)
METADATA = """Metadata-Version: 2.4
Name: mbf
Version: 9.1
Summary: a wheel
License-Expression: Apache-2.0
Requires-Dist: torch>=2.10
Requires-Dist: pytest>=8; extra == "test"
Requires-Dist: no-such-package; extra == "test"
Requires-Dist: mbf[test]; extra == "dev"

words
"""
INFO = "mbf-9.1.dist-info"
CODE = b"print('mbf')\n"


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    tags = b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"mbf/__init__.py": CODE, f"{INFO}/METADATA": METADATA.encode(), f"{INFO}/WHEEL": tags}
    record = [f"{name},{digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{INFO}/RECORD"] = "\n".join([*record, f"{INFO}/RECORD,,"]).encode()
    path = tmp_path / "mbf-9.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def found(wheel: Path) -> dict[str, Any]:
    from tests.wheel import sbom

    assert sbom.main([str(wheel)]) == 0
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read(f"{INFO}/sboms/mbf.cdx.json"))


def test_names_the_package_its_files_and_its_requirements(found) -> None:
    own = found["metadata"]["component"]
    assert (own["name"], own["version"], own["purl"]) == ("mbf", "9.1", "pkg:pypi/mbf@9.1")
    assert own["licenses"] == [{"expression": "Apache-2.0"}]
    (file,) = own["components"]
    assert file["name"] == "mbf/__init__.py"
    assert file["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(CODE).hexdigest()}]
    asked = {component["name"]: component for component in found["components"]}
    assert set(asked) == {"torch", "pytest", "no-such-package"}
    assert (asked["torch"]["scope"], asked["pytest"]["scope"]) == ("required", "optional")
    assert asked["pytest"]["version"] == pytest.__version__
    assert "version" not in asked["no-such-package"]
    assert asked["torch"]["properties"] == [{"name": "mbf:requires", "value": "torch>=2.10"}]
    (depends,) = [one for one in found["dependencies"] if one["ref"] == "mbf==9.1"]
    assert set(depends["dependsOn"]) == set(asked)


def test_is_valid_cyclonedx(found) -> None:
    pytest.importorskip("jsonschema", reason="validates: pip install 'mbf[dev]'")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(found)) is None


def test_wheel_stays_whole(wheel: Path, found) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("mbf/__init__.py") == CODE
        record = archive.read(f"{INFO}/RECORD").decode().splitlines()
        hashes = {line.split(",")[0]: line.split(",")[1] for line in record}
        assert set(hashes) == set(archive.namelist())
        for name, said in hashes.items():
            if name != f"{INFO}/RECORD":
                assert said == digest(archive.read(name)), name
