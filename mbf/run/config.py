"""The configuration of a run: what it says, how it is read from YAML, and what a user is told when it is wrong."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mbf import methods
from mbf.run.explain import explain
from mbf.streams.packaged import packaged
from mbf.streams.yaml_file import YamlError, parse_yaml_file

OnBadTask = Literal["stop", "skip"]
_FREE = ("on_bad_task",)  # a run may go on with another value: what it has learned is the same


class ConfigError(ValueError):
    """What is wrong with a configuration: one line a problem, each with the key, the value found and the way out."""


def _one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | Mapping) else value


MOST_SEED = 429_495
"""Of a run: 10,000 times it, and the number of a task, make a task's seed, of 32 bits."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodSpec(_Section):
    """A method to run: its name, or ``{name: slao, label: slao-rsvd, basis: rsvd}`` with the method's own options.

    Attributes:
        name: as in ``mbf methods``.
        label: what results and directories call it; default the name.
        options: everything else that was written, checked against the method's options.
    """

    name: str
    label: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
            raise ValueError(f"found {data!r}, wanted a method's name or {{name: ..., its options}}")
        options = {key: value for key, value in data.items() if key not in ("name", "label")}
        return {"name": data["name"], "label": data.get("label", data["name"]), "options": options}

    @field_validator("label")
    @classmethod
    def _names_a_directory(cls, label: str) -> str:
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise ValueError(f"found {label!r}, wanted letters, digits and _ . + - only: it names a directory")
        return label

    @model_validator(mode="after")
    def _known_to_the_method(self) -> MethodSpec:
        options = methods.get(self.name).Options
        try:
            options(**self.options)
        except ValidationError as error:
            raise ValueError(f"{self.name}: " + "; ".join(explain(error, options))) from None
        return self

    @model_serializer
    def _gather(self) -> dict[str, Any]:
        return {"name": self.name, "label": self.label, **self.options}


class LoraSection(_Section):
    """The adapter, as ``peft.LoraConfig`` takes it."""

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    use_rslora: bool = False

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
            return value
        raise ValueError(f"found {value!r}, wanted a list of module names, or 'all-linear'")


class TrainSection(_Section):
    """Training on one task. Lengths are in tokens, ``rows`` is the number of training rows a task."""

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulation: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    text_tokens: int = Field(default=48, ge=1)
    answer_tokens: int = Field(default=50, ge=1)
    rows: int | None = Field(default=None, ge=1)
    save_steps: int = Field(default=10, ge=1)
    report_to: str | list[str] = "none"


class EvalSection(_Section):
    """Evaluation after every task: of every task of the stream, or of those seen so far (no FWT then).

    ``rows`` is the number of test rows a task; default all that the stream has.
    """

    rows: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    every: Literal["all", "seen"] = "all"


