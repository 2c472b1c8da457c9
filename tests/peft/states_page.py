"""The table in ``docs/states.md``: ``python -m tests.peft.states_page`` writes it, and a test compares the two."""

from __future__ import annotations

from pathlib import Path

from .states import DECLINED, DTYPES, FUSED, State

PAGE = Path(__file__).resolve().parents[2] / "docs" / "states.md"
BEGIN, END = "<!-- written by python -m tests.peft.states_page -->", "<!-- end -->"


def table() -> str:
    """Both halves of the table as Markdown."""
    kinds = ", ".join(f"`{name}`" for name in DTYPES)
    lines = [
        f"Of each state the tests make a layer in each of these dtypes, where it exists in them: {kinds}",
        "(A and B *on* base and x). Each is computed by the compiled operators and by the reference; the upper half in",
        "Triton's interpreter, too, by the kernels for GPUs, in four of the dtypes.",
        "",
        *rows("Fused: error at most twice PEFT's", FUSED),
        "",
        *rows("PEFT's own forward: equal bit for bit", DECLINED),
    ]
    return "\n".join(lines)


def rows(heading: str, states: list[State]) -> list[str]:
    return [
        f"| {heading} | dtypes |",
        "|---|---|",
        *(f"| {one.name} | {'all' if one.dtypes == tuple(DTYPES) else ', '.join(one.dtypes)} |" for one in states),
    ]


def written(page: str) -> str:
    """The page with the table in its place."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
