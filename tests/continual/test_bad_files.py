"""Files that are damaged, or of something else: one error in words, and neither the disk nor the model changes.

Where a part is spoilt, its sha256 is made anew, so that what is tested lies behind the check of the hashes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import mbf
from mbf.continual import ContinualLora, merge_adapters
from mbf.continual.atomic import sha256_of
from mbf.continual.header import ADAPTER, CONFIG, HEADER, PARTS, STATE, CheckpointError
from tests.continual.tiny import base_model, batches, peft_model, train

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner of slao after two tasks."""
    root = tmp_path_factory.mktemp("good") / "learner"
    model = peft_model()
    learner = ContinualLora(model)
    for i in (1, 2):
        with learner.task(f"t{i}", batches(i)):
            train(model, i, steps=1)
    learner.save(root)
    return root


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "learner"))


def bits(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers with their bytes, whether they train, the classes of modules, the active adapters."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    found: dict[str, Any] = {
        name: (t.detach().clone().view(torch.uint8).numpy().tobytes(), t.dtype, t.requires_grad)
        for name, t in tensors.items()
        if t.numel()
    }
    found |= {f"{name}": (type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    found["adapters"] = getattr(model, "peft_config", None), getattr(model, "active_adapters", None)
    return found


def files(root: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")}


def change(root: Path, name: str, edit: Callable[[Any], Any], seal: bool = True) -> None:
    """Edit the JSON or the tensors of a part, and give it its sha256."""
    path = root / name
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        new = edit(data)
        path.write_text(json.dumps(data if new is None else new))
    else:
        tensors = load_file(path)
        new = edit(tensors)
        save_file(tensors if new is None else new, path)
    if seal and name != HEADER:
        change(root, HEADER, lambda header: header["sha256"].update({n: sha256_of(root / n) for n in PARTS}))


def refused(root: Path, message: str, model: Callable[[], nn.Module] = peft_model) -> None:
    for make in (model, base_model):
        victim = make()
        before, on_disk = bits(victim), files(root)
        with pytest.raises(CheckpointError, match=message) as error:
            ContinualLora.load(victim, root)
        assert str(root) in str(error.value)
        assert bits(victim) == before, f"{make.__name__} has changed"
        assert files(root) == on_disk


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    """Set what ``path`` leads to; without a value left, remove it."""

    def edit(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda header: [header], "is not a learner's header: format must be 'mbf-learner'"),
        (put("format", value="mbf-run"), "is not a learner's header"),
        (put("version", value=...), "has version None, this mbf reads 1; update mbf"),
        (put("version", value=2), "has version 2, this mbf reads 1; update mbf"),
        (put("method", value="nothing"), "method 'nothing' is not registered here"),
        (put("method", value=["slao"]), r"is damaged \(method: .*valid string.*\); restore it from a copy"),
        (put("method", value="olora"), "options of olora: .*; load it with the mbf that wrote it"),
        (put("options", "haste", value=1), "options of slao: haste: Extra inputs are not permitted"),
        (put("options", "basis", value=3), "options of slao: basis: "),
        (put("\ud800", value=1), r"is damaged \(.*; restore it from a copy"),
        (put("options", "\ud800", value=1), "options of slao: .*; load it with the mbf that wrote it"),
        (put("options", "self", value=1), "options of slao: self: Extra inputs are not permitted"),
        (put("options", value=[]), r"is damaged \(options: "),
        (put("sha256", value=...), r"is damaged \(sha256: Field required\)"),
        (
            put("sha256", "../../etc/passwd", value="0" * 64),
            "sha256 is of ../../etc/passwd, .*, wanted that of adapter_c",
        ),
        (
            put("sha256", STATE, value=...),
            "sha256 is of .*, wanted that of .*learner.safetensors; restore it from a copy",
        ),
        (put("sha256", STATE, value="0" * 64), r"learner.safetensors is damaged: sha256 is .*…, the header says 0000"),
        (put("adapter", value="../up"), r"is damaged \(adapter: "),
        (put("adapter", value=""), r"is damaged \(adapter: "),
        (put("history", 0, value={"index": 1}), r"is damaged \(history.0.name: Field required\)"),
        (put("history", 1, "mood", value="good"), r"is damaged \(history.1.mood: Extra inputs"),
        (put("history", 0, "seconds", value=float("nan")), r"is damaged \(history.0.seconds: .*finite"),
        (put("history", 1, "index", value=1), "the tasks of the history are not numbered from 1"),
        (put("layers", value={}), r"is damaged \(layers: "),
        (put("layers", "x", value=[1, 2]), r"layer x is \[1, 2\], wanted \[r, d_in, d_out, scale\]"),
        (put("layers", "x", value=[4, 32, 32, 2.0]), "base_model.model.x has .* missing in adapter_model.safetensors"),
        (
            put("callable_options", value=["schedule"]),
            "option 'schedule' was a callable, which is not stored; pass load",
        ),
        (
            put("state", "ft.A.0", value=["float32", 3, 48]),
            r"ft.A.0 is \['float32', 4, 48\], the header says \['float32', 3,",
        ),
    ],
)
def test_headers(root: Path, edit: Callable[[Any], Any], message: str) -> None:
    change(root, HEADER, edit)
    refused(root, message)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"1" * 10_000, b"\x00" * 64])
