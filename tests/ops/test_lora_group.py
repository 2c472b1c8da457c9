from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mbf import ops
from mbf.ops import GroupLayer, LoraTerms, lora_group, lora_group_ref, lora_linear
from tests.ops.lora_cases import FORMS, SEED, assert_accurate, operands
from tests.ops.test_lora_linear import DTYPES

SIZES = [(40, 12), (17, 3), (24, 5)]  # d_out and r of each layer
PARTS = ("A", "B", "gate", "mix", "merged_B", "merge_weight")


def group(
    form: str, lead: tuple[int, ...], d_in: int, dtype: torch.dtype, base: torch.dtype, sizes: Any = SIZES
) -> dict[str, Any]:
    """x, and every operand of layer n under its name followed by n; the second layer has no bias."""
    cases = [operands(form, lead, d_in, d_out, r, dtype, base) for d_out, r in sizes]
    flat = {"x": cases[0]["x"]}
    flat |= {f"{name}{n}": value for n, case in enumerate(cases) for name, value in case.items() if name != "x"}
    return {name: value for name, value in flat.items() if name != "bias1"}


def layers(flat: dict[str, Any], dropout_p: float = 0.0, scale: float = 1.7) -> list[GroupLayer]:
    """The layers of a case; of each the scale and the seed differ, and the last drops nothing."""
    count = sum(name.startswith("weight") for name in flat)

    def layer(n: int) -> GroupLayer:
        terms = {part: flat[f"{part}{n}"] for part in PARTS if f"{part}{n}" in flat}
        p = 0.0 if n == 2 else dropout_p
        return GroupLayer(
            flat[f"weight{n}"], LoraTerms(scale=scale + n, **terms), flat.get(f"bias{n}"), p, SEED + n if p else None
        )

    return [layer(n) for n in range(count)]


def tracked(flat: dict[str, Any], to: torch.dtype | None = None) -> dict[str, Any]:
    """Leaves, cast to ``to``; all but weights and biases require gradients."""
    cast = {name: value.detach().to(to or value.dtype).clone() for name, value in flat.items()}
    return {
        name: value if name.startswith(("weight", "bias")) else value.requires_grad_() for name, value in cast.items()
    }


def results(
    function: Callable[..., tuple[Tensor, ...]], flat: dict[str, Any], dys: list[Tensor | None], **options: Any
) -> dict[str, Tensor]:
    """Every output, and the gradient of all that requires one; an output whose dy is None is not used."""
    ys = function(flat["x"], layers(flat, **options))
    wanted = {name: value for name, value in flat.items() if value.requires_grad}
    used = [(y, dy.to(y.dtype)) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in used], [*wanted.values()], [dy for _, dy in used], materialize_grads=True
    )
    return {f"y{n}": y.detach() for n, y in enumerate(ys)} | dict(zip(wanted, found, strict=True))


def gradients_of(flat: dict[str, Any]) -> list[Tensor | None]:
    """A random dy for every layer, the same for the same shapes."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(*flat["x"].shape[:-1], layer.weight.shape[0], generator=generator, dtype=torch.float64).to(
            flat["x"].dtype
        )
        for layer in layers(flat)
    ]


def assert_follows_rule(
    flat: dict[str, Any], got: dict[str, Tensor], torch_: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """``assert_accurate``, but the gradients of λ, ⟨dB̂, B − B₀⟩, and of a scalar gate, ⟨dB̂, B̂⟩ / gate, are single
    numbers that may cancel: their errors are held against the factors' norms."""
    for name in [name for name in exact if name.startswith(("merge_weight", "gate")) and not exact[name].dim()]:
        n = name[-1]
        errors = [abs(found.pop(name).double() - exact[name]) for found in (got, torch_)]
        del exact[name]
        merged_B = flat[f"merged_B{n}"].double() if name.startswith("merge_weight") else 0.0
        size = (exact[f"B{n}"] / flat[name]).norm() * (flat[f"B{n}"].double() - merged_B).norm()
        eps = max(torch.finfo(flat[operand].dtype).eps for operand in ("x", f"B{n}"))
        assert errors[0] <= 2 * errors[1] + eps * size, name
    assert_accurate(got, torch_, exact)


