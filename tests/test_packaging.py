"""What is installed: one shared object on the stable ABI, ``kernels/`` as ``mbf.kernels``, and a build that survives
the lack of a compiler."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mbf.ops import native_status

ROOT = Path(__file__).resolve().parents[1]
READ = ("bench", "docs", "examples", "mkdocs.yml", "SECURITY.md")  # what README and tests lead to
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "csrc", "kernels", "mbf", *READ)

native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@native
def test_the_extension_is_named_for_every_python():
    assert native_status().path.name == "_C.abi3.so"


def test_kernels_are_a_part_of_mbf():
    assert importlib.import_module("mbf.kernels").__name__ == "mbf.kernels"


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, so that nothing of it lands in the source tree."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def files_of(tree, part):
    return {str(path.relative_to(tree)) for path in (tree / part).rglob("*") if path.is_file()}


def build(tree, hook, **environment):
    """Run one hook of the build backend in ``tree``; returns the completed process."""
    code = f"from setuptools import build_meta; build_meta.{hook}('out')"
    (tree / "out").mkdir()
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "MBF_BUILD_CPU": "", "MBF_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@source_tree
def test_without_a_compiler_the_wheel_is_pure_and_says_so(tree):
    run = build(tree, "build_wheel", CXX="/nonexistent/c++", MBF_BUILD_CUDA="auto", CUDA_HOME="/nonexistent")
    assert run.returncode == 0, run.stderr
    of_cpu, of_cuda = (line for line in run.stderr.splitlines() if line.startswith("mbf: "))
    assert "without the compiled extension" in of_cpu and "/nonexistent/c++" in of_cpu
    assert "without the CUDA extension" in of_cuda and "/nonexistent/bin/nvcc" in of_cuda
    (wheel,) = (tree / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "mbf/kernels/__init__.py" in names and "mbf/ops/merge.py" in names
    assert "mbf/py.typed" in files_of(tree, "mbf") <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/")) or name.endswith(".so")]


@source_tree
@pytest.mark.parametrize(
    ("value", "message"),
    [("1", "MBF_BUILD_CPU=1, but the compiled extension cannot be built: the C++ compiler"), ("yes", "set it to 0")],
)
def test_an_extension_that_is_required_or_misspelt_fails_with_one_line(tree, value, message):
    run = build(tree, "build_wheel", CXX="/nonexistent/c++", MBF_BUILD_CPU=value)
    assert run.returncode != 0
    assert message in run.stderr.splitlines()[-1]


@source_tree
@pytest.mark.parametrize(
    ("value", "message"),
    [("1", "MBF_BUILD_CUDA=1, but the CUDA extension cannot be built: the CUDA compiler"), ("yes", "set it to 0")],
)
def test_a_cuda_extension_that_is_required_or_misspelt_fails_with_one_line(tree, value, message):
    run = build(tree, "build_wheel", MBF_BUILD_CPU="0", MBF_BUILD_CUDA=value, CUDA_HOME="/nonexistent")
    assert run.returncode != 0
    assert message in run.stderr.splitlines()[-1]


@source_tree
def test_an_editable_install_compiles_no_cuda_unless_told(tree):
    run = build(tree, "build_editable", MBF_BUILD_CPU="0", MBF_BUILD_CUDA="auto")
    assert run.returncode == 0, run.stderr
    assert not (tree / "build" / "cuda").exists() and not list((tree / "mbf").glob("*.so"))


@source_tree
def test_the_sdist_holds_every_source(tree):
    run = build(tree, "build_sdist", MBF_BUILD_CPU="0")
    assert run.returncode == 0, run.stderr
    assert "mbf: installing without the compiled extension: MBF_BUILD_CPU=0" in run.stderr
    (sdist,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "csrc/ops.cpp",
        "csrc/portable.map",
        "kernels/__init__.py",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
    } <= names
    assert files_of(tree, "csrc") | files_of(tree, "kernels") | files_of(tree, "mbf") <= names
    assert set().union(*(files_of(tree, part) or {part} for part in READ)) <= names
