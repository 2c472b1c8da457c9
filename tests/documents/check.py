"""What each kind of block must be: Python and diffs run, commands exist with their options, YAML is a configuration."""

from __future__ import annotations

import ast
import contextlib
import difflib
import glob
import importlib.util
import io
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import typer
import yaml
from typer.testing import CliRunner

from tests.documents.blocks import ROOT, Block

Namespace = dict[str, Any]
_PRINTED = "__printed__"


def check(block: Block, namespace: Namespace) -> None:
    """Raise unless the block is right; those of one page share ``namespace`` and the working directory."""
    if block.language not in CHECKS:
        raise block.wrong(
            f"a block of {block.language or 'no language'}; wanted one of {', '.join(CHECKS)}: text is for what cannot "
            "be checked"
        )
    CHECKS[block.language](block, namespace)


def _python(block: Block, namespace: Namespace) -> None:
    if block.title and (ROOT / block.title).exists():
        _excerpt(block, namespace)
        return
    _run(block, block.text, namespace)
    if block.title.startswith("tests/"):
        _run(block, "".join(f"{name}()\n" for name in re.findall(r"^def (test_\w+)\(", block.text, re.M)), namespace)


def _run(block: Block, source: str, namespace: Namespace) -> None:
    # Line numbers of a traceback are those of the page.
    code = compile("\n" * (block.line - 1) + source, str(block.page), "exec")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except Exception as error:
        raise block.wrong(f"{type(error).__name__}: {error}") from error
    namespace[_PRINTED] = printed.getvalue()


def _excerpt(block: Block, namespace: Namespace) -> None:
    """Lines as they stand in the file of the title; a line of dots or comment dots stands for those left out."""
    if not block.title or not (ROOT / block.title).is_file():
        raise block.wrong(f"title is {block.title!r}; wanted the file that this is taken from")
    of_file = [line.strip() for line in (ROOT / block.title).read_text(encoding="utf-8").splitlines()]
    at = 0
    for line in block.text.splitlines():
        text = line.strip()
        if not text or text in ("...", "# ...", "// ..."):
            continue
        try:
            at = of_file.index(text, at) + 1
        except ValueError:
            near = difflib.get_close_matches(text, of_file, 1)
            raise block.wrong(f"{block.title} has no line {text!r} here; near: {near}") from None


def _text(block: Block, namespace: Namespace) -> None:
    """Under the title "prints": lines that the Python before it printed, in their order; some machines print more."""
    if block.title != "prints":
        return
    printed = iter(namespace.get(_PRINTED, "").splitlines())
    for line in block.text.splitlines():
        if line not in printed:  # consumes those before it
            raise block.wrong(f"{line!r} is not printed by the block before it, which prints {namespace[_PRINTED]!r}")


def _diff(block: Block, namespace: Namespace) -> None:
    """What it makes runs; what it is made from, the added blocks' indentation taken back, is Python without mbf."""
    before: list[str] = []
    after: list[str] = []
    opened: list[int] = []  # indentation of added lines that open a block
    for line in block.text.splitlines():
        mark, text = line[:1], line[2:]
        if mark not in ("+", "-", " ", ""):
            raise block.wrong(f"{line!r} in a diff; wanted + or - or a blank before each line")
        indent = len(text) - len(text.lstrip())
        if text.strip():
            opened = [at for at in opened if at < indent]
        if mark != "-":
            after.append(text)
        if mark == "+":
            if text.split("#")[0].rstrip().endswith(":"):
                opened.append(indent)
        else:
            before.append(text[4 * len(opened) :] if mark != "-" else text)
    try:
        old = ast.parse("\n".join(before))
    except SyntaxError as error:
        raise block.wrong(f"without its + lines this is not Python: {error}") from None
    if any(isinstance(node, ast.Name) and node.id == "mbf" for node in ast.walk(old)):
        raise block.wrong("without its + lines this uses mbf already")
    if before == after:
        raise block.wrong("a diff that changes nothing")
    _run(block, "\n".join(after), namespace)


def _yaml(block: Block, namespace: Namespace) -> None:
    from mbf.run.config import ConfigError, parse_config
    from mbf.streams import StreamError
    from mbf.streams.spec import parse_spec

    try:
        data = yaml.safe_load(block.text)
        if not isinstance(data, dict):
            raise block.wrong(f"found {type(data).__name__}, wanted keys and values")
        if "distributed_type" in data:
            _accelerate(block, data)
        elif "tasks" in data:
            parse_spec(data, "this")
        else:
            parse_config({"stream": "quickstart"} | data)
    except (yaml.YAMLError, ConfigError, StreamError) as error:
        raise block.wrong(str(error)) from None


def _accelerate(block: Block, data: dict[str, Any]) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    unknown = set(data) - set(ClusterConfig.__dataclass_fields__)
    if unknown:
        raise block.wrong(f"accelerate's configuration has no {', '.join(sorted(unknown))}")


# -- commands ------------------------------------------------------------------------------------------------------


def _bash(block: Block, namespace: Namespace) -> None:
    syntax = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    if syntax.returncode:
        raise block.wrong(syntax.stderr.strip())
    for command in commands(block.text):
        _command(block, command)


