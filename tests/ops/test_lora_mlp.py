from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mbf import ops
from mbf.ops import GroupLayer, LoraTerms, lora_linear, lora_mlp, lora_mlp_ref
from tests.ops.lora_cases import FORMS, SEED, operands
from tests.ops.test_lora_group import PARTS, assert_follows_rule, layers, tracked
from tests.ops.test_lora_linear import DTYPES

RANKS = (12, 3, 5)


def mlp(
    form: str,
    lead: tuple[int, ...],
    d_in: int,
    d_ff: int,
    dtype: torch.dtype,
    base: torch.dtype,
    ranks: tuple[int, int, int] = RANKS,
) -> dict[str, Any]:
    """x, and every operand of gate (0), up (1) and down (2) under its name and number; up has no bias."""
    sizes = [(d_in, d_ff), (d_in, d_ff), (d_ff, d_in + 2)]
    cases = [operands(form, lead, *size, r, dtype, base) for size, r in zip(sizes, ranks, strict=True)]
    flat = {"x": cases[0]["x"]}
    flat |= {f"{name}{n}": value for n, case in enumerate(cases) for name, value in case.items() if name != "x"}
    return {name: value for name, value in flat.items() if name != "bias1"}


def run(function: Callable[..., Tensor], flat: dict[str, Any], dropout_p: float = 0.0, **options: Any) -> Tensor:
    gate, up, down = (layer._replace(dropout_p=dropout_p, seed=SEED + n) for n, layer in enumerate(layers(flat)))
    return function(flat["x"], gate, up, down, **options)


