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
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from mbf import ops
from mbf.ops._status import DONE, GIVEN_UP
from tests.sanitize.arguments import VALID, wrong

LEAST = torch.finfo(torch.float32).eps  # some sums are in fp32 where an operand is
SAMPLES, TIMES = 4, 16  # of operands that are off by their rounding; how much further off a result may be
BY_PROPERTIES = ("empty_like_all", "orthonormal_rows", "rsvd", "svd_factors")  # compared by what they must fulfil
WELL_CONDITIONED = 1e4  # rows at unit length that no kernel may give up


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
        "empty_like_all": {"empty_like_all": "empty_like_all_ref"},
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


def rounding(arguments: Any) -> float:
    """The relative error of the least exact of the arguments."""
    found = [LEAST]
    each(arguments, lambda t: found.append(torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0))
    return max(found)


def outcome(name: str, arguments: list[Any], result: Any) -> list[Tensor | None]:
    """What a call returned and wrote, as far as it is compared number by number."""
    if name.startswith("merge_"):
        return tensors(result) + list(arguments[0])
    return [*arguments[0], *arguments[1]] if name == "task_boundary_" else tensors(result)


def allowed(
    name: str, arguments: list[Any], truth: list[Tensor | None], reference: Callable[..., Any]
) -> list[float | None]:
    """How far a call may be off each part of the truth: some times what the rounding of its operands does to it."""
    eps, generator = rounding(arguments), torch.Generator().manual_seed(1)
    squares = [0.0] * len(truth)

    def rounded(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor.double() * (1 + eps * noise)

    for _ in range(SAMPLES):
        near = each(arguments, rounded)
        for n, (a, b) in enumerate(zip(outcome(name, near, reference(*near)), truth, strict=True)):
            if a is not None and b is not None and b.is_floating_point():
                squares[n] += float((a - b).norm()) ** 2 / SAMPLES
    return [
        None if b is None else TIMES * (eps * float(b.double().norm()) + s**0.5)
        for s, b in zip(squares, truth, strict=True)
    ]


def close(got: Tensor, truth: Tensor, most: float) -> bool:
    if got.shape != truth.shape:
        return False
    if not truth.is_floating_point():
        return torch.equal(got, truth.to(got.dtype))
    finfo = torch.finfo(got.dtype)
    least = TIMES * finfo.smallest_normal * finfo.eps * truth.numel() ** 0.5
    return bool(got.isfinite().all()) and bool((got.double() - truth).norm() <= most + least)


def off(got: Tensor, truth: Tensor) -> str:
    if got.shape != truth.shape:
        return f"is {list(got.shape)}, not {list(truth.shape)}"
    return f"{got.dtype} {list(got.shape)} is off by {(got.double() - truth).norm():.3g} of {truth.double().norm():.3g}"


def of_identity(rows: Tensor) -> float:
    """How far the rows are from orthonormal."""
    return (
        float((rows @ rows.mT - torch.eye(rows.shape[-2], dtype=torch.float64)).abs().amax()) if rows.numel() else 0.0
    )


def wrong_status(status: int, wanted: int, may_give_up: bool, results: list[Tensor]) -> str | None:
    """``status`` is the reference's, or says that a matrix was given up, where that may be, and its results are NaN."""
    if status == GIVEN_UP and may_give_up and wanted == DONE:
        return None if all(part.isnan().all() for part in results) else "was given up, with numbers for results"
    return None if status == wanted else f"has status {status}, not {wanted}"


def wrong_rows(A: Tensor, Q: Tensor, status: int, eps: float) -> str | None:
    """A = L Q with Q Qᵀ = I, and L lower triangular with no negative number on its diagonal."""
    A, Q = A.double(), Q.double()
    unit = A / A.norm(dim=-1, keepdim=True)
    values = torch.linalg.svdvals(unit)
    dependent = bool(values[-1] * WELL_CONDITIONED < values[0])
    found = wrong_status(status, DONE, dependent, [Q])
    if found is not None or status == GIVEN_UP:
        return found
    L, bound = unit @ Q.mT, TIMES * eps
    if not of_identity(Q) <= bound:
        return f"is not orthonormal: {of_identity(Q):.3g}"
    if not (rest := float((L @ Q - unit).norm(dim=-1).amax())) <= bound:
        return f"does not span A: {rest:.3g} of a row is left"
    if not (rest := float(torch.triu(L, 1).abs().amax())) <= bound:
        return f"is not of A = L Q: {rest:.3g} above the diagonal of L"
    return None if L.diagonal().amin() >= -bound else f"has a wrong sign: {L.diagonal().amin():.3g} in L"


def wrong_triples(U: Tensor, S: Tensor, Vh: Tensor, M: Tensor, lengths: Tensor, eps: float, exact: bool) -> str | None:
    """U and Vh orthonormal, the reference's S, Uᵀ M = S Vh, of an exact decomposition M Vᵀ = U S, and the signs."""
    U, S, Vh = U.double(), S.double(), Vh.double()
    bound, scale = TIMES * eps, float(lengths.norm())
    if not (rest := float((S - lengths).norm())) <= bound * scale:
        return f"S is off by {rest:.3g} of {scale:.3g}"
    for part, rows in (("U", U.mT), ("Vh", Vh)):
        if not of_identity(rows) <= bound:
            return f"{part} is not orthonormal: {of_identity(rows):.3g}"
    if not (rest := float((U.mT @ M - S.unsqueeze(-1) * Vh).norm())) <= bound * scale:
        return f"Uᵀ M is off S Vh by {rest:.3g} of {scale:.3g}"
    if exact and not (rest := float((M @ Vh.mT - U * S).norm())) <= bound * scale:
        return f"M Vᵀ is off U S by {rest:.3g} of {scale:.3g}"
    signed = Vh.amax(-1) >= (1 - bound) * Vh.abs().amax(-1)
    return None if signed.all() else "a sign is not the rule's"


def matrices(stacks: Sequence[Tensor]) -> list[Tensor]:
    return [part for stack in stacks for part in stack.reshape(-1, *stack.shape[-2:]).unbind()]


def decomposed(name: str, arguments: list[Any], got: list[Tensor], truth: list[Tensor], wide: list[Any]) -> str | None:
    count = len(got) // 3
    if [part.shape for part in got] != [part.shape for part in truth]:
        return f"shapes are {[list(part.shape) for part in got]}"
    U, Vh = matrices(got[:count]), matrices(got[2 * count : -1])
    S, lengths = (matrices([part.unsqueeze(-1) for part in parts[count : 2 * count]]) for parts in (got, truth))
    if name == "rsvd":
        M, given_up = matrices(wide[0]), [False] * len(U)
    else:
        factors = list(zip(matrices(wide[0]), matrices(wide[1]), strict=True))
        M = [B @ A for B, A in factors]
        given_up = [B.shape[1] > min(B.shape[0], A.shape[1]) for B, A in factors]
    for n, (status, wanted) in enumerate(zip(got[-1].tolist(), truth[-1].tolist(), strict=True)):
        found = wrong_status(status, wanted, given_up[n], [U[n], S[n], Vh[n]])
        if found is None and status == DONE:
            eps = max(torch.finfo(U[n].dtype).eps, LEAST)
            s, length = S[n].squeeze(-1), lengths[n].squeeze(-1)
            found = wrong_triples(U[n], s, Vh[n], M[n], length, eps, name == "svd_factors")
        if found is not None:
            return f"matrix {n}, {U[n].dtype} {list(M[n].shape)}: {found}"
    return None


def other_room(like: list[Tensor], got: list[Tensor]) -> str | None:
    """Tensors as they were asked for, which lie apart."""
    for n, (wanted, found) in enumerate(zip(like, got, strict=True)):
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype) or not found.is_contiguous():
            return f"result {n} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        found.fill_(n)
    marks = [n for n, found in enumerate(got) if not bool((found == n).all())]
    return f"results {marks} share memory" if marks else None


