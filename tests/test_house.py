"""The floor plan, read from the sources: who may import whom, and the same rooms on every floor."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Downwards only: what each part of mbf may import, of mbf and of others (beside the standard library).
OF_MBF = {
    "kernels": set(),
    "ops": {"kernels"},
    "peft": {"ops"},
    "methods": {"ops"},
    "streams": {"methods", "peft", "ops"},
    "continual": {"methods", "peft", "ops"},
    "report": {"continual", "streams", "methods", "peft", "ops"},
    "run": {"report", "continual", "streams", "methods", "peft", "ops"},
    "cli": {"run", "report", "continual", "streams", "methods", "peft", "ops"},
}
OF_OTHERS = {
    "kernels": {"numpy", "torch", "triton"},
    "ops": {"torch"},
    "peft": {"torch", "peft", "safetensors"},
    "methods": {"torch", "pydantic"},
    "streams": {"torch", "datasets", "filelock", "numpy", "pandas", "pyarrow", "pydantic", "requests", "yaml"},
    "continual": {"torch", "peft", "pydantic", "safetensors", "transformers"},
    "report": {"numpy", "pydantic", "jinja2", "matplotlib"},
    "run": {
        "accelerate",
        "torch",
        "datasets",
        "filelock",
        "numpy",
        "peft",
        "pydantic",
        "safetensors",
        "tokenizers",
        "transformers",
        "yaml",
    },
    "cli": {"pydantic", "rich", "typer", "yaml"},
}


def imported(source: str, package: str = "mbf") -> set[str]:
    """Dotted names that the source imports anywhere, functions and type-checking blocks included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")
                module = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [module])])
            # `from mbf import ops` names a package of mbf as well as `from mbf.ops import x` does.
            names |= {f"mbf.{alias.name}" for alias in node.names} if module == "mbf" else {module}
    return names


def intruders(source: str, part: str, package: str) -> set[str]:
    """The imports that the floor plan forbids to a file of this part."""
    found = set()
    for name in imported(source, package):
        top, _, rest = name.partition(".")
        if top == "mbf":
            floor = rest.partition(".")[0]
            allowed = floor == part or floor in OF_MBF[part] or floor not in OF_MBF
        else:
            allowed = top in sys.stdlib_module_names or top in OF_OTHERS[part]
        if not allowed:
            found.add(name)
    return found


def sources() -> list[tuple[str, Path]]:
    return [
        (part, path)
        for part in OF_MBF
        for path in sorted((ROOT / "kernels" if part == "kernels" else ROOT / "mbf" / part).rglob("*.py"))
    ]


@pytest.mark.parametrize(("part", "path"), [pytest.param(*s, id=str(s[1].relative_to(ROOT))) for s in sources()])
def test_imports_go_downwards(part: str, path: Path) -> None:
    package = ".".join(("mbf", part, *path.parent.relative_to(ROOT).parts[2:]))
    assert not intruders(path.read_text(), part, package), f"{path} is not allowed to import these"


@pytest.mark.parametrize(
    ("part", "line", "intruder"),
    [
        ("ops", "import peft", "peft"),
        ("ops", "def f():\n    from transformers import Trainer", "transformers"),
        ("ops", "from ..methods import slao", "mbf.methods"),
        ("methods", "from mbf import continual", "mbf.continual"),
        ("continual", "from mbf.run.config import RunConfig", "mbf.run.config"),
        ("cli", "import torch", "torch"),
    ],
)
def test_the_plan_forbids(part: str, line: str, intruder: str) -> None:
    assert intruders(line, part, f"mbf.{part}") == {intruder}


def test_no_part_is_left_out_of_the_plan() -> None:
    parts = {path.name for path in (ROOT / "mbf").iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert parts <= set(OF_MBF)


# -- the same rooms on every floor ---------------------------------------------------------------------------------


def ops() -> set[str]:
    return {path.stem for path in (ROOT / "mbf/ops").glob("*.py") if not path.stem.startswith("_")}


def sources_of_tests(room: str) -> str:
    """The test files of one part as one text."""
    return "\n".join(path.read_text() for path in sorted((ROOT / "tests" / room).glob("*.py")))


def test_every_op_is_tested() -> None:
    assert ops()
    assert [name for name in sorted(ops()) if not re.search(rf"\b{name}\b", sources_of_tests("ops"))] == []


@pytest.mark.parametrize("floor", ["kernels/*.py", "csrc/cpu/*.cpp", "csrc/cuda/*.cu"])
def test_kernels_bear_the_name_of_their_op(floor: str) -> None:
    kernels = {path.stem for path in ROOT.glob(floor) if not path.stem.startswith("_")} - {"compile"}
    assert kernels <= ops()


def test_native_kernels_are_of_defined_operators() -> None:
    """``csrc/ops.cpp`` lists kernels only of operators whose schema stands in ``mbf/ops``, and each file once."""
    import torch

    import mbf.ops  # noqa: F401  (defines the operators)

    listed = re.findall(r'\bm\.impl\(\s*"(\w+)"', (ROOT / "csrc/ops.cpp").read_text())
    assert listed
    assert [name for name in listed if not hasattr(torch.ops.mbf, name)] == []


def test_a_method_is_one_file_and_tested() -> None:
    from mbf import methods

    names = methods.available()
    assert [name for name in names if methods.get(name).__module__ != f"mbf.methods.{name}"] == []
    assert [name for name in names if f'"{name}"' not in sources_of_tests("methods")] == []