def results(function: Callable[..., Tensor], flat: dict[str, Any], dy: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output, and the gradient of all that requires one."""
    y = run(function, flat, **options)
    wanted = {name: value for name, value in flat.items() if value.requires_grad}
    found = torch.autograd.grad(y, [*wanted.values()], dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(wanted, found, strict=True))


def gradient_of(flat: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (*flat["x"].shape[:-1], flat["weight2"].shape[0])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(flat["x"].dtype)


def compare_with_fp64(flat: dict[str, Any], recompute: bool = False, **options: Any) -> None:
    dy = gradient_of(flat)
    exact = results(lora_mlp_ref, tracked(flat, torch.float64), dy, **options)
    torch_ = results(lora_mlp_ref, tracked(flat), dy, **options)
    got = results(lora_mlp, tracked(flat), dy, recompute=recompute, **options)
    assert_follows_rule(flat, got, torch_, exact)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule(dtypes: str, form: str, activation: str) -> None:
    # Rows enough for errors of half precision to average: the products have heavy tails.
    flat = mlp(form, (3, 61), 63, 40, *DTYPES[dtypes])
    compare_with_fp64(flat, dropout_p=0.3, activation=activation)


@pytest.mark.parametrize(
    ("lead", "d_in", "d_ff", "ranks"),
    [
        ((1,), 63, 500, (12, 3, 8)),
        ((7,), 500, 63, (3, 8, 12)),
        ((431,), 63, 64, (1, 12, 1)),
        ((3, 5), 64, 100, (8, 8, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_error_rule_at_odd_shapes(dtypes: str, recompute: bool, lead: Any, d_in: int, d_ff: int, ranks: Any) -> None:
    compare_with_fp64(mlp("plain", lead, d_in, d_ff, *DTYPES[dtypes], ranks), recompute)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("form", "dropout_p"), [("plain", 0.0), ("plain", 0.4), ("everything", 0.4)])
def test_gradcheck(form: str, dropout_p: float, recompute: bool, activation: str) -> None:
    flat = tracked(mlp(form, (2, 2), 3, 4, torch.float64, torch.float64, (2, 1, 2)))
    names = [name for name, value in flat.items() if value.requires_grad]

    def function(*values: Tensor) -> Tensor:
        case = flat | dict(zip(names, values, strict=True))
        return run(lora_mlp, case, dropout_p, activation=activation, recompute=recompute)

    assert torch.autograd.gradcheck(function, [flat[name] for name in names])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_is_three_lora_linear(activation: str) -> None:
    flat = mlp("everything", (2, 9), 63, 40, torch.float32, torch.float32)
    gate, up, down = (layer._replace(dropout_p=0.3, seed=SEED + n) for n, layer in enumerate(layers(flat)))

    def alone(x: Tensor, layer: GroupLayer) -> Tensor:
        rest = {"dropout_p": layer.dropout_p, "seed": layer.seed, **layer.terms._asdict()}
        return lora_linear(x, layer.weight, bias=layer.bias, **rest)

    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    expected = alone(act(alone(flat["x"], gate)) * alone(flat["x"], up), down)
    got = lora_mlp(flat["x"], gate, up, down, activation=activation)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_recomputing_changes_no_bit(dtypes: str, activation: str) -> None:
    flat = mlp("everything", (5, 29), 63, 72, *DTYPES[dtypes])
    dy = gradient_of(flat)
    stored, recomputed = (
        results(lora_mlp, tracked(flat), dy, dropout_p=0.3, activation=activation, recompute=recompute)
        for recompute in (False, True)
    )
    torch.testing.assert_close(recomputed, stored, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("asked", ["x", *(f"{part}{n}" for n in range(3) for part in PARTS)])
def test_one_gradient_alone(asked: str, recompute: bool) -> None:
    flat = mlp("everything", (6,), 7, 9, torch.float64, torch.float64)
    flat[asked].requires_grad_()
    dy = gradient_of(flat)
    expected = results(lora_mlp_ref, flat, dy, dropout_p=0.2)
    got = results(lora_mlp, flat, dy, dropout_p=0.2, recompute=recompute)
    assert got.keys() == {"y", asked}
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)])
def test_leading_shapes(lead: tuple[int, ...], recompute: bool) -> None:
    flat = tracked(mlp("plain", lead, 6, 5, torch.float64, torch.float64))
    dy = gradient_of(flat)
    got = results(lora_mlp, flat, dy, dropout_p=0.3, recompute=recompute)
    assert got["y"].shape == (*lead, 8)
    torch.testing.assert_close(got, results(lora_mlp_ref, flat, dy, dropout_p=0.3))


@pytest.mark.parametrize("recompute", [False, True])
def test_strided_operands_and_gradients(recompute: bool) -> None:
    flat = mlp("everything", (4, 3), 6, 5, torch.float64, torch.float64)
    strided = {name: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for name, v in flat.items()}
    strided["x"] = flat["x"].transpose(0, 1).contiguous().transpose(0, 1)
    dy = gradient_of(flat)
    for name in strided:
        if not name.startswith(("weight", "bias")):
            strided[name] = strided[name].detach().requires_grad_()
    got = results(lora_mlp, strided, dy.transpose(0, 1).contiguous().transpose(0, 1), recompute=recompute)
    torch.testing.assert_close(got, results(lora_mlp, tracked(flat), dy))


def test_unseeded_layers_draw_in_order() -> None:
    flat = mlp("plain", (9,), 32, 40, torch.float32, torch.float32)
    gate, up, down = (layer._replace(dropout_p=0.5, seed=None) for layer in layers(flat))
    torch.manual_seed(1)
    seeds = [ops.draw_seed("cpu") for _ in range(3)]
    seeded = [layer._replace(seed=seed) for layer, seed in zip((gate, up, down), seeds, strict=True)]
    torch.manual_seed(1)
    assert torch.equal(lora_mlp(flat["x"], gate, up, down), lora_mlp(flat["x"], *seeded))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_masks(use_reentrant: bool, recompute: bool) -> None:
    flat = tracked(mlp("plain", (5,), 16, 12, torch.float64, torch.float64))
    leaves = [value for value in flat.values() if value.requires_grad]

    def block(x: Tensor) -> Tensor:
        gate, up, down = (layer._replace(dropout_p=0.5, seed=None) for layer in layers(flat))
        return lora_mlp(x, gate, up, down, recompute=recompute)

    torch.manual_seed(2)
    expected = torch.autograd.grad(block(flat["x"]).square().sum(), leaves)
    torch.manual_seed(2)
    checkpoint(block, flat["x"], use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_retained_graph(recompute: bool) -> None:
    flat = tracked(mlp("plain", (4,), 6, 5, torch.float64, torch.float64))
    y = run(lora_mlp, flat, 0.3, recompute=recompute).square().sum()
    first, second = (torch.autograd.grad(y, flat["x"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["constant dy", "dy of y"])
def test_second_derivative_is_refused_rather_than_wrong(loss: Any) -> None:
    flat = tracked(mlp("plain", (4,), 6, 5, torch.float64, torch.float64))
    (dA,) = torch.autograd.grad(loss(run(lora_mlp, flat)), flat["A0"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dA.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_many_outputs_at_once(form: str, recompute: bool) -> None:
    flat = tracked(mlp(form, (2, 3), 6, 5, torch.float64, torch.float64))
    y = run(lora_mlp, flat, 0.3, recompute=recompute)
    leaves, dys = [leaf for leaf in flat.values() if leaf.requires_grad], torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    torch.testing.assert_close(list(batched), [torch.stack(one) for one in zip(*single, strict=True)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    flat = tracked(mlp("everything", (4,), 6, 5, torch.float64, torch.float64))
    flat["weight2"].requires_grad_()
    expected = run(lora_mlp_ref, flat).detach()
    with mode():
        got = run(lora_mlp, flat)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_saved(recompute: bool) -> None:
    flat = mlp("plain", (50,), 40, 30, torch.float32, torch.float32)
    flat["B1"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(lora_mlp, flat, 0.1, recompute=recompute)
    given = {value.data_ptr() for name, value in flat.items() if name != "x"}
    sizes = sorted(t.numel() for t in kept if t.data_ptr() not in given)
    hs, seeds, g_and_u = [50 * r for r in RANKS], [1, 1, 1], [] if recompute else [50 * 30, 50 * 30]
    assert sizes == sorted([*hs, *seeds, *g_and_u, 50 * 40]), "x, h, seeds; no activation, product or mask"
    assert any(t.data_ptr() == flat["x"].data_ptr() for t in kept), "x itself, no copy"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
def test_nothing_is_read_from_fresh_memory(dtypes: str, recompute: bool) -> None:
    """torch fills what is allocated without a value with NaN where algorithms are to be deterministic."""
    flat = mlp("everything", (2, 9), 63, 40, *DTYPES[dtypes])
    dy = gradient_of(flat)
    options: dict[str, Any] = {"dropout_p": 0.3, "recompute": recompute}
    expected = results(lora_mlp, tracked(flat), dy, **options)
    torch.use_deterministic_algorithms(True)
    try:
        got = results(lora_mlp, tracked(flat), dy, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_autocast() -> None:
    flat = mlp("everything", (33,), 63, 40, torch.float32, torch.float32)
    dy = gradient_of(flat)
    exact = results(lora_mlp_ref, tracked(flat, torch.float64), dy, dropout_p=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(lora_mlp, tracked(flat), dy, dropout_p=0.3)
    assert got["y"].dtype == torch.bfloat16 and got["x"].dtype == got["A0"].dtype == torch.float32
    for name in ("y", "x", *(f"{factor}{n}" for factor in "AB" for n in range(3))):
        assert (got[name].double() - exact[name]).norm() <= 0.03 * exact[name].norm(), name


def test_reference_backend_is_plain_torch_with_the_same_result() -> None:
    flat = tracked(mlp("everything", (4,), 6, 5, torch.float64, torch.float64))
    dy = gradient_of(flat)
    got = results(lora_mlp, flat, dy, dropout_p=0.3)
    assert run(lora_mlp, flat).grad_fn.name() == "LoraMlpBackward"
    with ops.use_backend("reference"):
        assert "Lora" not in run(lora_mlp, flat).grad_fn.name()
        torch.testing.assert_close(results(lora_mlp, flat, dy, dropout_p=0.3), got)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_compiles_whole(activation: str) -> None:
    flat = tracked(mlp("everything", (4,), 6, 5, torch.float64, torch.float64))
    dy = gradient_of(flat)
    compiled = torch.compile(lora_mlp, fullgraph=True, backend="aot_eager")
    got, expected = (results(function, flat, dy, activation=activation) for function in (compiled, lora_mlp))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("form", "base"), [("sample gate", torch.float32), ("everything", torch.bfloat16)])
def test_opcheck(form: str, base: torch.dtype, recompute: bool) -> None:
    flat = mlp(form, (2, 3), 5, 4, torch.float32, base)
    lists: list[list[Any]] = [[flat.get(f"{name}{n}") for n in range(3)] for name in ("weight", "bias", "A", "B")]
    lists += [[0.5, 1.0, 2.0], *([flat.get(f"{name}{n}") for n in range(3)] for name in ("gate", "mix"))]
    lists += [[0.3, 0.0, 0.1], [torch.tensor(SEED), None, torch.tensor(SEED)]]
    lists += [[flat.get(f"{name}{n}") for n in range(3)] for name in ("merged_B", "merge_weight")]
    forward, backward = torch.ops.mbf.lora_mlp.default, torch.ops.mbf.lora_mlp_backward.default
    torch.library.opcheck(forward, (flat["x"], *lists, 0, recompute))
    _, g, u, *hs = forward(flat["x"], *lists, 0, False)
    kept = (None, None) if recompute else (g, u)
    every = [True] + [form == "everything" or n % 6 < 3 for n in range(18)]
    torch.library.opcheck(backward, (gradient_of(flat), flat["x"], *kept, hs, *lists, 0, every))
    some = [False] * 7 + [n == 1 for n in range(6)] + [False] * 6
    torch.library.opcheck(
        backward,
        (gradient_of(flat), flat["x"], *kept, hs, *lists, 1, some),
        test_utils=("test_schema", "test_faketensor"),
    )


x = torch.randn(4, 6)
good = {
    "gate": GroupLayer(torch.randn(5, 6), LoraTerms(torch.randn(2, 6), torch.randn(5, 2))),
    "up": GroupLayer(torch.randn(5, 6), LoraTerms(torch.randn(3, 6), torch.randn(5, 3))),
    "down": GroupLayer(torch.randn(7, 5), LoraTerms(torch.randn(2, 5), torch.randn(7, 2))),
}
narrow = GroupLayer(torch.randn(4, 6), LoraTerms(torch.randn(2, 6), torch.randn(4, 2)))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, r"activation 'relu' is unknown; choose one of 'silu', 'gelu_tanh'"),
        ({"up": narrow}, ValueError, r"up: weight has shape \[4, 6\] but gate's \[5, 6\]"),
        ({"up": good["up"]._replace(weight=good["up"].weight.T)}, ValueError, r"up: weight has shape \[6, 5\]"),
        ({"gate": good["gate"]._replace(dropout_p=-0.1)}, ValueError, r"gate: dropout_p is -0.1"),
        ({"down": good["gate"]}, ValueError, r"down: A has shape \[2, 6\] and x \[4, 5\]"),
        ({"down": good["down"]._replace(weight=torch.randn(7, 5).double())}, TypeError, r"down: weight is torch.float"),
        (
            {"down": good["down"]._replace(weight=torch.randn(7, 5, requires_grad=True))},
            ValueError,
            r"down: weight requires a gradient, but the base is frozen here",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_mlp(x, **{**good, **changed})


@pytest.mark.skipif(not ops.native_status().loaded, reason=f"no extension: {ops.native_status().reason}")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "fp32 on bf16"])
@pytest.mark.parametrize(("rows", "d_in", "d_ff"), [(700, 70, 130), (1, 576, 640)])
def test_same_bits_by_chunks_and_by_layers(rows: int, d_in: int, d_ff: int, dtypes: str, recompute: bool) -> None:
    """700 rows are three chunks: up to three threads take chunks through the whole MLP, four go layer by layer."""
    flat = mlp("everything", (rows,), d_in, d_ff, *DTYPES[dtypes])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(results(lora_mlp, tracked(flat), gradient_of(flat), dropout_p=0.2, recompute=recompute))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name in found[0] if not torch.equal(found[0][name], other[name])] == []


@pytest.mark.skipif(not ops.native_status().loaded, reason=f"no extension: {ops.native_status().reason}")
@pytest.mark.parametrize(
    ("rows", "d_in", "d_ff", "down_r", "dtype", "base"),
    [
        (300, 64, 128, 300, torch.float32, torch.float32),
        (300, 16, 64, 4, torch.float32, torch.float32),
        (300, 16, 64, 4, torch.float32, torch.bfloat16),
        (24, 63, 2049, 4, torch.float64, torch.float64),
    ],
)
def test_same_bits_where_layers_are_made_by_other_loops(
    rows: int, d_in: int, d_ff: int, down_r: int, dtype: torch.dtype, base: torch.dtype
) -> None:
    """Some of the layers are too narrow for mbf's own products, or of too high a rank; columns are no whole vectors."""
    flat = mlp("plain", (rows,), d_in, d_ff, dtype, base, ranks=(12, 3, down_r))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(results(lora_mlp, tracked(flat), gradient_of(flat)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name in found[0] if not torch.equal(found[0][name], other[name])] == []


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_far_below_zero_close(activation: str, dtype: torch.dtype) -> None:
    """One layer's worth: gate is x itself, up 1 and down the identity."""
    x = torch.tensor([-3e38, -1e20, -1e5, -90.0, -88.5, -20.0, 0.0, 20.0, 1e5], dtype=dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    none = LoraTerms(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
    up = GroupLayer(0 * one, none, bias=one[0])
    y = lora_mlp(x, GroupLayer(one, none), up, GroupLayer(one, none), activation=activation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    wanted = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    (slope,) = torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(dx.double(), slope.nan_to_num(0.0), rtol=2e-6, atol=1e-30)
