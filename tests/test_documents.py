"""What README, docs and examples show works as shown: every block is run or checked, every link leads somewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist
import typer
import yaml

from mbf import methods
from mbf.cli.app import app
from mbf.continual import ContinualLora
from mbf.methods import base
from mbf.run.config import RunConfig, parse_config
from tests.continual.tiny import batches, peft_model, train
from tests.documents.blocks import ROOT, Block, DocumentError, blocks, broken_links, missing_files, name_of, pages
from tests.documents.check import CHECKS, check, commands, runs_here

SETUP = ROOT / "tests" / "documents" / "setup"
WITH_BLOCKS = [page for page in pages() if blocks(page)]


@pytest.fixture
def page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Check all blocks of a page, in an empty folder; methods and process groups that it makes end with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))

    def run(page: Path) -> None:
        module = ModuleType("document")  # in sys.modules, where classes of the page are looked up
        monkeypatch.setitem(sys.modules, "document", module)
        namespace = vars(module)
        setup = SETUP / f"{page.stem}.py"
        if page.is_relative_to(ROOT) and setup.exists():
            exec(compile(setup.read_text(encoding="utf-8"), str(setup), "exec"), namespace)
        for block in blocks(page):
            check(block, namespace)

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_every_block_works(page: Path, page_runs: Callable[[Path], None]) -> None:
    page_runs(page)


def test_no_setup_without_its_page() -> None:
    assert {file.stem for file in SETUP.glob("*.py")} <= {page.stem for page in WITH_BLOCKS}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_and_named_files_are_there(page: Path) -> None:
    assert broken_links(page) + missing_files(page) == []


def test_example_configuration_is_valid() -> None:
    from mbf.run import load_config

    config = load_config(ROOT / "examples" / "run.yaml")
    assert [spec.label for spec in config.methods] == ["slao", "slao-last-merge", "seqlora"]


# -- what is listed is what there is -------------------------------------------------------------------------------


def rows_of_methods(page: str, heading: str) -> list[str]:
    """The first column of the first table below the heading."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"\n{heading}\n")[1]
    return re.findall(r"^\| `(\w+)` \|", re.split(r"\n#+ ", section)[0], re.MULTILINE)


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## Methods"), ("docs/methods.md", "## At a glance")])
def test_tables_of_methods_have_every_method_once(page: str, heading: str) -> None:
    assert sorted(rows_of_methods(page, heading)) == methods.available()


@pytest.mark.parametrize("name", [name for name in methods.available() if not methods.get(name).joint])
def test_what_methods_keep_is_as_listed(name: str) -> None:
    """The columns "kept" and "adapter", in sizes of one LoRA, after three tasks; words are for what has other sizes."""
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8").split("\n## At a glance\n")[1]
    (row,) = re.findall(rf"^\| `{name}` \|.*", page.split("\n## ")[0], re.MULTILINE)
    kept, adapter = (cell.strip() for cell in row.split("|")[3:5])
    model = peft_model()
    learner = ContinualLora(model, name)
    one = learner.memory_bytes()["adapter"]
    for seed in range(3):
        with learner.task(f"task {seed}", batches(seed)):
            train(model, seed, steps=1)
    sizes = {"0": 0, "P": one, "3P": 3 * one, "T·P": 3 * one}
    found = learner.memory_bytes()
    numbers = sum(t.nbytes for name, t in learner.method.state_dict().items() if not t.dtype.is_floating_point)
    numbers += 8 * sum(isinstance(value, float) for value in learner.method.state.values())
    if kept in sizes:
        assert found["state"] == sizes[kept] + numbers
    else:
        assert found["state"] > numbers
    if adapter in sizes:
        assert found["adapter"] == sizes[adapter]
    elif times := re.match(r"(?:up to )?(\d*)T·P(?:/(\d))?", adapter):
        assert 0 < found["adapter"] <= 3 * one * int(times[1] or 1) / int(times[2] or 1) + 8 * numbers
    else:
        assert adapter == "rank k"