def compare_with_fp64(flat: dict[str, Any], dys: list[Tensor | None] | None = None, **options: Any) -> None:
    dys = dys or gradients_of(flat)
    exact = results(lora_group_ref, tracked(flat, torch.float64), dys, **options)
    torch_ = results(lora_group_ref, tracked(flat), dys, **options)
    assert_follows_rule(flat, results(lora_group, tracked(flat), dys, **options), torch_, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule(dtypes: str, form: str) -> None:
    compare_with_fp64(group(form, (2, 9), 63, *DTYPES[dtypes]), dropout_p=0.3)


@pytest.mark.parametrize(
    ("lead", "d_in", "sizes"),
    [
        ((1,), 100, [(63, 12), (500, 3)]),
        ((7,), 63, [(1, 8), (500, 3)]),
        ((431,), 500, [(63, 1), (40, 12)]),
        ((3, 5), 1, [(63, 8), (64, 3)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule_at_odd_shapes(dtypes: str, lead: tuple[int, ...], d_in: int, sizes: Any) -> None:
    compare_with_fp64(group("everything", lead, d_in, *DTYPES[dtypes], sizes))


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[:2], SIZES * 2], ids=len)
def test_any_number_of_layers(sizes: Any) -> None:
    compare_with_fp64(group("plain", (6,), 15, torch.float32, torch.float32, sizes), dropout_p=0.2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, dropout_p: float) -> None:
    flat = tracked(group(form, (2, 3), 5, torch.float64, torch.float64, [(4, 3), (3, 2), (2, 1)]))
    names = [name for name, value in flat.items() if value.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        case = flat | dict(zip(names, values, strict=True))
        return lora_group(case["x"], layers(case, dropout_p, 0.7))

    assert torch.autograd.gradcheck(function, [flat[name] for name in names])


def test_is_lora_linear_of_each_layer() -> None:
    flat = group("everything", (2, 9), 63, torch.float32, torch.float32)
    ys = lora_group(flat["x"], layers(flat, 0.3))
    for y, layer in zip(ys, layers(flat, 0.3), strict=True):
        terms = layer.terms._asdict()
        alone = lora_linear(
            flat["x"], layer.weight, bias=layer.bias, dropout_p=layer.dropout_p, seed=layer.seed, **terms
        )
        torch.testing.assert_close(y, alone)


@pytest.mark.parametrize("asked", ["x", *(f"{part}{n}" for n in (0, 2) for part in PARTS)])
def test_one_gradient_alone(asked: str) -> None:
    flat = group("everything", (6,), 7, torch.float64, torch.float64)
    flat[asked].requires_grad_()
    dys = gradients_of(flat)
    expected = results(lora_group_ref, flat, dys, dropout_p=0.2)
    got = results(lora_group, flat, dys, dropout_p=0.2)
    assert got.keys() == {"y0", "y1", "y2", asked}
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
def test_outputs_that_are_not_used(dtypes: str, used: list[int]) -> None:
    flat = group("everything", (2, 9), 63, *DTYPES[dtypes])
    dys = [dy if n in used else None for n, dy in enumerate(gradients_of(flat))]
    compare_with_fp64(flat, dys, dropout_p=0.3)


def test_parameters_of_an_unused_output_get_no_gradient() -> None:
    flat = tracked(group("plain", (4,), 6, torch.float64, torch.float64))
    lora_group(flat["x"], layers(flat))[1].sum().backward()
    assert {name for name, value in flat.items() if value.grad is not None} == {"x", "A1", "B1"}


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)])
def test_leading_shapes(lead: tuple[int, ...]) -> None:
    flat = tracked(group("plain", lead, 6, torch.float64, torch.float64))
    dys = gradients_of(flat)
    got = results(lora_group, flat, dys, dropout_p=0.3)
    assert [got[f"y{n}"].shape for n in range(3)] == [(*lead, d_out) for d_out, _ in SIZES]
    torch.testing.assert_close(got, results(lora_group_ref, flat, dys, dropout_p=0.3))


def test_strided_operands_and_gradients() -> None:
    flat = group("everything", (4, 3), 6, torch.float64, torch.float64)
    strided = {name: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for name, v in flat.items()}
    strided["x"] = flat["x"].transpose(0, 1).contiguous().transpose(0, 1)
    dys = [None if dy is None else dy.transpose(0, 1).contiguous().transpose(0, 1) for dy in gradients_of(flat)]
    for name in strided:
        if not name.startswith(("weight", "bias")):
            strided[name] = strided[name].detach().requires_grad_()
    got = results(lora_group, strided, dys, dropout_p=0.3)
    torch.testing.assert_close(got, results(lora_group, tracked(flat), dys, dropout_p=0.3))


def test_unseeded_layers_have_masks_of_their_own_in_order() -> None:
    flat = group("plain", (9,), 32, torch.float32, torch.float32, [(32, 4)] * 3)
    unseeded = [layer._replace(dropout_p=0.5, seed=None) for layer in layers(flat, scale=1.0)]
    torch.manual_seed(1)
    together = lora_group(flat["x"], unseeded)
    torch.manual_seed(1)
    for y, layer in zip(together, unseeded, strict=True):
        torch.testing.assert_close(y, lora_group(flat["x"], [layer])[0])
    same = [unseeded[0]._replace(seed=seed) for seed in (None, None, 5, 5)]
    ys = lora_group(flat["x"], same)
    assert not torch.equal(ys[0], ys[1]) and torch.equal(ys[2], ys[3])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_masks(use_reentrant: bool) -> None:
    flat = tracked(group("plain", (5,), 16, torch.float64, torch.float64))
    leaves = [value for value in flat.values() if value.requires_grad]

    def together(x: Tensor) -> Tensor:
        given = [layer._replace(dropout_p=0.5, seed=None) for layer in layers(flat)]
        return torch.cat(lora_group(x, given), -1)

    torch.manual_seed(2)
    expected = torch.autograd.grad(together(flat["x"]).square().sum(), leaves)
    torch.manual_seed(2)
    checkpoint(together, flat["x"], use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected), rtol=0, atol=0)


