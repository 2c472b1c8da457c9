"""Who computes a tensor on a GPU: ``mbf.ops._gpu``. Results are for tests/kernels."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mbf.ops import _gpu, lora_linear


class OnGpu:
    """As much of a tensor on a GPU as the entrance looks at."""

    is_cuda = True


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the kernel straight from the entrance of lora_linear."""
    found: list[Any] = []
    monkeypatch.setattr(_gpu, "_PLAIN", (OnGpu,))
    monkeypatch.setitem(_gpu._kernels, "lora_linear", lambda *inputs: found.append(inputs))
    return found


@pytest.mark.parametrize("probed", [OnGpu(), [OnGpu()]], ids=["tensor", "list"])
def test_eager_tensors_on_a_gpu_pass_the_dispatcher_by(entered: list[Any], probed: Any) -> None:
    _gpu.entrance("lora_linear")(probed, 1)
    assert entered == [(probed, 1)]


def test_modes_see_the_operator(entered: list[Any]) -> None:
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    enter = _gpu.entrance("lora_linear")
    with Mode(), pytest.raises((RuntimeError, TypeError)):
        enter(OnGpu(), 1)  # not a tensor for the dispatcher
    assert entered == []
    with Mode(), torch.no_grad():
        lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1))
    assert any("lora_linear" in name for name in seen)


def test_what_a_kernel_declines_the_reference_computes() -> None:
    library = torch.library.Library("mbf_test_gpu", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    declined: list[int] = []

    def kernel(x: torch.Tensor) -> Any:
        declined.append(x.numel())
        return NotImplemented

    namespace = torch.library.Library("mbf_test_gpu", "IMPL")
    run = _gpu._or_reference(kernel, lambda x: x * 2)
    namespace.impl("twice", run, "CPU")
    assert torch.ops.mbf_test_gpu.twice(torch.ones(3)).tolist() == [2.0] * 3
    assert declined == [3]


def test_without_triton_the_reference_computes_and_says_so() -> None:
    code = """
import sys, warnings
sys.modules["triton"] = None
import torch
from mbf.ops import _gpu
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    run = _gpu._or_reference(lambda x: 1 / 0, lambda x: x * 2)
    print(run(torch.ones(1)).item(), run(torch.ones(1)).item())
print(*(w.message for w in said), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    first, *said = done.stdout.splitlines()
    assert first == "2.0 2.0", done.stderr
    assert len(said) == 1 and "triton cannot be imported" in said[0]


def test_the_kernels_a_call_launches() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has wheels for Linux only")
    from mbf.kernels._launch import launch

    assert _gpu.launches(lambda: launch(test_modes_see_the_operator, (1,))) == ["test_modes_see_the_operator"]
