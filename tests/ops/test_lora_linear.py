from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mbf import ops
from mbf.ops import lora_linear, lora_linear_ref
from mbf.ops._operands import prepare
from tests.ops.lora_cases import (
    FORMS,
    LAYOUTS,
    SEED,
    assert_accurate,
    check_error_rule,
    gradients,
    laid_out,
    operands,
    tracked,
    with_weight,
)

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32 on bf16": (torch.float32, torch.bfloat16),
    "bf16 on fp32": (torch.bfloat16, torch.float32),
}
SHAPES = [((1,), 63, 500, 3), ((7,), 500, 63, 12), ((431,), 63, 63, 1), ((3, 5), 64, 48, 8)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule(dtypes: str, form: str) -> None:
    check_error_rule(
        lora_linear,
        lora_linear_ref,
        operands(form, (2, 9), 63, 40, 12, *DTYPES[dtypes]),
        scale=1.7,
        dropout_p=0.3,
        seed=SEED,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule_at_odd_shapes(dtypes: str, shape: tuple) -> None:
    check_error_rule(lora_linear, lora_linear_ref, operands("everything", *shape, *DTYPES[dtypes]), scale=0.5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, dropout_p: float) -> None:
    case = tracked(operands(form, (2, 3), 5, 4, 3, torch.float64))
    names = list(case)

    def function(*values: Tensor) -> Tensor:
        return lora_linear(**dict(zip(names, values, strict=True)), scale=0.7, dropout_p=dropout_p, seed=SEED)

    assert torch.autograd.gradcheck(function, list(case.values()), fast_mode=False)


def test_gradcheck_of_a_tensor_scale() -> None:
    case = tracked(operands("rank gate", (4,), 5, 4, 3, torch.float64))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: lora_linear(**case, scale=s), [scale])
    assert torch.equal(lora_linear(**case, scale=scale), lora_linear(**{**case, "gate": case["gate"] * scale}))


@pytest.mark.parametrize("asked", ["x", "weight", "bias", "A", "B", "gate", "mix", "merged_B", "merge_weight"])
def test_one_gradient_alone(asked: str) -> None:
    case = operands("everything", (6,), 7, 5, 3, torch.float64)
    case[asked].requires_grad_()
    terms = {"dropout_p": 0.2, "seed": SEED}
    expected = gradients(lora_linear_ref, case, None, **terms)
    got = gradients(lora_linear, case, None, **terms)
    assert got.keys() == {"y", asked}
    torch.testing.assert_close(got, expected)


def test_seeded_reference_and_operator_drop_the_same_elements() -> None:
    case = operands("plain", (8, 3), 16, 16, 16, torch.float64)
    case |= {"A": torch.eye(16, dtype=torch.float64), "B": torch.eye(16, dtype=torch.float64)}
    case |= {"weight": torch.zeros(16, 16, dtype=torch.float64), "bias": None}
    keep = ops.dropout_mask(SEED, case["x"].shape, 0.25)
    for function in (lora_linear, lora_linear_ref):
        x = case["x"].clone().requires_grad_()
        y = function(**{**case, "x": x}, dropout_p=0.25, seed=SEED)
        assert torch.equal(y != 0, keep)
        y.sum().backward()
        assert torch.equal(x.grad != 0, keep)


def test_unseeded_dropout_draws_from_the_default_generator() -> None:
    case = operands("plain", (9,), 32, 32, 4, torch.float32)
    torch.manual_seed(1)
    first, second = (lora_linear(**case, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(lora_linear(**case, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(**case)
    assert torch.equal(torch.get_rng_state(), state), "no dropout draws nothing"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_mask(use_reentrant: bool) -> None:
    case = tracked(operands("plain", (5,), 16, 16, 4, torch.float64))
    leaves = list(case.values())

    def layer(x: Tensor) -> Tensor:
        return lora_linear(**{**case, "x": x}, dropout_p=0.5)

    torch.manual_seed(2)
    expected = torch.autograd.grad(layer(case["x"]).square().sum(), leaves)
    torch.manual_seed(2)
    torch.utils.checkpoint.checkpoint(layer, case["x"], use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected), rtol=0, atol=0)


def test_concatenated_loras_are_gated_ranks() -> None:
    loras = [operands("plain", (2, 6), 24, 20, 4, torch.float64) for _ in range(3)]
    for lora in loras:
        lora |= {"A": torch.randn_like(lora["A"]), "B": torch.randn_like(lora["B"])}
    x, weight = loras[0]["x"], loras[0]["weight"]
    A, B = torch.cat([lora["A"] for lora in loras]), torch.cat([lora["B"] for lora in loras], 1)
    g = torch.randn(2, 1, 3, dtype=torch.float64)
    got = lora_linear(x, weight, A, B, scale=0.5, gate=g.repeat_interleave(4, -1))
    parts = [0.5 * g[..., k : k + 1] * (x @ (lora["B"] @ lora["A"]).T) for k, lora in enumerate(loras)]
    torch.testing.assert_close(got, x @ weight.T + sum(parts))


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.25])
def test_merged_view_is_the_layer_with_interpolated_B(weight: float) -> None:
    case = operands("plain", (4,), 9, 8, 3, torch.float64)
    merged_B = torch.randn_like(case["B"])
    between = lora_linear(**{**case, "B": merged_B + weight * (case["B"] - merged_B)})
    torch.testing.assert_close(lora_linear(**case, merged_B=merged_B, merge_weight=weight), between)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)])
