"""Calls every raw operator with random arguments, right ones and wrong ones: ``python -m tests.sanitize.fuzz``.

A right call must give what the reference gives in fp64; a wrong one may raise, or compute where by chance it is right,
but neither crash nor disturb memory. Run with the extension built by ``MBF_SANITIZE=1``, the sanitizers see to that.

Call N of an operator depends on the seed, the operator's name and N only, so ``--operator lora_mlp --first 1234
--calls 1`` repeats one. ``--log`` writes the call that is about to be made, so that it can be told after a crash.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from mbf import ops
from tests.sanitize.arguments import VALID, wrong

BOUNDS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def operators() -> list[str]:
    """All raw operators that take tensors."""
    names = [name.removeprefix("mbf::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("mbf::")]
    return sorted({name.split(".")[0] for name in names} - {"cpu_kernels"})


def references() -> dict[str, Callable[..., Any]]:
    """The implementation in plain torch of each operator."""
    found: dict[str, Callable[..., Any]] = {}
    of_module = {
        **{name: ("_forward", "_backward") for name in ("lora_linear", "lora_accumulate", "lora_group", "lora_mlp")},
        "frozen_linear": ("frozen_linear_ref", "_backward"),
    }
    for name, (forward, backward) in of_module.items():
        module = importlib.import_module(f"mbf.ops.{name}")
        found |= {name: getattr(module, forward), f"{name}_backward": getattr(module, backward)}
    for file in ("lilora", "mora"):
        module = importlib.import_module(f"mbf.ops.{file}")
        found |= {f"{file}_accumulate": module._forward, f"{file}_accumulate_backward": module._backward}
    for file, names in {
        "philox": {"dropout_mask": "dropout_mask_ref"},
        "merge": {"merge_": "merge_ref_", "merge_with_norms_": "merge_with_norms_ref_"},
        "basis": {"orthonormal_rows": "_operator_ref"},
        "task_boundary": {"task_boundary_": "task_boundary_ref_"},
        "rsvd": {"rsvd": "_rsvd_operator_ref", "svd_factors": "_svd_factors_operator_ref"},
    }.items():
        module = importlib.import_module(f"mbf.ops.{file}")
        found |= {operator: getattr(module, function) for operator, function in names.items()}
    return found


def each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    return [each(part, change) for part in value] if isinstance(value, (list, tuple)) else value


def tensors(value: Any) -> list[Tensor | None]:
    """What an operator returned, in order; None and the empty tensors that stand for it in a list are None."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part if isinstance(part, Tensor) and part.shape != (0,) else None for part in parts]


def in_fp64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


def precision(arguments: list[Any]) -> float:
    """The bound on the relative error that the least exact of the arguments allows."""
    found: list[float] = [BOUNDS[torch.float32]]
    each(arguments, lambda t: found.append(BOUNDS.get(t.dtype, 0.0)))
    return max(found)


def close(got: Tensor, truth: Tensor, bound: float) -> bool:
    if not truth.is_floating_point():
        return torch.equal(got, truth.to(got.dtype))
    if got.shape != truth.shape or not got.isfinite().all():
        return False
    # A single number may be a sum whose parts cancel.
    slack = 30.0 if truth.numel() <= 1 else 1.0
    return bool((got.double() - truth).norm() <= bound * (truth.norm() + slack))


def difference(name: str, arguments: list[Any], got: Any, truth: Any, wide: list[Any]) -> str | None:
    """In what the outcome differs from the truth, or None. Both may have written their arguments."""
    bound = precision(arguments)
    if name in ("rsvd", "svd_factors"):  # triples that are equally long may come in any mixture: their lengths count
        count = len(got) // 3
        lengths = zip(got[count : 2 * count], truth[count : 2 * count], strict=True)
        wrong_lengths = [n for n, (a, b) in enumerate(lengths) if b.numel() and not close(a, b, bound)]
        return f"S of {wrong_lengths}" if wrong_lengths and not got[-1].any() else None
    if name in ("orthonormal_rows", "task_boundary_"):
        status, Qs = got, arguments[1] if name == "orthonormal_rows" else arguments[2]
        if status.any():
            return None
        for n, Q in enumerate(Qs):
            rest = Q.double() @ Q.double().mT - torch.eye(Q.shape[-2], dtype=torch.float64)
            if Q.numel() and not rest.abs().max() <= bound:
                return f"Q {n} is not orthonormal: {rest.abs().max():.3g}"
        pairs = (
            list(zip(arguments[0] + arguments[1], wide[0] + wide[1], strict=True)) if name != "orthonormal_rows" else []
        )
    else:
        pairs = list(zip(tensors(got), tensors(truth), strict=True))
        if name.startswith("merge_"):
            pairs += list(zip(arguments[0], wide[0], strict=True))
    for n, (a, b) in enumerate(pairs):
        if (a is None) != (b is None) and (b if a is None else a).numel():
            return f"result {n} is {'absent' if a is None else 'there'}"
        if a is not None and b is not None and not close(a, b, bound):
            return f"result {n}: {a.dtype} {list(a.shape)} is off by {(a.double() - b).norm():.3g} of {b.norm():.3g}"
    return None


def call(name: str, number: int, seed: int, reference: Callable[..., Any], huge: bool = True) -> str:
    """One call; what became of it: ``right``, ``refused`` or ``computed``. Raises AssertionError where it was wrong."""
    random = Random(f"{seed} {name} {number}")
    operator = getattr(torch.ops.mbf, name).default
    torch.set_num_threads(random.choice((1, 1, 2)))
    arguments = VALID[name](random)
    if random.random() < 0.5:
        try:
            for _ in range(random.choice((1, 1, 1, 2))):
                at = random.randrange(len(arguments))
                arguments[at] = wrong(random, arguments[at], huge)
            operator(*arguments)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
            told = str(error)
            return "refused" if told else "refused without a word"
        return "computed"
    wide = each(arguments, in_fp64)
    truth = reference(*wide)
    got = operator(*arguments)
    found = difference(name, arguments, got, truth, wide)
    assert found is None, f"{name}, call {number} of seed {seed}: {found}"
    return "right"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=300, help="of each operator")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operator", action="append", help="one of them alone; may be repeated")
    parser.add_argument("--log", type=Path, help="file for the call that is about to be made")
    options = parser.parse_args()
    unknown = set(operators()) ^ set(VALID)
    if unknown:
        print(f"operators without arguments in tests/sanitize/arguments.py, or the other way round: {sorted(unknown)}")
        return 1
    warnings.filterwarnings("ignore", message=".*(expanded|sparse|beta|complex|strided).*")
    status = ops.native_status()
    print(f"{status.path}: {status.kernels}", flush=True)
    log = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if options.log else None
    of, failures = references(), 0
    for name in options.operator or operators():
        outcomes: Counter[str] = Counter()
        begun = time.perf_counter()
        for number in range(options.first, options.first + options.calls):
            if log is not None:
                told = f"--operator {name} --seed {options.seed} --first {number} --calls 1"
                os.pwrite(log, f"{told:<100}\n".encode(), 0)
            try:
                outcomes[call(name, number, options.seed, of[name])] += 1
            except Exception as error:
                failures += 1
                outcomes["wrong"] += 1
                print(f"{name} {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"{name}: {options.calls} calls in {time.perf_counter() - begun:.1f} s: {counts}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