def test_the_reference_has_all_that_is_public() -> None:
    import mbf
    import mbf.ops

    documented = {
        name.rsplit(".", 1)[-1]
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (mbf[\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    public = {name for name in mbf.__all__ if not isinstance(getattr(mbf, name), ModuleType)}
    operators = {name for name in mbf.ops.__all__ if not name.rstrip("_").endswith("_ref")}
    registry = {"available", "get", "register", "Method"}
    assert (public | operators | registry) - documented == set()


def options_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return {name for option in group.commands[command].params for name in option.opts if name.startswith("--")}


@pytest.mark.parametrize(
    "command", ["run", "resume", "compare", "report", "merge", "bench", "doctor", "methods", "fetch"]
)
def test_options_of_the_commands_are_those_listed(command: str) -> None:
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    if command in ("run", "compare"):
        rows = text.split(f"| option of `mbf {command}` |")[1].split("\n\n")[0].splitlines()
    else:
        rows = [row for row in text.splitlines() if row.startswith("| `mbf") and f"`mbf {command}" in row]
    listed = {option for row in rows for option in re.findall(r"`(--[\w-]+)", row)}
    assert listed == options_of(command) - {"--help"}


def test_the_defaults_of_a_run_are_as_shown() -> None:
    shown = next(block for block in blocks(ROOT / "docs" / "runs.md") if block.language == "yaml")
    plain = RunConfig.from_stream("quickstart").plain()
    assert parse_config(yaml.safe_load(shown.text)).plain() == plain
    of_sections = [f"{key}:" for value in plain.values() if isinstance(value, dict) for key in value]
    assert [key for key in [*(f"{key}:" for key in plain), *of_sections] if key not in shown.text] == []


# -- planted faults: a wrong document is found ---------------------------------------------------------------------


def planted(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "planted.md"
    page.write_text(text, encoding="utf-8")
    return page


WRONG = {
    "an error": ("python", "import mbf\nmbf.fuze(None)", r"planted\.md:2: AttributeError"),
    "a name from nowhere": ("python", "print(model)", "NameError"),
    "not Python": ("python", "with:", None),
    "no excerpt": ('cpp title="csrc/ops.cpp"', '  m.impl("merge", TORCH_BOX(&mbf::cpu::merge));', "has no line"),
    "no excerpt of Python": ('python title="mbf/methods/seqlora.py"', "class SeqLora(Methods):", "has no line"),
    "other output": ('python\nprint(1)\nprint(2)\n```\n```text title="prints"', "2\n1", "'1' is not printed"),
    "a test that fails": ('python title="tests/none.py"', "def test_one():\n    assert 1 == 2", "AssertionError"),
    "an excerpt of nothing": ("cpp", "int x;", "wanted the file"),
    "a diff that fails": ("diff", "  x = 1\n+ y = z", "NameError"),
    "a diff of what was wrong before": ("diff", "+ x = 1\n  y = (", "not Python"),
    "a diff of a script with mbf": ("diff", "  import mbf\n  mbf.ops\n+ x = 1", "uses mbf already"),
    "a diff of nothing": ("diff", "  x = 1", "changes nothing"),
    "an option": ("bash", "mbf run quickstart --epoch 3", "No such option: --epoch"),
    "a value": ("bash", "mbf run quickstart --epochs 0", "greater than or equal to 1"),
    "a command of mbf": ("bash", "mbf train quickstart", "No such command"),
    "a command that fails": ("bash", "mbf merge nowhere --out merged", "nowhere is not a PEFT adapter"),
    "an unknown program": ("bash", "pipx install mbf", "no check"),
    "no shell": ("bash", "for x in; do", "syntax error"),
    "a target": ("bash", "make everything", "no such target"),
    "a variable": ("bash", "make run RUNS=real-5", "no variable RUNS"),
    "an extra": ("bash", 'pip install "mbf[cuda]"', "no extra cuda"),
    "a module": ("bash", "python -m mbf.kernel.compile", "no such module|No module"),
    "an option of a script": ("bash", "python -m mbf.kernels.compile --targets sm_80", "no option --targets"),
    "a script": ("bash", "python bench/none.py", "there is no bench/none.py"),
    "a test": ("bash", "python -m pytest tests/none.py", "there is no tests/none.py"),
    "a key": ("yaml", "train: {epoch: 3}", "train.epoch"),
    "a key of a stream": ("yaml", "tasks: [{name: a, folder: b}]", "folder"),
    "no YAML": ("yaml", "train: {epochs", "expected"),
    "a key of accelerate": ("yaml", "distributed_type: FSDP\nprocesses: 2", "no processes"),
    "no language": ("", "x = 1", "no language"),
    "a language": ("sh", "ls", "a block of sh"),
}


@pytest.mark.parametrize(("info", "text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_block_is_found(
    tmp_path: Path, page_runs: Callable[[Path], None], info: str, text: str, message: str | None
) -> None:
    with pytest.raises((DocumentError, SyntaxError, ModuleNotFoundError), match=message):
        page_runs(planted(tmp_path, f"```{info}\n{text}\n```\n"))


RIGHT = {
    "namespace": """
```python
x = 1
```

- in a list

  ```python
  assert x == 1
  if x:
      x = 2
  ```
""",
    "diff": """
```diff
  for i in range(2):
+     if True:
          print(i)
      print(i)
- x = 1
+ x = 2
```
""",
    "excerpt": """
```cpp title="csrc/ops.cpp"
STABLE_TORCH_LIBRARY_IMPL(mbf, CPU, m) {
  // ...
}
```
""",
    "four ticks": """
````text
```python
raise ValueError
```
````
""",
    "commands": """
```bash
MBF_AUTOTUNE=1 mbf methods --json > a.json  # kept
mbf run real-5 \\
  --seed 0,1 && make run
```
""",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_a_right_page_passes(tmp_path: Path, page_runs: Callable[[Path], None], text: str) -> None:
    page_runs(planted(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[there](none.md)", "there is no none.md"),
        ("![a picture](images/none.png)", "there is no images/none.png"),
        ("[there](#nowhere)\n\n# Here", "no heading"),
        ("see `mbf/ops/none.py`", "names mbf/ops/none.py"),
        ("see `tests/test_house.py::test_none`", "has no such test"),
    ],
)
def test_what_leads_nowhere_is_found(tmp_path: Path, text: str, message: str) -> None:
    page = planted(tmp_path, text)
    (problem,) = broken_links(page) + missing_files(page)
    assert message in problem


def test_what_leads_somewhere_is_not_reported(tmp_path: Path) -> None:
    page = planted(
        tmp_path, "# A `b`, c!\n\n[up](#a-b-c) [web](https://x.org/y) `[no](link.md)`\n\n```text\n[n](o.md)\n```\n"
    )
    assert broken_links(page) == []


def test_an_open_fence_is_found(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="never closed"):
        blocks(planted(tmp_path, "# A\n\n```python\nx = 1\n"))


def test_commands_are_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").touch()
    script = "A=1 mbf merge *.txt --out 'x y' # why\nls | cat > out.txt; cd a && \\\n  make run\n"
    assert commands(script) == [
        ["A=1", "mbf", "merge", "a.txt", "b.txt", "--out", "x y"],
        ["ls"],
        ["cat"],
        ["cd", "a"],
        ["make", "run"],
    ]


def test_what_is_fast_is_executed_and_the_rest_is_not() -> None:
    assert runs_here(["run", "data", "--set", "model=tiny-random-llama"]) and runs_here(["methods", "--json"])
    assert runs_here(["compare", "data", "--set", "model=tiny-random-llama"]) and not runs_here(["compare", "real-5"])
    assert not runs_here(["run", "quickstart"]) and not runs_here(["fetch", "real-14"]) and not runs_here(["bench"])


def test_blocks_know_their_lines(tmp_path: Path) -> None:
    page = planted(tmp_path, '# A\n\n```python title="a.py"\nx = 1\n```\n')
    assert blocks(page) == [Block(page, 4, "python", "a.py", "x = 1\n")]
    assert set(CHECKS) == {"python", "diff", "yaml", "bash", "cpp", "text"}