def commands(text: str) -> list[list[str]]:
    """The simple commands of a script as words, comments and redirections left out, patterns expanded."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        target = False
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found, words = ([*found, words] if words else found), []
            elif set(word) <= set("<>"):
                target = True
            elif target:
                target = False
            else:
                words += sorted(glob.glob(word)) or [word] if "*" in word else [word]
    return found


def _command(block: Block, words: list[str]) -> None:
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    name = Path(program).name
    if name not in PROGRAMS:
        raise block.wrong(f"the command {program!r}, for which there is no check; there are {', '.join(PROGRAMS)}")
    PROGRAMS[name](block, arguments)


def _mbf(block: Block, arguments: list[str]) -> None:
    from mbf.cli.app import app

    if not runs_here(arguments):
        parse_only(block, app, arguments)
        return
    result = CliRunner().invoke(app, arguments, prog_name="mbf")
    if result.exit_code:
        raise block.wrong(f"mbf {shlex.join(arguments)} ended with {result.exit_code}: {result.output.strip()[-800:]}")


def runs_here(arguments: list[str]) -> bool:
    """Whether the command takes seconds and no network: not what fetches, times, or learns with the packaged model."""
    command, *rest = [word for word in arguments if not word.startswith("--")] or [""]
    if command == "run":
        return "tiny-random-llama" in " ".join(arguments) and "…" not in " ".join(arguments)
    if command == "compare":
        out = arguments.index("--out") + 1 if "--out" in arguments else 0
        return "tiny-random-llama" in " ".join(arguments) or Path(arguments[out], "compare.json").exists()
    if command in ("resume", "report"):
        return bool(rest) and Path(rest[0]).exists()
    if command == "bench":
        return "--rounds" in arguments
    return command in ("methods", "doctor", "merge", "")


def parse_only(block: Block, app: typer.Typer, arguments: list[str]) -> None:
    """Everything that click checks before it calls the command, for it and its subcommand."""
    group = typer.main.get_command(app)
    try:
        context = group.make_context("mbf", list(arguments))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except click.exceptions.Exit:
        pass
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise block.wrong(f"mbf {shlex.join(arguments)}: {error.format_message()}") from None


def _make(block: Block, arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    for word in arguments:
        variable, equals, _ = word.partition("=")
        if equals and f"$({variable})" not in makefile:
            raise block.wrong(f"make {word}: the Makefile has no variable {variable}")
        if not equals and word not in targets:
            raise block.wrong(f"make {word}: there is no such target; there are {', '.join(sorted(targets))}")


def _python_command(block: Block, arguments: list[str]) -> None:
    if not arguments:
        raise block.wrong("python without a script")
    if arguments[0] == "-c":
        compile(arguments[1], str(block.page), "exec")
        return
    if arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            raise block.wrong(f"python -m {arguments[1]}: there is no such module")
        if not arguments[1].startswith("mbf"):
            _files(block, arguments[2:])
            return
        source = Path(str(importlib.util.find_spec(arguments[1]).origin))  # type: ignore[union-attr]
        rest = arguments[2:]
    else:
        source, rest = ROOT / arguments[0], arguments[1:]
        if not source.is_file():
            raise block.wrong(f"there is no {arguments[0]}")
    text = source.read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        if f'"{option}"' not in text:
            raise block.wrong(f"{source.name} has no option {option}")
    _files(block, [word for word in rest if not word.startswith("-")])


def _files(block: Block, words: list[str]) -> None:
    """Words that name something in the source tree name something that is there."""
    for word in words:
        first = word.split("/")[0]
        if "/" in word and (ROOT / first).is_dir() and not (ROOT / word).exists() and not Path(word).exists():
            raise block.wrong(f"there is no {word}")


def _launch(block: Block, arguments: list[str]) -> None:
    scripts = [word for word in arguments if word.endswith(".py")]
    for script in scripts:
        if not (ROOT / script).is_file():
            raise block.wrong(f"there is no {script}")
    _files(block, arguments)


def _pip(block: Block, arguments: list[str]) -> None:
    from packaging.requirements import Requirement

    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = \[", section.split("\n[")[0], re.MULTILINE))
    names = [w for w in arguments[1:] if not w.startswith("-") and not w.endswith(".txt")]
    for word in names:
        local = word.startswith(".")
        wanted = Requirement("mbf" + word.lstrip("./") if local else word)
        if wanted.name == "mbf" and (unknown := wanted.extras - extras):
            raise block.wrong(f"pip install {word}: mbf has no extra {', '.join(unknown)}")
    _files(block, arguments[1:])


def _no_check(block: Block, arguments: list[str]) -> None:
    """Standard tools, which show what was made."""


CHECKS: dict[str, Callable[[Block, Namespace], None]] = {
    "python": _python,
    "diff": _diff,
    "yaml": _yaml,
    "bash": _bash,
    "cpp": _excerpt,
    "text": _text,
}
PROGRAMS: dict[str, Callable[[Block, list[str]], None]] = {
    "mbf": _mbf,
    "make": _make,
    "python": _python_command,
    "pip": _pip,
    "accelerate": _launch,
    "torchrun": _launch,
    "ls": _no_check,
    "cd": _no_check,
    "export": _no_check,
}
