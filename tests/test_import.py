"""``import mbf`` is light, and works without the compiled extension and without the extras."""

from __future__ import annotations

import os
import subprocess
import sys

HEAVY = [
    "triton",
    "datasets",
    "matplotlib",
    "typer",
    "rich",
    "jinja2",
    "requests.sessions",
    "accelerate",
    "transformers.trainer",
    "transformers.models.llama",
    "transformers.modeling_utils",
    "bitsandbytes",
    "torchao",
    "hqq",
]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, timeout=300, check=False
    )


def test_import_mbf_is_light() -> None:
    result = python("import sys, torch, mbf; print(torch.cuda.is_initialized(), *sys.modules)")
    assert result.returncode == 0, result.stderr
    cuda, *loaded = result.stdout.split()
    assert cuda == "False"
    assert "mbf.ops._library" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_the_compiled_extension_is_optional() -> None:
    code = """
import torch, mbf
old, new = torch.zeros(3), torch.ones(3)
mbf.ops.merge_([old], [new], 0.5)
print(old.tolist(), mbf.ops.native_status().loaded)
"""
    result = python(code, MBF_NO_NATIVE="1")
    assert result.stdout.strip() == "[0.5, 0.5, 0.5] False", result.stderr


def test_the_command_line_without_its_extra_says_what_to_install() -> None:
    code = """
import sys
sys.modules["typer"] = None
sys.argv = ["mbf", "methods"]
from mbf.cli import main
main()
"""
    result = python(code)
    assert result.returncode == 2
    assert 'pip install "mbf[run]"' in result.stderr
    assert "typer" in result.stderr
    assert "Traceback" not in result.stderr
