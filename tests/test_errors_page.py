"""``docs/errors.md`` lists every message that the package can raise, each with its way out."""

from __future__ import annotations

import ast
import re

import pytest

from tests.documents import errors_page, messages
from tests.documents.errors_page import PAGE, parts, whole_messages, written

# Messages of other errors, passed on as they are.
PASSED_ON = {"number", "str(error)", "'\\n'.join((head + line for line in explain(error, RunConfig)))"}


def test_the_page_is_what_the_code_raises() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run python -m tests.documents.errors_page"


def test_every_message_is_read() -> None:
    unread = {one.source for one in messages.messages() if one.text is None}
    assert unread <= PASSED_ON | {"' '.join(str(error).split())"}


def test_every_message_has_a_way_out() -> None:
    without = [
        f"{one.module}:{one.line}: {one.text}"
        for one in whole_messages()
        if re.fullmatch("(‹[^›]*›)?", parts(one.text or "")[1])
    ]
    assert not without, "\n".join(without)


def test_what_stands_inside_of_others_is_there() -> None:
    texts = [(one.module, one.text or "") for one in messages.messages()]
    for module, beginnings in errors_page.INNER.items():
        for beginning in beginnings:
            assert any(text.startswith(beginning) for where, text in texts if where == module), (module, beginning)


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ('def f(): raise ValueError(f"a is {a.b!r}; it must be {len(c)}")', ["a is ‹b›; it must be ‹…›"]),
        ('M = "x; do y"\ndef f(): return TypeError(M)', ["x; do y"]),
        ('def f():\n w = "a" if p else "b"\n raise ValueError(f"no {w}" + "; z")', ["no a; z", "no b; z"]),
        ("def f(error): raise ValueError(str(error))", [None]),
        ('def f():\n  def g(): raise OSError("in g; out")', ["in g; out"]),
        ('W = "go"\ndef f(a, way=W): raise OSError(f"no; {way}")', ["no; go"]),
        ('def r(x) -> str | None:\n if x: return "z"\n return None\ndef f():\n if t := r(1): raise OSError(t)', ["z"]),
    ],
)
def test_messages_are_read_out_of_code(monkeypatch: pytest.MonkeyPatch, code: str, texts: list[str | None]) -> None:
    monkeypatch.setattr(messages, "trees", lambda: {"m": ast.parse(code)})
    monkeypatch.setattr(messages, "_classes", dict)
    assert [one.text for one in messages.messages()] == texts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a is 1; pass 2", ("a is 1", "pass 2")),
        ("no such file. Name one; or two", ("no such file", "Name one; or two")),
        ("p: found 7, wanted a share", ("p: found 7", "wanted a share")),
        ("p: found 7, wanted a share; set it", ("p: found 7, wanted a share", "set it")),
        ("it is merged: call model.unmerge()", ("it is merged", "call model.unmerge()")),
        ("it is so", ("it is so", "")),
    ],
)
def test_the_way_out_of_a_message(text: str, found: tuple[str, str]) -> None:
    assert parts(text) == found