class RunConfig(_Section):
    """A continual run: methods x orders x seeds over one stream and one model.

    Attributes:
        stream: name of a packaged stream, path of a folder or YAML file, or a specification written in place.
        model: name of a packaged model, path, or hub id.
        dtype: of the frozen model; the adapter is float32.
        methods: what to compare.
        orders: numbers of the stream's task orders, from 1.
        seeds: of adapter, batches and dropout; the rows of the tasks are the same for all seeds.
        fuse: compute adapters with mbf's operators.
        on_bad_task: a task whose training diverges (inf or NaN in loss, gradients or adapter, or an adapter that
            exploded) stops the run, or is skipped: the merged LoRA stays as it is, and the next task is learned.
        output: the run's directory; default ``runs/<stream>-<time>``.
    """

    stream: str | dict[str, Any]
    model: str = "smollm2-135m-instruct"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    methods: Annotated[list[MethodSpec], BeforeValidator(_one_is_a_list)] = Field(
        default_factory=lambda: [MethodSpec.model_validate("slao")], min_length=1
    )
    orders: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_one_is_a_list)] = Field(
        default=[1], min_length=1
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=MOST_SEED)]], BeforeValidator(_one_is_a_list)] = Field(
        default=[0], min_length=1
    )
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    fuse: bool = True
    on_bad_task: OnBadTask = "stop"
    output: Path | None = None

    @field_validator("stream", mode="before")
    @classmethod
    def _stream(cls, value: Any) -> Any:
        if isinstance(value, dict) and value:
            return value
        if isinstance(value, str | Path) and str(value):
            # a run may be resumed from another working directory
            own = str(value) not in packaged() and os.path.exists(value)  # pathlib's raises where a name is too long
            return str(Path(value).resolve() if own else value)
        raise ValueError(f"found {value!r}, wanted a packaged stream's name, a path, or a specification")

    @model_validator(mode="after")
    def _distinct(self) -> RunConfig:
        labels = [spec.label for spec in self.methods]
        for key, values in (("methods", labels), ("orders", self.orders), ("seeds", self.seeds)):
            written = [str(value) for value in values]
            if twice := sorted({value for value in written if written.count(value) > 1}):
                way_out = "; give each a label of its own" if key == "methods" else "; name it once"
                raise ValueError(f"{key}: {', '.join(twice)} is there more than once{way_out}")
        return self

    @classmethod
    def from_stream(cls, stream: str | Path, **settings: Any) -> RunConfig:
        """The defaults for ``stream``, with top-level ``settings`` over them.

        Raises:
            ConfigError: a setting is unknown or wrong.
        """
        return parse_config({"stream": str(stream), **settings})

    @property
    def stream_name(self) -> str:
        """The stream as a word for directories."""
        if isinstance(self.stream, dict):
            return str(self.stream.get("name", "stream"))
        return Path(self.stream).stem

    def plain(self) -> dict[str, Any]:
        """All that decides the results (``output`` does not), as YAML and JSON hold it."""
        return self.model_dump(mode="json", exclude={"output"})

    def sha256(self) -> str:
        """Fingerprint of ``plain()``."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()


def load_config(source: str | Path, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration file, or take the defaults for a stream.

    Args:
        source: a YAML file with the keys of ``RunConfig``; or a stream: a packaged name, a folder, or a YAML file that
            specifies one (it has ``tasks``). A relative path of a stream inside a configuration is looked up beside the
            file first; those of the tasks of a stream written in place are relative to the file.
        settings: values over those of the file by dotted key: ``{"train.lr": 1e-4}``.

    Raises:
        ConfigError: a missing file, no YAML, an unknown key or a wrong value; one line a problem.
    """
    return parse_config(read_source(source, settings), str(source) if Path(source).suffix else "")


def read_source(source: str | Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys that ``load_config`` finds, only those, and before their values are checked.

    Raises:
        ConfigError: a missing file, no YAML, or a setting below a key that is no section.
    """
    path = Path(source)
    data: dict[str, Any] = {"stream": str(source)}
    if path.suffix in (".yaml", ".yml"):
        read = read_yaml(path)
        if "stream" in read or "tasks" not in read:
            data = read
            stream = data.get("stream")
            if isinstance(stream, str) and os.path.exists(beside := path.parent / stream):
                data["stream"] = str(beside.resolve())
            tasks = stream.get("tasks") if isinstance(stream, dict) else None
            for task in tasks if isinstance(tasks, list) else ():
                if isinstance(task, dict) and isinstance(task.get("path"), str):
                    task["path"] = os.path.abspath(path.parent / task["path"])
    return set_keys(data, settings or {})


def set_keys(data: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with every dotted key of ``settings`` set in it."""
    for key, value in settings.items():
        _set(data, key, value)
    return data


def parse_config(data: Mapping[str, Any], source: str = "") -> RunConfig:
    """``RunConfig`` of plain ``data``; problems are reported as ``ConfigError``, each line headed by ``source``."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        head = f"{source}: " if source else ""
        raise ConfigError("\n".join(head + line for line in explain(error, RunConfig))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, no YAML, or something else than a mapping.
    """
    try:
        data = parse_yaml_file(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(
            f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "; check the path")
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; name a file that can") from None
    except YamlError as error:
        raise ConfigError(f"{path}: is no YAML: {error}; mend the file") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {type(data).__name__}, wanted keys and values such as 'stream: quickstart'")
    return data


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every dotted key whose value differs between two ``RunConfig.plain()``.

    ``on_bad_task`` may differ.
    """
    lines = []
    for key in sorted((old.keys() | new.keys()) - ({*_FREE} if not prefix else set())):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {section!r} holds {inner!r}, wanted a section with keys")
        data = inner
    data[key] = value
