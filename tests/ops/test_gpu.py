"""Who computes a tensor on a GPU: ``mbf.ops._gpu``. Results are for tests/kernels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
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


def operands_of(dtype: torch.dtype, base: torch.dtype, rank: int = 2) -> list[Any]:
    x, weight, A, B = (torch.ones(shape, dtype=base) for shape in ((3, 8), (4, 8), (rank, 8), (4, rank)))
    return [x, weight, None, A.to(dtype), B.to(dtype), 1.0, None, None, 0.0, None, None, None]


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Triton is absent, and mbf._cuda has what the test puts here."""
    library = SimpleNamespace()
    monkeypatch.setattr(_gpu, "obstacle", lambda: "triton cannot be imported")
    monkeypatch.setattr(_gpu._cuda, "library", lambda: library)
    return library


@pytest.mark.parametrize(
    ("dtype", "base", "rank", "taken"),
    [
        (torch.float32, torch.float32, 2, True),
        (torch.float32, torch.bfloat16, 256, True),
        (torch.float16, torch.float16, 2, True),
        (torch.float32, torch.float32, 257, False),
        (torch.bfloat16, torch.float32, 2, False),
        (torch.float64, torch.float64, 2, False),
        (torch.float32, torch.float64, 2, False),
    ],
)
@pytest.mark.parametrize("needs", [[], [[True] * 9]], ids=["forward", "backward"])
def test_without_triton_cuda_computes_what_it_can(
    cuda_library: SimpleNamespace, dtype: torch.dtype, base: torch.dtype, rank: int, taken: bool, needs: list[Any]
) -> None:
    cuda_library.lora_linear = lambda *inputs: ("by CUDA C++", inputs)
    run = _gpu._or_reference(lambda *_: 1 / 0, lambda *_: "reference", _gpu.by_cuda("lora_linear"))
    inputs = (*operands_of(dtype, base, rank), *needs)
    assert run(*inputs) == (("by CUDA C++", inputs) if taken else "reference")


def test_an_operator_that_cuda_lacks_is_left_to_the_reference(
    cuda_library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _gpu._or_reference(lambda *_: 1 / 0, lambda *_: "reference", _gpu.by_cuda("lora_linear"))
    assert run(*operands_of(torch.float32, torch.float32)) == "reference"
    composed = _gpu._or_reference(lambda *_: 1 / 0, lambda *_: "reference", _gpu.with_cuda(lambda *_: "composed"))
    assert composed(torch.ones(1)) == "composed"
    monkeypatch.setattr(_gpu._cuda, "library", lambda: None)
    assert composed(torch.ones(1)) == "reference"
    assert run(*operands_of(torch.float32, torch.float32)) == "reference"


def test_with_triton_cuda_is_not_asked(cuda_library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "obstacle", lambda: None)
    run = _gpu._or_reference(lambda *_: "Triton", lambda *_: "reference", lambda *_: 1 / 0)
    assert run(torch.ones(1)) == "Triton"


def test_the_kernels_a_call_launches() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has wheels for Linux only")
    from mbf.kernels._launch import launch

    assert _gpu.launches(lambda: launch(test_modes_see_the_operator, (1,))) == ["test_modes_see_the_operator"]
