"""What the functions of ``mbf``, ``mbf.peft`` and ``mbf.methods`` may not be given: an error that names the argument.

Every public function has its bad calls here; a new one without them fails the first test. Those of ``mbf.ops`` are in
tests/ops/test_bad_calls.py; models and adapters that are what they should be, but in a bad state, are in the tests
beside this one.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mbf
from mbf import methods, peft
from tests.peft.helpers import llama

NO_MODULE = (None, "model", [nn.Linear(2, 2)], nn.Linear)
NO_NAME = (None, 3, ["default"])
# Of each function the arguments, the error and its words; a function of no class of mbf's own.
OF_MODELS: dict[Any, dict[str, Any]] = {
    peft.fuse: {},
    peft.unfuse: {},
    peft.fused: {},
    peft.is_fused: {},
    peft.orthogonalize_: {"adapter": "default"},
    peft.init_pissa_: {"adapter": "default"},
    peft.adapter_layers: {"adapter": "default"},
    peft.sync_config: {"adapter": "default"},
    peft.whole_adapter: {"adapter": "default"},
    peft.save_adapter: {"adapter": "default", "directory": "adapter"},
}
ALONE = {peft.describe_ranks, methods.available, methods.get, methods.register}


def public(module: Any) -> set[Any]:
    return {getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}


def test_every_public_function_has_its_bad_calls() -> None:
    assert public(peft) | public(methods) | public(mbf) == set(OF_MODELS) | ALONE


def entered(function: Any, **arguments: Any) -> None:
    """Calls it; a context manager is entered."""
    found = function(**arguments)
    if function is peft.fused:
        with found:
            pass


@pytest.mark.parametrize("function", OF_MODELS, ids=lambda function: function.__name__)
def test_no_module(function: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in NO_MODULE:
        with pytest.raises(TypeError, match=r"^model: got .*; pass a PeftModel or another torch.nn.Module"):
            entered(function, model=model, **OF_MODELS[function])


@pytest.mark.parametrize(
    "function",
    [peft.orthogonalize_, peft.init_pissa_, peft.adapter_layers, peft.sync_config],
    ids=lambda function: function.__name__,
)
def test_no_name_of_an_adapter(function: Any) -> None:
    model = llama(target_modules=["q_proj"])
    for adapter in NO_NAME:
        with pytest.raises(TypeError, match=r"^adapter: got .*; pass the adapter's name"):
            function(model=model, adapter=adapter)


def test_options() -> None:
    model = llama(target_modules=["q_proj"])
    for memory in (None, "none", ["low"]):
        for function in (peft.fuse, peft.fused):
            with pytest.raises(ValueError, match=r"memory is .*; it must be one of 'default', 'low'"):
                entered(function, model=model, memory=memory)
    for B in (None, "keep", ["carry"]):
        with pytest.raises(ValueError, match=r"B is .*; it must be 'preserve'"):
            peft.orthogonalize_(model, B=B)  # type: ignore[arg-type]
    assert not peft.is_fused(model)


def test_options_of_a_decomposition() -> None:
    model = llama(target_modules=["q_proj"], init_lora_weights=True)
    for name in ("n_iter", "oversample"):
        for value, error in ((-1, ValueError), (2**62, ValueError), (1.5, TypeError), (None, TypeError)):
            with pytest.raises(error, match=rf"^{name}"):
                peft.init_pissa_(model, force=True, **{name: value})
    with pytest.raises(TypeError, match=r"^generator: got int"):
        peft.init_pissa_(model, force=True, generator=3)  # type: ignore[arg-type]


def test_methods() -> None:
    for name in (None, 3, ["slao"]):
        with pytest.raises(TypeError, match=r"^name: got .*; pass the name of a method, one of "):
            methods.get(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method 'slaoo' is unknown; did you mean 'slao'"):
        methods.get("slaoo")
    for method in (None, "slao", int, methods.Method):
        with pytest.raises(TypeError, match=r"^method: got .*; pass a subclass of mbf.methods.Method with a name"):
            methods.register(method)  # type: ignore[arg-type]


def test_ranks_of_no_layer() -> None:
    with pytest.raises(ValueError, match=r"^pairs: is empty"):
        peft.describe_ranks({})
