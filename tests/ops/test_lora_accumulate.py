from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mbf import ops
from mbf.ops import lora_accumulate, lora_accumulate_ref, lora_linear
from tests.ops.lora_cases import FORMS, SEED, assert_accurate, check_error_rule, gradients, operands, tracked

DTYPES = {  # of y, of x, of the branch
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp32 on bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32 x, bf16 y": (torch.bfloat16, torch.float32, torch.float32),
    "bf16 x, fp32 y": (torch.float32, torch.bfloat16, torch.bfloat16),
}


def accumulating(form: str, lead: tuple[int, ...], d_in: int, d_out: int, r: int, *dtypes: torch.dtype) -> dict:
    of_y, of_x, of_branch = dtypes
    case = operands(form, lead, d_in, d_out, r, of_branch, of_x)
    del case["weight"], case["bias"]
    y = torch.randn(*lead, d_out, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return {"y": y.to(of_y), **case}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule(dtypes: str, form: str) -> None:
    case = accumulating(form, (2, 9), 63, 40, 12, *DTYPES[dtypes])
    check_error_rule(lora_accumulate, lora_accumulate_ref, case, scale=1.7, dropout_p=0.3, seed=SEED)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    case = tracked(accumulating(form, (2, 3), 5, 4, 3, *[torch.float64] * 3))

    def function(*values: Tensor) -> Tensor:
        return lora_accumulate(**dict(zip(case, values, strict=True)), scale=0.7, dropout_p=0.4, seed=SEED)

    assert torch.autograd.gradcheck(function, list(case.values()))


@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 3, 4)])
def test_is_the_branch_of_lora_linear(lead: tuple[int, ...]) -> None:
    case = operands("everything", lead, 6, 5, 2, torch.float64)
    terms = {"scale": 1.3, "dropout_p": 0.3, "seed": SEED}
    whole = tracked(case)
    x, weight, bias = (whole[name] for name in ("x", "weight", "bias"))
    branch = {name: whole[name] for name in whole if name not in ("weight", "bias")}
    leaves = list(whole.values())
    expected = lora_linear(**whole, **terms)
    got = lora_accumulate(torch.nn.functional.linear(x, weight, bias), **branch, **terms)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (got, expected)),
    )


def test_leaves_y_and_strides_alone() -> None:
    case = accumulating("plain", (4, 3), 6, 5, 2, *[torch.float64] * 3)
    strided = {name: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for name, v in case.items()}
    got = lora_accumulate(**strided)
    torch.testing.assert_close(got, lora_accumulate_ref(**case))
    assert torch.equal(strided["y"], case["y"]) and got.is_contiguous()


def test_x_is_kept_for_A_only() -> None:
    case = accumulating("plain", (50,), 40, 30, 2, *[torch.float32] * 3)
    for asked, kept in (("B", False), ("A", True)):
        case[asked].requires_grad_()
        pointers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pointers.append(t.data_ptr()) or t, lambda t: t):  # noqa: B023
            lora_accumulate(**case)
        assert (case["x"].data_ptr() in pointers) == kept and case["y"].data_ptr() not in pointers


def test_autocast_matches_pefts_layer_over_a_base_of_another_class() -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    layer = Linear(torch.nn.Linear(48, 40), "default", LoraConfig(r=6, lora_alpha=9), r=6, lora_alpha=9)
    A, B = layer.lora_A["default"].weight, torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    case: dict[str, Any] = {"x": torch.randn(3, 7, 48).requires_grad_(), "A": A, "B": B}

    def fused(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_accumulate(layer.base_layer(x), x, A, B, scale=1.5)

    exact = gradients(lambda x, **_: layer(x), case, None)
    with torch.autocast("cpu", torch.bfloat16):
        torch_ = gradients(lambda x, **_: layer(x), case, None)
        got = gradients(fused, case, None)
    assert got["y"].dtype == torch.bfloat16
    assert_accurate(got, torch_, {name: value.double() for name, value in exact.items()})


def test_reference_backend_is_plain_torch_with_the_same_result() -> None:
    case = tracked(accumulating("everything", (4,), 6, 5, 2, *[torch.float64] * 3))
    got = gradients(lora_accumulate, case, None, dropout_p=0.3, seed=SEED)
    assert lora_accumulate(**case).grad_fn.name() == "lora_accumulateBackward"
    with ops.use_backend("reference"):
        assert "lora" not in lora_accumulate(**case).grad_fn.name()
        torch.testing.assert_close(gradients(lora_accumulate, case, None, dropout_p=0.3, seed=SEED), got)


def test_compiles_whole() -> None:
    case = tracked(accumulating("everything", (4,), 6, 5, 2, *[torch.float64] * 3))
    compiled = torch.compile(lambda **operands: lora_accumulate(**operands), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, case, None), gradients(lora_accumulate, case, None))


def test_opcheck() -> None:
    case = accumulating("everything", (2, 3), 5, 4, 3, torch.bfloat16, torch.float32, torch.float32)
    branch = [case["A"], case["B"], 0.5, case["gate"], case["mix"], 0.3, torch.tensor(SEED)]
    branch += [case["merged_B"], case["merge_weight"]]
    dy, h = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 3)
    backward = torch.ops.mbf.lora_accumulate_backward.default
    torch.library.opcheck(backward, (dy, h, case["x"], *branch, [True] * 7))
    torch.library.opcheck(
        backward, (dy, h, None, *branch, [True] + [False] * 6), test_utils=("test_schema", "test_faketensor")
    )
    inputs = [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in branch]
    torch.library.opcheck(
        torch.ops.mbf.lora_accumulate.default, (case["y"].requires_grad_(), case["x"].requires_grad_(), *inputs)
    )


y, x, A, B = torch.randn(4, 5), torch.randn(4, 6), torch.randn(2, 6), torch.randn(5, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": y[:3]}, r"y has shape \[3, 5\]; it must be \[4, 5\]"),
        ({"y": y[:, :4]}, r"y has shape \[4, 4\]; it must be \[4, 5\]"),
        ({"y": y.int()}, r"y is torch.int32 on cpu"),
        ({"y": y.to("meta")}, r"y is torch.float32 on meta; .* on cpu"),
        ({"A": A[:, :5]}, r"A has shape \[2, 5\] and x \[4, 6\]"),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_accumulate(**{"y": y, "x": x, "A": A, "B": B, **changed})


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["constant dy", "dy of y"])
def test_second_derivative_is_refused_rather_than_wrong(loss: Any) -> None:
    case = tracked(accumulating("plain", (4,), 6, 6, 2, *[torch.float64] * 3))
    (dA,) = torch.autograd.grad(loss(lora_accumulate(**case)), case["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dA.sum().backward()