def test_a_tensor_scale_is_differentiated() -> None:
    flat = tracked(group("rank gate", (4,), 5, torch.float64, torch.float64))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def function(s: Tensor) -> tuple[Tensor, ...]:
        given = [layer._replace(terms=layer.terms._replace(scale=s)) for layer in layers(flat)]
        return lora_group(flat["x"], given)

    assert torch.autograd.gradcheck(function, [scale])


def test_retained_graph() -> None:
    flat = tracked(group("plain", (4,), 6, torch.float64, torch.float64))
    y = torch.cat(lora_group(flat["x"], layers(flat, 0.3)), -1).square().sum()
    first, second = (torch.autograd.grad(y, flat["x"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["constant dy", "dy of y"])
def test_second_derivative_is_refused_rather_than_wrong(loss: Any) -> None:
    flat = tracked(group("plain", (4,), 6, torch.float64, torch.float64))
    y, *_ = lora_group(flat["x"], layers(flat))
    (dA,) = torch.autograd.grad(loss(y), flat["A0"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dA.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_many_outputs_at_once(form: str) -> None:
    flat = tracked(group(form, (2, 3), 5, torch.float64, torch.float64))
    y = torch.cat(lora_group(flat["x"], layers(flat, 0.3)), -1)
    leaves, dys = [leaf for leaf in flat.values() if leaf.requires_grad], torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    torch.testing.assert_close(list(batched), [torch.stack(one) for one in zip(*single, strict=True)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    flat = tracked(group("everything", (4,), 6, torch.float64, torch.float64))
    flat["weight0"].requires_grad_()
    expected = [y.detach() for y in lora_group_ref(flat["x"], layers(flat))]
    with mode():
        got = lora_group(flat["x"], layers(flat))
    assert not any(y.requires_grad for y in got)
    torch.testing.assert_close(list(got), expected)


def test_what_is_saved() -> None:
    flat = group("plain", (50,), 40, torch.float32, torch.float32)

    def kept() -> list[Tensor]:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            lora_group(flat["x"], layers(flat, 0.1))
        given = {value.data_ptr() for name, value in flat.items() if name != "x"}
        return [t for t in tensors if t.data_ptr() not in given]

    flat["B1"].requires_grad_()
    small = [1, 1, *(50 * r for _, r in SIZES)]
    assert sorted(t.numel() for t in kept()) == sorted(small), "two seeds and every h; neither x nor a mask"
    flat["A2"].requires_grad_()
    assert sorted(t.numel() for t in kept()) == sorted([*small, 50 * 40])
    assert any(t.data_ptr() == flat["x"].data_ptr() for t in kept()), "x itself, once, no copy"


@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
def test_nothing_is_read_from_fresh_memory(dtypes: str) -> None:
    """torch fills what is allocated without a value with NaN where algorithms are to be deterministic."""
    flat = group("everything", (2, 9), 63, *DTYPES[dtypes])
    dys = gradients_of(flat)
    expected = results(lora_group, tracked(flat), dys, dropout_p=0.3)
    torch.use_deterministic_algorithms(True)
    try:
        got = results(lora_group, tracked(flat), dys, dropout_p=0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_autocast_is_that_of_lora_linear() -> None:
    flat = tracked(group("everything", (2, 9), 63, torch.float32, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_group(flat["x"], layers(flat, 0.3))
        for y, layer in zip(ys, layers(flat, 0.3), strict=True):
            terms = layer.terms._asdict()
            alone = lora_linear(
                flat["x"], layer.weight, bias=layer.bias, dropout_p=layer.dropout_p, seed=layer.seed, **terms
            )
            assert y.dtype == alone.dtype == torch.bfloat16
            assert (y - alone).norm() <= 0.01 * alone.norm()


def test_reference_backend_is_plain_torch_with_the_same_result() -> None:
    flat = tracked(group("everything", (4,), 6, torch.float64, torch.float64))
    dys = gradients_of(flat)
    got = results(lora_group, flat, dys, dropout_p=0.3)
    assert lora_group(flat["x"], layers(flat))[0].grad_fn.name() == "LoraGroupBackward"
    with ops.use_backend("reference"):
        assert "Lora" not in lora_group(flat["x"], layers(flat))[0].grad_fn.name()
        torch.testing.assert_close(results(lora_group, flat, dys, dropout_p=0.3), got)


def test_compiles_whole() -> None:
    flat = tracked(group("everything", (4,), 6, torch.float64, torch.float64))
    dys = gradients_of(flat)
    compiled = torch.compile(lora_group, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, flat, dys), results(lora_group, flat, dys))


@pytest.mark.parametrize(("form", "base"), [("sample gate", torch.float32), ("everything", torch.bfloat16)])
def test_opcheck(form: str, base: torch.dtype) -> None:
    flat = group(form, (2, 3), 5, torch.float32, base)
    lists: list[list[Any]] = [[flat.get(f"{name}{n}") for n in range(3)] for name in ("weight", "bias", "A", "B")]
    lists += [[0.5, 1.0, 2.0], *([flat.get(f"{name}{n}") for n in range(3)] for name in ("gate", "mix"))]
    lists += [[0.3, 0.0, 0.1], [torch.tensor(SEED), None, torch.tensor(SEED)]]
    lists += [[flat.get(f"{name}{n}") for n in range(3)] for name in ("merged_B", "merge_weight")]
    torch.library.opcheck(torch.ops.mbf.lora_group.default, (flat["x"], *lists))
    dys, hs = gradients_of(flat), [torch.randn(2, 3, r) for _, r in SIZES]
    backward = torch.ops.mbf.lora_group_backward.default
    weights, _, *branch = lists
    every = [True] + [form == "everything" or n % 6 < 3 for n in range(18)]
    torch.library.opcheck(backward, (dys, hs, flat["x"], weights, *branch, every))
    some = [True] + [False] * 6 + [n in (0, 1) for n in range(6)] + [False] * 6
    torch.library.opcheck(
        backward,
        ([None, dys[1], None], hs, flat["x"], weights, *branch, some),
        test_utils=("test_schema", "test_faketensor"),
    )


x = torch.randn(4, 6)
good = GroupLayer(torch.randn(5, 6), LoraTerms(torch.randn(2, 6), torch.randn(5, 2)))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (good._replace(weight=good.weight.T), ValueError, r"layers\[1\]: weight has shape \[6, 5\]"),
        (good._replace(weight=good.weight.double()), TypeError, r"layers\[1\]: weight is torch.float64"),
        (good._replace(bias=torch.zeros(6)), ValueError, r"layers\[1\]: bias is torch.float32 \[6\]"),
        (good._replace(dropout_p=1.0), ValueError, r"layers\[1\]: dropout_p is 1.0"),
        (
            good._replace(terms=LoraTerms(good.terms.A[:, :5], good.terms.B)),
            ValueError,
            r"layers\[1\]: A has shape \[2, 5\] and x \[4, 6\]",
        ),
        (
            good._replace(weight=good.weight.clone().requires_grad_()),
            ValueError,
            r"layers\[1\]: weight requires a gradient, but the base is frozen here; .*lora_linear",
        ),
        (
            good._replace(bias=torch.zeros(5, requires_grad=True)),
            ValueError,
            r"layers\[1\]: bias requires a gradient",
        ),
    ],
)
def test_errors(bad: GroupLayer, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_group(x, [good, bad])


def test_no_layer() -> None:
    with pytest.raises(ValueError, match="layers is empty"):
        lora_group(x, [])
