"""What a user reads before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mbf import __version__

COMMANDS = ("run", "resume", "compare", "report", "merge", "methods", "fetch", "doctor", "bench")


def test_every_command_is_listed(mbf) -> None:
    result = mbf("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(mbf, command: str) -> None:
    result = mbf(command, "--help")
    assert result.exit_code == 0
    assert f"mbf {command}" in result.stdout.split("Examples:")[1]


def test_brackets_in_an_example_stay(mbf) -> None:
    assert "[q_proj, k_proj]" in " ".join(mbf("run", "--help").stdout.split())


def test_help_of_run_shows_the_defaults(mbf) -> None:
    text = mbf("run", "--help").stdout
    assert [default for default in ("(slao)", "(1)", "(0)", "runs/<stream>-<time>") if default not in text] == []


def test_no_command_is_help(mbf) -> None:
    assert "Usage" in mbf().output


def test_version(mbf) -> None:
    assert mbf("--version").stdout == f"mbf {__version__}\n"


def test_help_waits_for_no_model_library() -> None:
    """They take seconds to import, and say things of their own."""
    heavy = "{'peft', 'transformers', 'datasets', 'mbf.run'}"
    code = f"import sys, mbf.cli.app; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]" and found.stderr == ""