def test_headers_that_are_no_json(root: Path, text: bytes) -> None:
    (root / HEADER).write_bytes(text)
    refused(root, r"learner.json is damaged \(.*\); restore it from a copy")


def test_a_directory_in_place_of_a_part(root: Path) -> None:
    (root / STATE).unlink()
    (root / STATE).mkdir()
    refused(root, "learner.safetensors is missing; restore it from a copy")


def in_place(edit: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edited(tensors: Any) -> None:
        edit(tensors)

    return edited


def renamed(old: str, new: str) -> Callable[[Any], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed("ft.A.0", "fx.A.0"), "ft.A.0 is missing, the header says"),
        (
            put("ft.B.1", value=torch.ones(2, 2)),
            r"ft.B.1 is \['float32', 2, 2\], the header says \['float32', 32, 4\]; restore it from a copy$",
        ),
        (
            lambda t: t.update({"ft.A.0": t["ft.A.0"].half()}),
            r"ft.A.0 is \['float16', 4, 48\], the header says \['float32'",
        ),
        (
            lambda t: t["ft.B.2"].fill_(float("nan")),
            "state of method 'slao' is damaged: ft.B.2 has inf or NaN; restore it",
        ),
    ],
)
def test_states(root: Path, edit: Callable[[Any], None], message: str) -> None:
    change(root, STATE, in_place(edit))
    refused(root, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("ft.A.0", value=...), "ft has a gap: 5 entries, up to number 5"),
        (put("ft.B.5", value=...), "ft has 6 A and 5 B"),
        (put("ft.C.0", value=torch.ones(1)), r"'ft.C.0' \[1\] is nothing that a method keeps"),
        (put("ft.A.01", value=torch.ones(1)), r"'ft.A.01' \[1\] is nothing that a method keeps"),
        (put("ft.A.²", value=torch.ones(1)), "is nothing that a method keeps"),
        (put("ft", value=torch.ones(1)), "ft is of two kinds"),
        (put("ft.0", value=torch.ones(1)), "ft is of two kinds"),
        (put("n.number", value=torch.ones(2)), r"'n.number' \[2\] is nothing that a method keeps"),
        (put("learned/x.0", value=torch.ones(2)), r"learns no parameters in this task, the checkpoint holds \['x.0'\]"),
    ],
)
def test_states_of_older_checkpoints_which_do_not_describe_them(root: Path, edit: Any, message: str) -> None:
    change(root, HEADER, put("state", value=...))
    change(root, STATE, edit)
    victim = peft_model()
    before = bits(victim)
    with pytest.raises(CheckpointError, match=message):
        ContinualLora.load(victim, root)
    assert bits(victim) == before