def test_leading_shapes(lead: tuple[int, ...]) -> None:
    case = tracked(operands("plain", lead, 6, 5, 2, torch.float64))
    terms = {"dropout_p": 0.3, "seed": SEED}
    got = gradients(lora_linear, case, None, **terms)
    assert got["y"].shape == (*lead, 5)
    torch.testing.assert_close(got, gradients(lora_linear_ref, case, None, **terms))


def test_strided_operands_and_gradients() -> None:
    case = operands("everything", (4, 3), 6, 5, 2, torch.float64)
    strided = {name: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for name, v in case.items()}
    strided["x"] = case["x"].transpose(0, 1).contiguous().transpose(0, 1)
    dy = torch.randn(3, 4, 5, dtype=torch.float64).transpose(0, 1)
    got, expected = (
        gradients(lora_linear, {k: v.detach().requires_grad_() for k, v in c.items()}, dy, dropout_p=0.3, seed=SEED)
        for c in (strided, case)
    )
    torch.testing.assert_close(got, expected)


def test_retained_graph_shared_input_and_frozen_operands() -> None:
    case = operands("plain", (4,), 6, 6, 2, torch.float64)
    x = case["x"].requires_grad_()

    def twice(function: Any) -> Tensor:
        return function(**case, dropout_p=0.3, seed=1) * function(**{**case, "x": x * 2}, dropout_p=0.3, seed=2)

    y = twice(lora_linear).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(twice(lora_linear_ref).sum(), x)[0])
    assert not lora_linear(**operands("plain", (4,), 6, 6, 2, torch.float64)).requires_grad


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["constant dy", "dy of y"])
def test_second_derivative_is_refused_rather_than_wrong(loss: Any) -> None:
    case = tracked(operands("plain", (4,), 6, 6, 2, torch.float64))
    (dA,) = torch.autograd.grad(loss(lora_linear(**case)), case["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dA.sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_first_derivatives_that_nobody_differentiates() -> None:
    case = tracked(operands("plain", (4,), 6, 6, 2, torch.float64))
    plain = torch.autograd.grad(lora_linear(**case).sum(), case["A"])
    lora_linear(**case).sum().backward(create_graph=True)
    torch.testing.assert_close(case["A"].grad.detach(), plain[0])


def test_a_gradient_that_depends_on_nothing_is_a_constant() -> None:
    case = operands("plain", (4,), 6, 6, 2, torch.float64)
    x = case["x"].requires_grad_()
    for function in (lora_linear, lora_linear_ref):
        assert not torch.autograd.grad(function(**case).sum(), x, create_graph=True)[0].requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    case = tracked(operands("everything", (4,), 6, 5, 2, torch.float64))
    expected = lora_linear_ref(**case).detach()
    with mode():
        got = lora_linear(**case)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)


def saved_tensors(case: dict[str, Any], **terms: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(**case, **terms)
    return kept


def test_what_is_saved() -> None:
    case = operands("plain", (50,), 40, 30, 2, torch.float32)
    case["B"].requires_grad_()
    operands_ = {id(case[name]) for name in ("weight", "A", "B")}
    kept = [t for t in saved_tensors(case, dropout_p=0.1) if id(t) not in operands_]
    assert sorted(t.numel() for t in kept) == [1, 50 * 2], "the seed and h; neither x nor a mask"
    case["A"].requires_grad_()
    kept = [t for t in saved_tensors(case, dropout_p=0.1) if id(t) not in operands_]
    assert sorted(t.numel() for t in kept) == [1, 50 * 2, 50 * 40]
    assert any(t.data_ptr() == case["x"].data_ptr() for t in kept), "x itself, no copy"


@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
def test_nothing_is_read_from_fresh_memory(dtypes: str) -> None:
    """torch fills what is allocated without a value with NaN where algorithms are to be deterministic."""
    case = operands("everything", (2, 9), 63, 40, 12, *DTYPES[dtypes])
    terms = {"scale": 1.7, "dropout_p": 0.3, "seed": SEED}
    expected = gradients(lora_linear, tracked(case), None, **terms)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = gradients(lora_linear, tracked(case), None, **terms)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_reference_backend_is_plain_torch_with_the_same_result() -> None:
    case = tracked(operands("everything", (4,), 6, 5, 2, torch.float64))
    terms = {"dropout_p": 0.3, "seed": SEED, "scale": 1.5}
    got = gradients(lora_linear, case, None, **terms)
    assert lora_linear(**case).grad_fn.name() == "lora_linearBackward"
    with ops.use_backend("reference"):
        assert "lora_linear" not in lora_linear(**case).grad_fn.name()
        torch.testing.assert_close(gradients(lora_linear, case, None, **terms), got)
    assert lora_linear(**case).grad_fn.name() == "lora_linearBackward"


def peft_layer(base: torch.dtype, adapter: torch.dtype, bias: bool) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    layer = Linear(
        torch.nn.Linear(48, 40, bias=bias),
        "default",
        LoraConfig(r=6, lora_alpha=9),
        r=6,
        lora_alpha=9,
        lora_dropout=0.0,
    ).to(base)
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        torch.nn.init.normal_(factor.weight, std=0.3)
        factor.to(adapter)
    return layer


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_against_pefts_layer(dtypes: str, autocast: bool) -> None:
    adapter, base = DTYPES[dtypes]
    layer = peft_layer(base, adapter, bias=True)
    case = {
        "x": torch.randn(3, 7, 48).to(base).requires_grad_(),
        "weight": layer.base_layer.weight,
        "bias": layer.base_layer.bias,
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
    }
    exact = gradients(lora_linear_ref, tracked(case, torch.float64), None, scale=1.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch_ = gradients(lambda x, **_: layer(x), case, None)
        got = gradients(lora_linear, case, None, scale=1.5)
    assert_accurate(got, torch_, exact)


def test_autocast_leaves_fp64_alone() -> None:
    case = operands("plain", (4,), 6, 5, 2, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lora_linear(**case), lora_linear_ref(**case))


def test_compiles_whole_and_does_not_recompile_for_new_scales_weights_and_masks() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    case = tracked(operands("merged", (4,), 6, 5, 2, torch.float64))
    leaves = [case[name] for name in ("x", "A", "B", "merge_weight")]

    def layer(scale: Tensor, merge_weight: Tensor) -> Tensor:
        return lora_linear(**{**case, "merge_weight": merge_weight}, scale=scale, dropout_p=0.3).square()

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled_before = []
    for scale, weight in ((1.5, 0.3), (0.7, 0.9)):
        arguments = torch.tensor(scale, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64).requires_grad_()
        leaves[-1] = arguments[1]
        results = []
        for function in (layer, compiled):
            torch.manual_seed(4)
            y = function(*arguments)
            results.append([y, *torch.autograd.grad(y.sum(), leaves)])
        torch.testing.assert_close(*results)
        compiled_before.append(counter.frame_count)
    assert compiled_before[0] == compiled_before[1] > 0
    assert any(node.target is torch.ops.mbf.lora_linear.default for node in counter.graphs[-1].graph.nodes)


def test_compiled_checkpointing_sees_the_same_mask() -> None:
    case = tracked(operands("plain", (5,), 16, 16, 4, torch.float64))
    case["weight"] = torch.zeros_like(case["weight"])
    case["bias"] = None

    def layer(x: Tensor) -> Tensor:
        return lora_linear(**{**case, "x": x}, dropout_p=0.5)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    x = case["x"]
    y = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")(x)
    dx, dA, dB = torch.autograd.grad(y, (x, case["A"], case["B"]), torch.ones_like(y))
    # y is linear in x, in A and in B: with the same mask in both directions, all three give Σ y back.
    for leaf, gradient in ((x, dx), (case["A"], dA), (case["B"], dB)):
        torch.testing.assert_close((leaf * gradient).sum(), y.sum())


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return lora_linear(x, weight, A, B, scale=2.0)

    case = operands("plain", (4,), 6, 5, 2, torch.float32)
    arguments = tuple(case[name] for name in ("x", "weight", "A", "B"))
    rows = torch.export.Dim("rows")
    program = torch.export.export(Layer(), arguments, dynamic_shapes={"x": {0: rows}, "weight": {}, "A": {}, "B": {}})
    longer = (torch.randn(9, 6), *arguments[1:])
    torch.testing.assert_close(program.module()(*longer), lora_linear(*longer, scale=2.0))


@pytest.mark.parametrize(("form", "base"), [("sample gate", torch.float32), ("everything", torch.bfloat16)])
def test_opcheck(form: str, base: torch.dtype) -> None:
    case = tracked(operands(form, (2, 3), 5, 4, 3, torch.float32, base))
    branch = [case["A"], case["B"], 0.5, case.get("gate"), case.get("mix"), 0.3, torch.tensor(SEED)]
    branch += [case.get("merged_B"), case.get("merge_weight")]
    torch.library.opcheck(torch.ops.mbf.lora_linear.default, (case["x"], case["weight"], case["bias"], *branch))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_backward(base: torch.dtype) -> None:
    case = operands("everything", (2, 3), 5, 4, 3, torch.float32, base)
    branch = [case["A"], case["B"], 0.5, case["gate"], case["mix"], 0.3, torch.tensor(SEED)]
    branch += [case["merged_B"], case["merge_weight"]]
    operator = torch.ops.mbf.lora_linear_backward.default
    dy, h = torch.randn(2, 3, 4).to(base), torch.randn(2, 3, 3)
    torch.library.opcheck(operator, (dy, h, case["x"], case["weight"], *branch, [True] * 9))
    torch.library.opcheck(
        operator,
        (dy, h, None, case["weight"], *branch, [True] + [False] * 8),
        test_utils=("test_schema", "test_faketensor"),
    )


x, W, A, B = torch.randn(4, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"A": A[:, :5]}, ValueError, r"A has shape \[2, 5\] and x \[4, 6\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x \[\]"),
        ({"B": B.T}, ValueError, r"B has shape \[2, 5\] and A \[2, 6\]"),
        ({"B": B.double()}, TypeError, r"A is torch.float32 and B torch.float64"),
        ({"A": A.int(), "B": B.int()}, TypeError, r"one floating-point dtype"),
        ({"A": A.to("meta")}, ValueError, r"x is on cpu, A on meta, B on cpu"),
        ({"weight": W.T}, ValueError, r"weight has shape \[6, 5\]; .* it must be \[d_out, d_in\] = \[5, 6\]"),
        ({"weight": W.bfloat16()}, TypeError, r"weight is torch.bfloat16 on cpu but x torch.float32"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias is torch.float32 \[6\] on cpu; it must be torch.float32 \[5\]"),
        ({"scale": torch.ones(2)}, ValueError, r"scale has shape \[2\]; .* is a gate"),
        ({"gate": torch.ones(3)}, ValueError, r"gate has shape \[3\]; it must broadcast to x Aᵀ, \[4, 2\]"),
        ({"gate": torch.ones(1, 4, 2)}, ValueError, r"gate has shape \[1, 4, 2\]"),
        ({"gate": torch.ones(2, dtype=torch.bool)}, TypeError, r"gate is torch.bool"),
        ({"gate": torch.ones(2, device="meta")}, ValueError, r"gate is on meta but x on cpu"),
        ({"mix": torch.eye(3)}, ValueError, r"mix has shape \[3, 3\] on cpu; it must be \[r, r\] = \[2, 2\]"),
        ({"merge_weight": 0.5}, ValueError, r"merge_weight is given without merged_B"),
        ({"merged_B": B}, ValueError, r"merged_B is given without merge_weight"),
        ({"merged_B": B.T, "merge_weight": 0.5}, ValueError, r"merged_B is torch.float32 \[2, 5\] on cpu"),
        ({"merged_B": B, "merge_weight": torch.ones(1)}, ValueError, r"merge_weight has shape \[1\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it must lie in \[0, 1 - 2\*\*-17\)"),
        ({"dropout_p": 0.5, "seed": 2**64}, ValueError, r"seed is 18446744073709551616"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1, device="meta")}, ValueError, r"seed is on meta but x on cpu"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_linear(**{"x": x, "weight": W, "A": A, "B": B, **changed})


@pytest.mark.parametrize("named", ["scale", "gate"])
def test_a_0d_factor_goes_to_the_device_of_x(named: str) -> None:
    given = {"scale": 1.0, "gate": None, named: torch.tensor(2.0, requires_grad=True)}
    rest = dict.fromkeys(("mix", "seed", "merged_B", "merge_weight"))
    branch = prepare(x.to("meta"), A.to("meta"), B.to("meta"), **given, **rest, dropout_p=0.0)
    assert branch.gate.device.type == "meta" and branch.gate.requires_grad
    assert prepare(x, A, B, **given, **rest, dropout_p=0.0).gate is given[named]


def test_plain_case_is_the_formula() -> None:
    expected = F.linear(x, W) + 2.0 * F.linear(F.linear(x, A), B)
    torch.testing.assert_close(lora_linear(x, W, A, B, scale=2.0), expected)


# -- the C++ kernels --------------------------------------------------------------------------------------------------

native = pytest.mark.skipif(not ops.native_status().loaded, reason=f"no extension: {ops.native_status().reason}")
DIMENSION = st.one_of(st.integers(1, 80), st.sampled_from([96, 127, 128, 257, 500]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.integers(1, 60), st.sampled_from([256, 300, 431, 640])),
    d_in=DIMENSION,
    d_out=DIMENSION,
    r=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 256])),
    dtypes=st.sampled_from(list(DTYPES)),
    form=st.sampled_from(FORMS),
    dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_error_rule_at_drawn_shapes(
    rows: int, d_in: int, d_out: int, r: int, dtypes: str, form: str, dropout_p: float
) -> None:
    torch.manual_seed(rows * 31 + d_in)
    case = operands(form, (rows,), d_in, d_out, r, *DTYPES[dtypes])
    terms = {"scale": 1.3, "dropout_p": dropout_p, "seed": SEED if dropout_p else None}
    check_error_rule(lora_linear, lora_linear_ref, case, **terms)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(1, 64, 1), (1, 128, 63), (1, 640, 900), (1, 70, 33), (9, 96, 40)])
