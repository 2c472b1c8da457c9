"""What tests run in a process of its own, where kernels are compiled: ``python -m tests.kernels.scripts NAME``.

Prints JSON. The GPU, which only has to be named, is an H100.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import triton
from mbf.kernels import lilora, lora_linear, mora
from mbf.kernels._configs import Config
from mbf.kernels._launch import recorded
from mbf.kernels._specimens import NestedTerms, SquareTerms, Terms
from mbf.kernels._tune import forced
from mbf.kernels.compile import rows
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

import mbf.ops  # noqa: F401  (defines the operators)


class NamedGpu:
    """As much of Triton's driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def graphs() -> Any:
    """The targets of the calls in the graphs that operators and their backward become, on a GPU, and their guards.

    The number of tokens is a symbol, 64 or another.
    """
    found: dict[str, list[list[str]]] = {}

    def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, seed: Tensor, weight: Tensor) -> Any:
        operands = (A, B, 2.0, None, None, 0.1, seed, B, weight)
        return torch.ops.mbf.lora_linear.default(x, W, None, *operands)

    def backward(dy: Tensor, h: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, seed: Tensor) -> Any:
        needs = [True, False, False, True, True, False, False, False, False]
        operands = (A, B, 2.0, None, None, 0.1, seed, None, None)
        gradients = torch.ops.mbf.lora_linear_backward.default(dy, h, x, W, *operands, needs)
        return [gradient for gradient in gradients if gradient is not None]

    def turned(y: Tensor, x: Tensor, M: Tensor, seed: Tensor) -> Any:
        return torch.ops.mbf.mora_accumulate.default(y, x, M, 6, 2.0, 0.1, seed)

    def turned_back(dy: Tensor, x: Tensor, M: Tensor, seed: Tensor) -> Any:
        return torch.ops.mbf.mora_accumulate_backward.default(dy, x, M, 256, 6, 2.0, 0.1, seed, [True, True])

    def nested(y: Tensor, x: Tensor, *operands: Tensor) -> Any:
        return torch.ops.mbf.lilora_accumulate.default(y, x, *operands[:-1], 0.1, operands[-1])

    def nested_back(dy: Tensor, h: Tensor, x: Tensor, *operands: Tensor) -> Any:
        return torch.ops.mbf.lilora_accumulate_backward.default(dy, h, x, *operands[:-1], 0.1, operands[-1], [True] * 7)

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    tokens = mode.from_tensor(torch.empty(64, device="meta"), symbolic_context=context).shape[0]
    with forced({"family": "sm_90"}), mode:

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        def trace(function: Any, *inputs: Tensor) -> None:
            graph = found.setdefault(function.__name__, [])

            def keep(module: torch.fx.GraphModule, _: Any) -> Any:
                graph.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
                return module.forward

            aot_function(function, fw_compiler=keep)(*inputs)

        shared = (empty(tokens, 256), empty(128, 256), empty(16, 256), empty(128, 16), empty(dtype=torch.int64))
        x, _, A, B, seed = shared
        y, h, M, Ea, Eb = empty(tokens, 128), empty(tokens, 16), empty(96, 96), empty(8, 16), empty(128, 8)
        on_cpu = torch.empty((), dtype=torch.float64)  # λ, as a float becomes
        trace(forward, *shared, on_cpu)
        trace(backward, y, h, *shared)
        trace(turned, y, x, M, seed)
        trace(turned_back, y, x, M, seed)
        trace(nested, y, x, A, B, Ea, Eb, on_cpu, on_cpu, seed)
        trace(nested_back, y, h, x, A, B, Ea, Eb, on_cpu, on_cpu, seed)
    return [found, [str(guard.expr) for guard in env.guards]]


def compilations() -> Any:
    """How many binaries each kernel has after a first call, and after others with other run-time values."""
    counts: Counter[str] = Counter()

    def count(*, fn: Any, **_: Any) -> None:
        counts[fn.name.rpartition(".")[2]] += 1

    triton.knobs.runtime.jit_post_compile_hook = count
    for scale, weight, p, tokens in [(2.0, 0.5, 0.1, 4096), (0.3, 1.0, 0.1, 8192), (1.0, 0.0, 0.25, 4097)]:
        with recorded() as launches:
            _step(scale, weight, p, tokens, 16)
            _step(scale, weight, p, tokens, 8)
        for kernel, grid, arguments, meta in launches:
            kernel.warmup(*arguments, grid=grid, **meta)
        if tokens == 4096:
            first = dict(counts)
    return [first, dict(counts)]


def _step(scale: float, weight: float, p: float, tokens: int, rank: int) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    class Branch(Terms):
        least = round(p * 2**16)

    A, B, seed = empty(rank, 512), empty(512, rank), torch.empty((), dtype=torch.int64, device="meta")
    branch = Branch(A, B, scale, None, None, p, seed, B, torch.tensor(weight, dtype=torch.float64))
    x, W, h = empty(tokens, 512), empty(512, 512), empty(tokens, rank)
    lora_linear.forward(x, W, None, branch)
    lora_linear.backward(x, h, x, W, branch, [True, False, False, True, True, False, False, True, False])
    cos = torch.empty(6, 48, dtype=torch.float32, device="meta")
    square = SquareTerms(empty(96, 96), True, scale, p, seed)
    mora.forward(x, x, square, cos, cos)
    mora.backward(x, x, square, 512, cos, cos, [True, True])
    number = torch.tensor(weight, dtype=torch.float64)
    nested = NestedTerms(A, B, empty(rank, rank), empty(512, rank), number, number * scale, p, seed)
    lilora.forward(x, x, nested)
    lilora.backward(x, h, x, nested, [True] * 5 + [False] * 2)


def spilling() -> Any:
    """What the report says of a tile that is too large."""
    with forced({"input_gradient": Config(128, 256, 4)}):
        return [row.broken for row in rows("sm_80", "bf16", 16) if row.kernel == "input_gradient"]


if __name__ == "__main__":
    triton.runtime.driver.set_active(NamedGpu())
    print(json.dumps({"graphs": graphs, "compilations": compilations, "spilling": spilling}[sys.argv[1]]()))