def test_a_state_that_is_another_methods(tmp_path: Path) -> None:
    """Well formed, finite, hashed, described, and of no use: found when the method takes it up, and all undone."""
    model = peft_model()
    learner = ContinualLora(model, "lilora")
    with learner.task("one"):
        train(model, 1, steps=1)
    learner.save(tmp_path / "learner")
    change(tmp_path / "learner", STATE, lambda tensors: {"other": torch.ones(2)})
    change(tmp_path / "learner", HEADER, put("state", value={"other": ["float32", 2]}))
    refused(tmp_path / "learner", r"learner.safetensors: method 'lilora' cannot go on from what it holds \(KeyError")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def huge(path: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def overlapping(path: Path) -> None:
    one = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}
    text = json.dumps({f"{Q}.lora_A.weight": one, f"{Q}.lora_B.weight": {**one, "shape": [32, 4]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(512))


def unknown_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"X32"', 1))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({f"{Q}.lora_A.weight": torch.ones(4, 32)}, path)


@pytest.mark.parametrize("part", [ADAPTER, STATE])
@pytest.mark.parametrize("spoil", [truncated, huge, overlapping, unknown_dtype, empty, pickled])
def test_safetensors_that_are_none(root: Path, part: str, spoil: Callable[[Path], None], tmp_path: Path) -> None:
    spoil(root / part)
    refused(root, f"{part} is damaged: sha256 is ")
    change(root, HEADER, lambda header: header["sha256"].update({part: sha256_of(root / part)}))
    refused(root, rf"{part} is damaged \(.+\); restore it from a copy")
    if part == ADAPTER:
        not_merged(root, r"adapter_model.safetensors is damaged \(.+\); restore it from a copy", tmp_path)


def not_merged(root: Path, message: str, tmp_path: Path) -> None:
    """``mbf merge`` refuses ``root`` and leaves what was there whole."""
    out = tmp_path / "merged"
    out.mkdir(exist_ok=True)
    (out / CONFIG).write_text("an adapter")
    before = files(root)
    with pytest.raises(ValueError, match=message) as error:
        merge_adapters([root], out)
    assert str(root) in str(error.value)
    assert files(root) == before and files(out) == {CONFIG: b"an adapter"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(f"{Q}.lora_B.weight", value=...), f"{Q} needs a finite lora_A .* found no lora_B; restore it from a copy"),
        (put(f"{Q}.lora_B.weight", value=torch.ones(32, 3)), r"found float32 \[4, 32\] and float32 \[32, 3\]"),
        (put(f"{Q}.lora_A.weight", value=torch.ones(4, 32, 1)), r"found float32 \[4, 32, 1\] and"),
        (put(f"{Q}.lora_A.weight", value=torch.ones(4, 32, dtype=torch.int8)), r"found int8 \[4, 32\] and float32"),
        (put(f"{Q}.lora_A.weight", value=torch.ones(4, 32).half()), r"found float16 \[4, 32\] and float32"),
        (
            put(f"{Q}.lora_A.weight", value=torch.full((4, 32), torch.inf)),
            r"found float32 \[4, 32\] with inf or NaN and",
        ),
        (put(f"{Q}.lora_A.weight", value=torch.ones(0, 32)), r"found float32 \[0, 32\] and float32"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}),
            f"{Q} has rank 2, adapter_config.json says 4; put the files of one adapter together",
        ),
        (put("lora_embedding_A", value=torch.ones(1)), "holds lora_embedding_A, which is not a linear layer's lora_A"),
        (lambda t: t.clear(), "holds nothing, which is not a linear layer's lora_A or lora_B"),
    ],
)
def test_adapters(root: Path, edit: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    change(root, ADAPTER, in_place(edit))
    refused(root, message)
    not_merged(root, message, tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: [], "found no peft_type, wanted the configuration of a PEFT adapter"),
        (put("peft_type", value="IA3"), "is a IA3 adapter; only LoRA adapters can be merged"),
        (put("peft_type", value=7), "is a 7 adapter; only LoRA"),
        (put("use_dora", value=True), "was trained with use_dora, which no merge rule covers"),
        (put("r", value="4"), "r is '4', wanted a whole number above 0; restore it from a copy"),
        (put("r", value=0), "r is 0, wanted a whole number above 0"),
        (put("r", value=True), "r is True, wanted"),
        (put("r", value=8), "has rank 4, adapter_config.json says 8"),
        (put("lora_alpha", value=float("nan")), "lora_alpha is nan, wanted a number"),
        (put("lora_alpha", value=[8]), r"lora_alpha is \[8\], wanted a number"),
        (put("lora_alpha", value=10**400), "lora_alpha is 1000.*, wanted a number"),
        (put("lora_dropout", value=2), "lora_dropout is 2, wanted a number from 0 to 1"),
        (put("use_rslora", value="no"), "use_rslora is 'no', wanted true or false"),
        (put("rank_pattern", value={"(": 4}), r"rank_pattern has '\(', wanted a regular expression; restore it"),
        (put("rank_pattern", value={"q_proj": "4"}), "rank_pattern is .*, wanted ranks by pattern of layers"),
        (put("rank_pattern", value={"(a+)+b": 4}), r"rank_pattern has '\(a\+\)\+b', which may take countless steps"),
        (put("target_modules", value="(a|a)*b"), r"target_modules has '\(a\|a\)\*b', which may take countless steps"),
        (put("alpha_pattern", value={"q_proj": "8"}), "alpha_pattern is .*, wanted numbers by pattern of layers"),
        (put("target_modules", value=[1]), r"target_modules is \[1\], wanted names of modules"),
        (put("bias", value="all"), "bias is 'all', wanted 'none'"),
        (put("task_type", value="DREAM"), "is no configuration that PEFT takes .*DREAM"),
        (put("eva_config", value="x"), "is no configuration that PEFT takes"),
    ],
)
def test_configurations(root: Path, edit: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    change(root, CONFIG, edit)
    refused(root, message)
    not_merged(root, message, tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_configurations_that_are_no_json(root: Path, text: bytes, tmp_path: Path) -> None:
    (root / CONFIG).write_bytes(text)
    not_merged(root, r"adapter_config.json is damaged \(.*\); restore it from a copy", tmp_path)


# -- whole files, but of another model ---------------------------------------------------------------------------------


def narrow() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"model": nn.Sequential(nn.Linear(4, 4))})