def test_weights_wherever_they_lie(rows: int, d_in: int, d_out: int, layout: str) -> None:
    """One row goes through W without BLAS where W's rows are whole vectors side by side."""
    case = operands("plain", (rows,), d_in, d_out, 5, torch.float32)
    weight = laid_out(case.pop("weight"), layout)
    for bias in (case.pop("bias"), None):
        both = (with_weight(function, weight) for function in (lora_linear, lora_linear_ref))
        check_error_rule(*both, case | {"bias": bias}, dropout_p=0.3, seed=SEED)


@native
@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out"), [(1100, 200, 72), (600, 72, 200), (20, 640, 900), (1, 640, 900), (1, 500, 63)]
)
def test_same_bits_for_every_number_of_threads(rows: int, d_in: int, d_out: int, dtypes: str) -> None:
    case = operands("everything", (rows,), d_in, d_out, 8, *DTYPES[dtypes])
    dy = torch.randn(rows, d_out).to(case["x"].dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(gradients(lora_linear, tracked(case), dy, dropout_p=0.2, seed=SEED))
    finally:
        torch.set_num_threads(before)
    wanted = found[0].keys() - {"weight", "bias"}  # those two are torch's own products
    for other in found[1:]:
        assert [name for name in wanted if not torch.equal(found[0][name], other[name])] == []


@native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "dtype"),
    [
        (1, 768, 768, torch.float32),
        (1, 640, 2050, torch.float32),
        (700, 513, 24, torch.float32),
        (700, 24, 513, torch.float32),
        (300, 512, 512, torch.float64),
        (1, 768, 768, torch.float64),
    ],
)
def test_more_threads_than_tiles_change_no_bit(
    rows: int, d_in: int, d_out: int, dtype: torch.dtype, bias: bool
) -> None:
    case = operands("plain", (rows,), d_in, d_out, 8, dtype)
    case |= {} if bias else {"bias": None}
    case["weight"].requires_grad_(False)
    dy = torch.randn(rows, d_out, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 9, 16):
            torch.set_num_threads(threads)
            found.append(gradients(lora_linear, tracked(case), dy))
    finally:
        torch.set_num_threads(before)
    wanted = found[0].keys() - {"weight", "bias"}
    assert {"y", "x", "A", "B"} <= wanted
    for other in found[1:]:
        assert [name for name in wanted if not torch.equal(found[0][name], other[name])] == []


