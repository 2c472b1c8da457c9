"""YAML that somebody else wrote: plain values, or one line that says where and why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mbf.streams.yaml_file import MAX_BYTES, YamlError, parse_yaml, parse_yaml_file

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"\xef\xbb\xbfname: \xc3\x85se", {"name": "Åse"}),
        ("a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b}\n", None),
        ("a: &a {x: 1}\nb: &b {<<: *a, y: 2}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        (
            "a: &a {x: 1}\nbase: {inner: &b {<<: *a, x: 2}}\ntop: {<<: *b, y: 3}",
            {"a": {"x": 1}, "base": {"inner": {"x": 2}}, "top": {"x": 2, "y": 3}},
        ),
        ("- &b {<<: {n: 1}, n: 2}\n- {<<: *b}", [{"n": 2}, {"n": 2}]),
        ("", None),
        ("1e-3", "1e-3"),
        ("[2026-11-27, 2026-13-45, =, ~, 0x1f, yes]", ["2026-11-27", "2026-13-45", "=", None, 31, True]),
    ],
)
def test_values(content: str | bytes, values: object) -> None:
    found = parse_yaml(content)
    if isinstance(content, str) and "c: {" in content:
        assert found["c"] == {"x": 1, "y": 2}  # merges of merges are no bomb
    else:
        assert found == values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: 1\nb: \xff", "line 2: byte 8 is not UTF-8; save the file as UTF-8"),
        ("a: \0", "special characters are not allowed"),
        ("a: [1,\nb: 2", "line 2: "),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is there twice; leave one of them out"),
        ("- &b {<<: {n: 1},\n  n: 2,\n  n: 3}\n- {<<: *b}", "line 3: key 'n' is there twice; leave one of them out"),
        ("[" * 60 + "]" * 60, "line 1: nested deeper than 50; make it flatter"),
        (BOMB, "stands for more than 100000 values; write the values out"),
        ("a: &a [1, *a]", "line 1: what is named by & holds itself; write the values out"),
        ("a: &a 1\nb: [" + "*a, " * 101 + "]", "line 2: more than 100 aliases (*name); write the values out"),
        ("a: 0x_", "a value is not what it looks like: invalid literal for int() with base 16: ''; put it in quotes"),
        ("a: !!binary gIGC", "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:binary'"),
        ("a: !!set {b, c}", "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:set'"),
        ("a: !!timestamp 2026-11-27", "could not determine a constructor for the tag"),
        ("{{a: 1}: 2}", "line 1: while constructing a mapping found unhashable key"),
        ("a:\n\tb: 1", "line 2: "),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document in the stream"),
        ("a" * (MAX_BYTES + 1), f"has more than {MAX_BYTES} bytes; rows belong into files of their own"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_refused(content: str | bytes, said: str) -> None:
    with pytest.raises(YamlError, match=re.escape(said)) as error:
        parse_yaml(content)
    assert "\n" not in str(error.value)


def test_no_more_of_a_file_is_read_than_it_takes() -> None:
    with pytest.raises(YamlError, match=f"has more than {MAX_BYTES} bytes"):
        parse_yaml_file(Path("/dev/zero"))