def difference(
    name: str, arguments: list[Any], got: Any, truth: Any, wide: list[Any], most: list[float | None]
) -> str | None:
    """In what the outcome differs from the truth, or None. Both may have written their arguments."""
    if name in ("rsvd", "svd_factors"):
        return decomposed(name, arguments, got, truth, wide)
    if name == "empty_like_all":
        return other_room(arguments[0], got)
    if name in ("orthonormal_rows", "task_boundary_"):
        if name == "orthonormal_rows":
            A, bases, (*Q_of_truth, truth) = arguments[0], got[:-1], truth
            if [part.shape for part in bases] != [part.shape for part in Q_of_truth]:
                return f"shapes of Q are {[list(part.shape) for part in bases]}"
            A, Q, got = matrices(A), matrices(bases), got[-1]
        else:
            A, Q = matrices(arguments[3]), matrices(arguments[2])
        if got.shape != truth.shape:
            return f"status is {list(got.shape)}, not {list(truth.shape)}"
        status = got.tolist()
        for n, (matrix, basis) in enumerate(zip(A, Q, strict=True)):
            found = wrong_rows(matrix, basis, status[n], max(torch.finfo(basis.dtype).eps, LEAST))
            if found is not None:
                return f"Q {n}, {basis.dtype} {list(basis.shape)} {found}"
        if any(status[len(A) :]):
            return f"status of B is {status[len(A) :]}"
        if name == "orthonormal_rows":
            return None
    parts = zip(outcome(name, arguments, got), outcome(name, wide, truth), most, strict=True)
    for n, (a, b, bound) in enumerate(parts):
        there = b if a is None else a
        if there is not None and (a is None or b is None):
            if there.numel():
                return f"result {n} is {'absent' if a is None else 'there'}"
        elif a is not None and b is not None and not close(a, b, bound or 0.0):
            return f"result {n}: {off(a, b)}, at most {bound:.3g} are allowed"
    return None


def compared(
    name: str, arguments: list[Any], reference: Callable[..., Any], operator: Callable[..., Any]
) -> str | None:
    """Calls ``operator`` with right arguments; in what it differs from the reference, or None."""
    wide, before = each(arguments, in_fp64), each(arguments, lambda t: t.clone())
    truth = reference(*wide)
    most = allowed(name, before, outcome(name, wide, truth), reference) if name not in BY_PROPERTIES else []
    return difference(name, arguments, operator(*arguments), truth, wide, most)


def call(
    name: str,
    number: int,
    seed: int,
    reference: Callable[..., Any],
    huge: bool = True,
    operator: Callable[..., Any] | None = None,
) -> str:
    """One call; what became of it: ``right``, ``refused`` or ``computed``. Raises AssertionError where it was wrong."""
    random = Random(f"{seed} {name} {number}")
    operator = operator or getattr(torch.ops.mbf, name).default
    torch.set_num_threads(random.choice((1, 1, 2)))
    arguments = VALID[name](random)
    if random.random() < 0.5:
        try:
            for _ in range(random.choice((1, 1, 1, 2))):
                at = random.randrange(len(arguments))
                arguments[at] = wrong(random, arguments[at], huge)
            operator(*arguments)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
            assert str(error).strip(), f"{name}, call {number} of seed {seed}: {type(error).__name__} without a word"
            return "refused"
        return "computed"
    found = compared(name, arguments, reference, operator)
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