@native
@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch copies at once")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operands_that_are_copied_on_writing_are_read_as_they_are(dtype: torch.dtype) -> None:
    case = operands("everything", (300,), 64, 48, 8, dtype)
    lazy = {n: torch._lazy_clone(v) if isinstance(v, Tensor) else v for n, v in case.items()}
    assert torch.equal(lora_linear(**lazy), lora_linear(**case))
    shared = [n for n, v in lazy.items() if isinstance(v, Tensor) and torch._C._is_cow_tensor(v)]
    assert {"x", "weight", "A", "B"} <= set(shared)


@native
def test_nothing_uninitialised_is_read() -> None:
    """Fresh memory is filled with NaN, in torch's allocations by its own switch."""
    case = operands("everything", (300,), 70, 90, 5, torch.float32)
    expected = gradients(lora_linear, tracked(case), None, dropout_p=0.2, seed=SEED)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        got = gradients(lora_linear, tracked(case), None, dropout_p=0.2, seed=SEED)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in got.values())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


LEVEL = """
import torch
from mbf import ops
from tests.ops.lora_cases import SEED, check_error_rule, operands
from mbf.ops import lora_linear, lora_linear_ref
from mbf.ops._operands import prepare
assert ops.native_status().loaded
for shape, p in (((50, 63), 0.3), ((7, 129), 0.9)):
    with ops.use_backend("reference"):
        expected = ops.dropout_mask(SEED, shape, p)
    assert torch.equal(ops.dropout_mask(SEED, shape, p), expected)
    case = operands("plain", shape[:1], shape[1], shape[1], shape[1], torch.float64)
    x, eye = case["x"].float(), torch.eye(shape[1])
    case |= {"x": x, "weight": torch.zeros_like(eye), "A": eye, "B": eye, "bias": None}
    assert torch.equal(lora_linear(**case, dropout_p=p, seed=SEED) != 0, expected)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check_error_rule(lora_linear, lora_linear_ref, operands("everything", (60,), 65, 130, 19, torch.float32, dtype),
                     dropout_p=0.3, seed=SEED)
"""


@native
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", LEVEL], env=environment, cwd=root, check=True, timeout=300)
