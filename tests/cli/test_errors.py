"""What goes wrong is said in a line, with the way out and an exit code, and never as a traceback."""

from __future__ import annotations

import builtins

import pytest
from typer.testing import CliRunner

import mbf.run
from mbf.cli import main
from mbf.cli.app import app
from mbf.cli.errors import FAILURE, INTERRUPTED, USER, messages
from mbf.continual import TaskError

CONFIGS = {
    "unknown key": ("stream: quickstart\ntrain: {epoch: 3}\n", "train.epoch", "did you mean 'epochs'"),
    "wrong type": ("stream: quickstart\ntrain: {epochs: many}\n", "train.epochs", "many"),
    "unknown method": ("stream: quickstart\nmethods: [slaoo]\n", "slaoo", "did you mean 'slao'"),
    "unknown option": ("stream: quickstart\nmethods: [{name: slao, shedule: 1}]\n", "shedule", "schedule"),
    "no YAML": ("stream: [quickstart\n", "YAML", "line"),
    "no mapping": ("- quickstart\n", "list", "stream: quickstart"),
}


def one_line(result, *parts: str) -> None:
    assert result.exit_code == USER
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert [part for part in parts if part not in result.stderr] == []


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_is_one_line(mbf, tmp_path, case: str) -> None:
    text, *parts = CONFIGS[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    one_line(mbf("run", path), str(path), *parts)


def test_each_problem_has_its_line(mbf, tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("stream: quickstart\nsed: [1]\nlora: {r: 0}\n")
    lines = mbf("run", path).stderr.splitlines()
    assert len(lines) == 2
    assert any("sed" in line for line in lines) and any("lora.r" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["run", "quickstar", "--set", "model=tiny-random-llama"], ["quickstar", "'quickstart'"]),
        (["run", "quickstart", "--method", "slao,nix"], ["nix"]),
        (["run", "quickstart", "--set", "train.lr=fast"], ["train.lr", "fast"]),
        (["resume", "nowhere"], ["nowhere", "mbf run"]),
        (["report", "nowhere"], ["nowhere"]),
        (["merge", "nowhere", "--out", "merged"], ["nowhere", "adapter_config.json"]),
        (["merge", "nowhere", "--out", "merged", "--option", "shedule=1/i"], ["shedule", "unknown option"]),
        (
            ["merge", "nowhere", "--out", "merged", "--option", "schedule=abc"],
            ["schedule: found 'abc', wanted '1/sqrt(i)', '1/i' or '1/log(i+1)' or a valid number"],
        ),
        (["merge", "one", "two", "--out", "./two"], ["out 'two' is one of the adapters", "give another folder"]),
        (["fetch", "quickstrat"], ["quickstrat", "did you mean 'quickstart'"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("run", "resume", "report", "merge", "fetch") else "",
)
def test_a_wrong_value_is_one_line(mbf, tmp_path, monkeypatch, arguments: list[str], parts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(mbf(*arguments), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "quickstart", "--order", "1,two"], "--order"),
        (["run", "quickstart", "--order", "1,,2"], "--order"),
        (["run", "quickstart", "--set", "epochs"], "--set"),
        (["run", "quickstart", "--set", "stream=[a"], "--set"),
        (["run", "quickstart", "--epochs", "0"], "--epochs"),
        (["run"], "CONFIG|STREAM"),
        (["merge", "a"], "--out"),
    ],
)
def test_wrong_usage_names_the_option(mbf, arguments: list[str], part: str) -> None:
    result = mbf(*arguments)
    assert result.exit_code == USER
    assert part in result.stderr


def failing(error: BaseException):
    """A run that began in its directory and then met ``error``."""

    def run(config, progress, sharded):
        config.output.mkdir()
        (config.output / "run.json").touch()
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TaskError("task 'agnews': layer 3 is not finite"), FAILURE, "mbf: task 'agnews': layer 3 is not finite"),
        (KeyboardInterrupt(), INTERRUPTED, "mbf: interrupted"),
        (KeyError("x"), FAILURE, "mbf: unexpected KeyError: 'x'; mbf --debug shows where"),
    ],
)
def test_a_broken_run_says_how_to_go_on(mbf, tmp_path, monkeypatch, error, code: int, line: str) -> None:
    monkeypatch.setattr("mbf.run.run", failing(error))
    result = mbf("run", "quickstart", "--output", tmp_path / "run")
    assert result.exit_code == code
    assert result.stderr.splitlines() == [line, f"mbf: go on with: mbf resume {tmp_path / 'run'}"]


def test_debug_shows_the_error_itself(mbf, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mbf.run.run", failing(error := TaskError("not finite")))
    assert mbf("--debug", "run", "quickstart", "--output", tmp_path / "run").exception is error
    monkeypatch.setenv("MBF_DEBUG", "1")
    assert mbf("run", "quickstart", "--output", tmp_path / "other").exception is error


def test_brackets_in_a_message_stay(monkeypatch) -> None:
    monkeypatch.setattr("mbf.run.load_config", lambda *_: (_ for _ in ()).throw(ValueError("a [r, d] [/bold]")))
    assert CliRunner().invoke(app, ["run", "x"]).stderr == "mbf: a [r, d] [/bold]\n"


def test_messages() -> None:
    assert messages(ModuleNotFoundError("No module named 'datasets'", name="datasets")) == [
        'the package datasets is missing: pip install "mbf[run]"'
    ]
    assert messages(FileNotFoundError(2, "No such file", "x.yaml")) == ["x.yaml: No such file"]
    assert messages(RuntimeError()) == ["RuntimeError"]
    assert messages(ValueError("one\ntwo")) == ["one", "two"]


def test_the_package_keeps_its_public_names() -> None:
    """The commands call these; a rename shows here and not at a user's."""
    assert [name for name in ("load_config", "run", "resume", "Progress") if not hasattr(mbf.run, name)] == []


def test_an_interruption_while_the_commands_are_imported_is_a_line_too(monkeypatch, capsys) -> None:
    real = builtins.__import__

    def interrupted(name, *arguments, **keywords):
        if name == "mbf.cli.app":
            raise KeyboardInterrupt
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == INTERRUPTED and capsys.readouterr().err == "mbf: interrupted\n"
