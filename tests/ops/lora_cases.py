"""Operands, the fp64 truth and the error rule for the tests of lora_linear and lora_accumulate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORMS = ("plain", "rank gate", "sample gate", "token gate", "row gate", "scalar gate", "mix", "merged", "everything")
LAYOUTS = ("packed", "unaligned", "padded rows", "columns", "every other column")
SEED = 20_240_607
SCALAR_DRAWS = 16  # of dy; two samples of a few errors are apart by more than a factor of two too often


def operands(
    form: str, lead: tuple[int, ...], d_in: int, d_out: int, r: int, dtype: torch.dtype, base: torch.dtype | None = None
) -> dict[str, Any]:
    """Random operands, B among them, for one form of routing; A, B, mix in ``dtype``, x, weight, bias in ``base``."""
    generator = torch.Generator().manual_seed(hash((lead, d_in, d_out, r)) % 2**31)

    def normal(*shape: int, of: torch.dtype = dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(of)

    base = base or dtype
    case: dict[str, Any] = {
        "x": normal(*lead, d_in, of=base),
        "weight": normal(d_out, d_in, of=base, std=d_in**-0.5),
        "bias": normal(d_out, of=base),
        "A": normal(r, d_in, std=d_in**-0.5),
        "B": normal(d_out, r, std=r**-0.5),
    }
    gates = {
        "rank gate": (r,),
        "sample gate": (*lead[:1], *(1 for _ in lead[1:]), r),
        "token gate": (*lead, r),
        "row gate": (*lead, 1),
        "scalar gate": (),
        "everything": (r,),
    }
    if form in gates:
        case["gate"] = normal(*gates[form])
    if form in ("mix", "everything"):
        case["mix"] = normal(r, r, std=r**-0.5)
    if form in ("merged", "everything"):
        case["merged_B"] = normal(d_out, r, std=r**-0.5)
        case["merge_weight"] = torch.tensor(0.37, dtype=torch.float64)
    return case


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same matrix, elsewhere in memory: one of ``LAYOUTS``. What lies between its elements is NaN."""
    rows, columns = matrix.shape
    gap = matrix.new_full((rows, columns), torch.nan)
    if layout == "unaligned":
        found = torch.cat([gap.flatten()[:1], matrix.flatten()])[1:].view(rows, columns)
    elif layout == "padded rows":
        found = torch.cat([matrix, gap[:, :1]], 1)[:, :columns]
    elif layout == "columns":
        found = matrix.t().contiguous().t()
    elif layout == "every other column":
        found = torch.stack([matrix, gap], 2)[:, :, 0]
    else:
        found = matrix
    assert torch.equal(found, matrix)
    return found


def with_weight(function: Any, weight: Tensor) -> Any:
    """``function`` of a case without weight, on this one as it lies; ``tracked`` would pack it."""
    return lambda x, A, B, **terms: function(x, weight.to(x.dtype), A, B, **terms)


def tracked(case: dict[str, Any], to: torch.dtype | None = None) -> dict[str, Any]:
    """The case with tensors that are leaves and require gradients, floating ones cast to ``to``."""
    return {
        name: value.detach().to(to or value.dtype).clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in case.items()
    }


def gradients(function: Any, case: dict[str, Any], dy: Tensor | None, **terms: Any) -> dict[str, Tensor]:
    """``y`` and the gradient of every floating operand of the case."""
    y = function(**case, **terms)
    names = [name for name, value in case.items() if isinstance(value, Tensor) and value.requires_grad]
    found = torch.autograd.grad(y, [case[name] for name in names], torch.ones_like(y) if dy is None else dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, found, strict=True))


def assert_accurate(got: dict[str, Tensor], torch_: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error against fp64 at most twice torch's in these dtypes + 1e-6 (+ an epsilon for tensors under 64 elements)."""
    assert got.keys() == torch_.keys() == exact.keys()
    for name, truth in exact.items():
        assert got[name].dtype == torch_[name].dtype and got[name].shape == torch_[name].shape, name
        assert got[name].isfinite().all(), name
        size = truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
        error, allowed = ((value[name].double() - truth).norm() / size for value in (got, torch_))
        slack = 1e-6 + (torch.finfo(got[name].dtype).eps if truth.numel() < 64 else 0.0)
        assert error <= 2 * allowed + slack, f"{name}: {error:.3g}, torch {allowed:.3g}"


def check_error_rule(function: Any, reference: Any, case: dict[str, Any], **terms: Any) -> None:
    """The rule for y and every gradient; a scalar's is judged over many dy, as one alone may cancel to nothing."""
    made: list[tuple[Any, torch.dtype | None]] = [(function, None), (reference, None), (reference, torch.float64)]
    shape = reference(**tracked(case, torch.float64), **terms).shape

    def draw() -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(case.get("y", case["x"]).dtype)

    dy = draw()
    found = [gradients(one, tracked(case, to), dy, **terms) for one, to in made]
    scalars = [name for name, value in found[-1].items() if not value.dim()]
    assert_accurate(*({name: value for name, value in one.items() if name not in scalars} for one in found))
    if scalars:
        dys = [draw() for _ in range(SCALAR_DRAWS)]
        assert_accurate(*(scalar_gradients(one, tracked(case, to), scalars, dys, **terms) for one, to in made))


def scalar_gradients(
    function: Any, case: dict[str, Any], names: list[str], dys: list[Tensor], **terms: Any
) -> dict[str, Tensor]:
    """The gradient of each of these scalar operands for every dy."""
    y, scalars = function(**case, **terms), [case[name] for name in names]
    found = [torch.autograd.grad(y, scalars, dy.to(y.dtype), retain_graph=True) for dy in dys]
    return {name: torch.stack(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}
