"""What README and examples show works as shown."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "learner" / "adapter_model.safetensors").exists()


def test_example_configuration_is_valid() -> None:
    from mbf.run import load_config

    config = load_config(ROOT / "examples" / "run.yaml")
    assert [spec.label for spec in config.methods] == ["slao", "slao-last-merge", "seqlora"]


def test_readme_names_every_method() -> None:
    from mbf import methods

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in methods.available() if f"`{name}`" not in text] == []