def wider() -> nn.Module:
    model = base_model()
    model.model.layers[0].self_attn.q_proj = nn.Linear(16, 32, bias=False)
    return model


def other_layers() -> PeftModel:
    return peft_model(target_modules=["q_proj"])


def other_scale() -> PeftModel:
    return peft_model(lora_alpha=16)


def other_dtype() -> nn.Module:
    return peft_model().to(torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (narrow, "adapts model.layers.0.*, which the model has not; load into the model it was trained on"),
        (wider, "q_proj is 32×32 there and 32×16 in the model; load into the model it was trained on"),
        (other_layers, "is only in the checkpoint: load into the model it was trained on"),
        (other_scale, "has scale 2.0 there and 4.0 in the model's adapter; give both the same lora_alpha / r"),
        (other_dtype, "is torch.float32 there and torch.bfloat16 in the model's adapter, which would round it"),
    ],
)
def test_other_models(root: Path, model: Callable[[], nn.Module], message: str) -> None:
    victim = model()
    before = bits(victim)
    with pytest.raises(CheckpointError, match=message):
        ContinualLora.load(victim, root)
    assert bits(victim) == before


def test_a_model_with_another_adapter_keeps_it_and_no_more(root: Path) -> None:
    """Where the learner's adapter is not in the model, it is put in, and taken out again."""
    change(root, CONFIG, put("lora_alpha", value=16))
    victim = peft_model(adapter="mine")
    before = bits(victim)
    with pytest.raises(CheckpointError, match=r"has scale 2\.0 there and 4\.0 in the model's"):
        ContinualLora.load(victim, root)
    assert bits(victim) == before


def test_options_of_the_caller_are_the_callers(root: Path) -> None:
    with pytest.raises(ValueError, match="basis") as error:
        ContinualLora.load(peft_model(), root, basis=7)
    assert not isinstance(error.value, CheckpointError)


# -- where something else is in the way --------------------------------------------------------------------------------


def test_what_is_no_adapter_is_not_replaced(good: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    learner = ContinualLora.load(peft_model(), good)
    for act in (learner.save, learner.export, lambda out: merge_adapters([good], out)):
        with pytest.raises(ValueError, match=r"a directory with thesis\.tex and without adapter_config\.json, which"):
            act(tmp_path / "thesis")
        with pytest.raises(ValueError, match="file: found a file, wanted a directory; move it away, or choose another"):
            act(tmp_path / "file")
    assert files(tmp_path) == {"thesis": None, "thesis/thesis.tex": b"mine", "file": b"mine"}


def test_the_good_one_is_good(root: Path) -> None:
    """What the other tests spoil loads as it is."""
    assert ContinualLora.load(peft_model(), root).task_index == 2
    assert mbf.ContinualLora.load(base_model(), root).task_index == 2
