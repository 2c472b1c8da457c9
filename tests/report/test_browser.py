"""A hostile task name in a browser: shown as text, and nothing of it runs, even without the page's own policy."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mbf.report import page, write_report
from tests.report.examples import run, skipping

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000")
ATTACK = "document.body.dataset.owned=1"
NAMES = (
    f"<script>{ATTACK}</script>",
    f'"><img src=x onerror="{ATTACK}">',
    f"</style></title><svg onload='{ATTACK}'>",
)
MARK = "data-owned"
POLICY = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")


def report(folder: Path) -> str:
    """A page in which every string from data is an attack."""
    result = run(
        tasks=NAMES,
        stream=NAMES[0],
        label=NAMES[1],
        command=NAMES[2],
        versions={NAMES[0]: NAMES[1]},
        data_hashes={name: NAMES[0] for name in NAMES},
        method_options={NAMES[0]: NAMES[1], "rank": NAMES[2]},
        config={"model": NAMES[2], NAMES[1]: NAMES[0]},
    )
    # The second has another option, so that its name says it.
    other = result.model_copy(update={"method_options": {"rank": NAMES[0]}, "command": NAMES[1]})
    return write_report([skipping(result, NAMES[1], NAMES[2]), other], folder).read_text(encoding="utf-8")


def seen(text: str, folder: Path) -> str:
    """The document as the browser has it after its scripts ran."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium; tests/report/test_writer.py looks at the elements itself")
def test_nothing_of_a_name_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = report(tmp_path / "report")
    bare, policies = POLICY.subn("", text)
    assert policies == 1
    for page_text in (text, bare):
        document = seen(page_text, tmp_path)
        assert MARK not in document
        assert "&lt;script&gt;" in document
    # The attacks are real: without escaping and the policy they run.
    environment = page.jinja2.Environment
    monkeypatch.setattr(page.jinja2, "Environment", lambda **options: environment(**options | {"autoescape": False}))
    page._template.cache_clear()
    try:
        assert MARK in seen(POLICY.sub("", report(tmp_path / "open")), tmp_path)
    finally:
        page._template.cache_clear()
