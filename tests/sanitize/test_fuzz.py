"""A few of the random calls of ``make sanitize`` in every run of the tests, without its sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from mbf.ops import native_status
from tests.sanitize.arguments import VALID
from tests.sanitize.fuzz import call, compared, each, operators, references


def test_every_operator_has_arguments_and_a_reference() -> None:
    assert set(operators()) == set(VALID) == set(references())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
@pytest.mark.parametrize("name", sorted(VALID))
def test_random_calls(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        outcomes = [call(name, number, 0, references()[name], huge=False) for number in range(24)]
    finally:
        torch.set_num_threads(threads)
    assert {"right", "refused"} <= set(outcomes) <= {"right", "refused", "computed"}


def zeros(result: Any) -> Any:
    return each(result, torch.zeros_like)


def triples(change: Callable[[int, int, Tensor], Tensor]) -> Callable[[list[Any], Any], Any]:
    """Changes the parts of [U.., S.., Vh.., status]: of which kind, the place in the list, the part."""

    def spoilt(arguments: list[Any], result: Any) -> Any:
        count = len(result) // 3
        return [change(n // count, n, part) for n, part in enumerate(result)]

    return spoilt


def write(at: int, change: Callable[[Tensor], Any]) -> Callable[[list[Any], Any], Any]:
    """Changes what the operator wrote into its argument ``at``."""

    def spoilt(arguments: list[Any], result: Any) -> Any:
        for tensor in arguments[at]:
            tensor.copy_(change(tensor))
        return result

    return spoilt


def eye(Q: Tensor) -> Tensor:
    return torch.eye(*Q.shape[-2:]).expand(Q.shape)


def other(Q: Tensor) -> Tensor:
    return torch.linalg.qr(torch.randn(Q.mT.shape)).Q.mT


def half(tensor: Tensor) -> Tensor:
    return tensor * 0.5


SVDS = {
    "zeros": lambda arguments, result: zeros(result),
    "U permuted": triples(lambda kind, n, part: part.roll(1, -1) if kind == 0 else part),
    "U of zeros": triples(lambda kind, n, part: part * 0 if kind == 0 else part),
    "U negative": triples(lambda kind, n, part: -part if kind == 0 else part),
    "U and Vh negative": triples(lambda kind, n, part: -part if kind in (0, 2) else part),
    "another Vh": triples(lambda kind, n, part: other(part) if kind == 2 else part),
    "S too long": triples(lambda kind, n, part: part * 1.2 if kind == 1 else part),
    "status 1": triples(lambda kind, n, part: part + 1 if kind == 3 else part),
    "status 1 and NaN": triples(lambda kind, n, part: part + 1 if kind == 3 else part * torch.nan),
    "status 2": triples(lambda kind, n, part: part + 2 if kind == 3 else part),
}
BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "eye": eye,
    "another basis": other,
    "negative": torch.neg,
    "half": half,
    "permuted": lambda Q: Q.roll(1, -1),
}


def returned(change: Callable[[Tensor], Tensor]) -> Callable[[list[Any], Any], Any]:
    """Changes every Q of [Q.., status]."""
    return lambda arguments, result: [*(change(Q).to(Q.dtype) for Q in result[:-1]), result[-1]]


ONES = {
    "zeros": lambda arguments, result: zeros(result),
    "a third too much": lambda arguments, result: each(result, lambda t: t * 1.33),
}
WRONG: list[tuple[str, str, Callable[[list[Any], Any], Any]]] = [
    *((name, fault, change) for name in ("rsvd", "svd_factors") for fault, change in SVDS.items()),
    *(("orthonormal_rows", fault, returned(change)) for fault, change in BASES.items()),
    *(("orthonormal_rows", f"status {n}", lambda _, result, n=n: [*result[:-1], result[-1] + n]) for n in (1, 2)),
    *(("task_boundary_", fault, write(2, change)) for fault, change in BASES.items()),
    *(("task_boundary_", f"status {n}", lambda _, result, n=n: result + n) for n in (1, 2)),
    ("empty_like_all", "all in one place", lambda _, result: [result[0].expand_as(result[0])] * len(result)),
    ("empty_like_all", "with gaps", lambda _, result: [part.new_empty((*part.shape, 2))[..., 0] for part in result]),
    *(("task_boundary_", f"merged {at} of zeros", write(at, torch.zeros_like)) for at in (0, 1)),
    ("merge_", "of zeros", write(0, torch.zeros_like)),
    ("merge_with_norms_", "norms of zeros", ONES["zeros"]),
    *((name, fault, ONES[fault]) for name in ("lora_linear", "lora_mlp", "lora_group") for fault in ONES),
    *((f"{name}_backward", "zeros", ONES["zeros"]) for name in ("lora_linear", "lora_mlp", "mora_accumulate")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fault", "change"), WRONG, ids=[f"{name}: {fault}" for name, fault, _ in WRONG])
def test_wrong_results_are_caught(name: str, fault: str, change: Callable[[list[Any], Any], Any]) -> None:
    """The reference's are right; spoilt, they are so only where there is nothing to spoil."""
    reference = references()[name]

    def spoilt(*arguments: Any) -> Any:
        return change(list(arguments), reference(*arguments))

    torch.manual_seed(0)
    found = []
    for number in range(16):
        arguments = VALID[name](Random(f"{number}"))
        assert compared(name, each(arguments, lambda t: t.clone()), reference, reference) is None
        found.append(compared(name, arguments, reference, spoilt))
    assert len([difference for difference in found if difference]) >= 5, found  # of rank 1, nothing is permuted


def test_an_error_without_a_word_is_caught() -> None:
    def silent(*arguments: Any) -> Any:
        raise RuntimeError

    wrong = 0
    for number in range(24):
        try:
            call("dropout_mask", number, 0, references()["dropout_mask"], huge=False, operator=silent)
        except AssertionError as error:
            assert "RuntimeError without a word" in str(error)
            wrong += 1
        except RuntimeError:  # of a right call
            pass
    assert wrong > 5
