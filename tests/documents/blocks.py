"""README and docs as fenced blocks, links and images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class DocumentError(AssertionError):
    """A document shows what is not so; the message begins with file and line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title, the line of its first line of text."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def wrong(self, message: str) -> DocumentError:
        return DocumentError(f"{self.page}:{self.line}: {message}")


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks in their order, those inside lists and admonitions without their indentation."""
    found: list[Block] = []
    open_: tuple[str, str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if open_ is None:
            if fence:
                open_, lines = (fence[1], fence[2], fence[3].strip(), number + 1), []
            continue
        indent, ticks, info, first = open_
        if fence and fence[2].startswith(ticks) and not fence[3].strip():
            title = re.search(r'title="([^"]*)"', info)
            text = "\n".join(lines) + "\n"
            found.append(Block(page, first, info.split()[0] if info else "", title[1] if title else "", text))
            open_ = None
        else:
            lines.append(line.removeprefix(indent) if line.startswith(indent) else line.lstrip())
    if open_ is not None:
        raise DocumentError(f"{page}:{open_[3] - 1}: a fence that is never closed")
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks; as many lines as before."""
    text = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        first = block.line - 2
        for number in range(first, first + block.text.count("\n") + 2):
            text[number] = ""
    return "\n".join(text)


# -- links ---------------------------------------------------------------------------------------------------------


def broken_links(page: Path) -> list[str]:
    """The relative links and images of the page that lead nowhere, anchors included."""
    broken = []
    for number, line in enumerate(prose(page).splitlines(), 1):
        for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z][a-z+.-]*:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                broken.append(f"{page}:{number}: {target}: there is no {path}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                broken.append(f"{page}:{number}: {target}: {path or page.name} has no heading of that name")
    return broken


def anchors(page: Path) -> set[str]:
    """The headings as GitHub and MkDocs make anchors of them, and what an API page documents."""
    text = prose(page)
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in headings}
    return slugs | set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))


def missing_files(page: Path) -> list[str]:
    """What the page names in code, such as `mbf/ops/basis.py` or `tests/test_house.py::test_every_op_is_tested`, and
    is not there. Files that the page itself shows are, and those that a build makes."""
    shown = {block.title for block in blocks(page)}
    missing = []
    for name in re.findall(r"`((?:mbf|csrc|kernels|tests|bench|examples|docs)/[\w./-]*\w(?:::\w+)?)`", prose(page)):
        path, _, test = name.partition("::")
        if path in shown or path.endswith(".so"):
            continue
        if not (ROOT / path).exists():
            missing.append(f"{page}: names {name}, which is not there")
        elif test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8"):
            missing.append(f"{page}: names {name}, and {path} has no such test")
    return missing
