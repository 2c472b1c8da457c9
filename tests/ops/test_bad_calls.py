"""What no operator may be given: an error that names the argument from the faces, no crash from the raw operators.

Every public function of ``mbf.ops`` has its bad calls here; a new one without them fails the first test. The C++ behind
the raw operators is tried at random, and under sanitizers, by tests/sanitize.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mbf import ops
from mbf.ops import GroupLayer, LoraTerms, native_status

native = pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")

x, y = torch.randn(4, 6), torch.randn(4, 5)
W, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
Ea, Eb, M = torch.randn(3, 2), torch.randn(5, 3), torch.randn(4, 4)
layer = GroupLayer(W, LoraTerms(A, B))
down = GroupLayer(torch.randn(6, 5), LoraTerms(torch.randn(2, 5), torch.randn(6, 2)))

BRANCH = {"A": A, "B": B, "gate": torch.ones(2), "mix": torch.eye(2), "merged_B": B.clone(), "merge_weight": 0.5}
GOOD: dict[str, dict[str, Any]] = {
    "lora_linear": {"x": x, "weight": W, "bias": torch.ones(5), **BRANCH},
    "lora_accumulate": {"y": y, "x": x, **BRANCH},
    "lilora_accumulate": {"y": y, "x": x, "A": A, "B": B, "Ea": Ea, "Eb": Eb, "weight": 0.5},
    "mora_accumulate": {"y": y, "x": x, "M": M},
    "frozen_linear": {"x": x, "weight": W, "bias": torch.ones(5)},
    "orthonormal_rows": {"A": A},
    "rsvd": {"matrix_or_factors": W, "rank": 2},
}
# What each public function refuses: the arguments that differ from GOOD or all of them, the error, and its words.
NOT_FINITE = (math.nan, math.inf, -math.inf)
BAD: dict[str, list[tuple[dict[str, Any], type[Exception], str]]] = {
    "lora_linear": [
        *(({"scale": s}, ValueError, r"^scale: got") for s in NOT_FINITE),
        *(({"scale": s}, TypeError, r"^scale: got") for s in (1j, "2", None, [1.0])),
        ({"scale": torch.tensor(1)}, TypeError, "scale is a torch.int64 tensor"),
        *(({"dropout_p": p}, ValueError, "dropout_p is") for p in (-0.1, 1.0, math.nan, math.inf)),
        *(({"dropout_p": p}, TypeError, "^dropout_p: got") for p in (None, "0.1", [0.1])),
        *(({"dropout_p": 0.5, "seed": s}, ValueError, "seed is") for s in (2**63, -(2**63) - 1, 2**70)),
        *(({"dropout_p": 0.5, "seed": s}, TypeError, "^seed: got") for s in (1.5, "1")),
        *(({"merge_weight": w}, TypeError, "^merge_weight: got") for w in ("1", 1j, [0.5])),
        *(({"merge_weight": w}, ValueError, "^merge_weight: got") for w in NOT_FINITE),
        ({"weight": W.int(), "x": x.int()}, TypeError, "x is torch.int32"),
        ({"weight": W.to(torch.float8_e4m3fn), "x": x.to(torch.float8_e4m3fn)}, TypeError, "x is torch.float8_e4m3fn"),
        ({"A": A.to(torch.float8_e4m3fn), "B": B.to(torch.float8_e4m3fn)}, TypeError, "A is torch.float8_e4m3fn"),
    ],
    "lora_accumulate": [
        ({"y": y[:3]}, ValueError, "y has shape"),
        ({"x": x.int()}, TypeError, "x is torch.int32"),
        ({"scale": math.nan}, ValueError, "^scale: got"),
    ],
    "lilora_accumulate": [
        *(({name: v}, ValueError, f"^{name}: got") for name in ("weight", "scale") for v in NOT_FINITE),
        *(({name: v}, TypeError, f"^{name}: got") for name in ("weight", "scale") for v in ("1", 1j, None)),
        ({"x": x.int()}, TypeError, "x is torch.int32"),
    ],
    "mora_accumulate": [
        *(({"scale": s}, ValueError, "^scale: got") for s in NOT_FINITE),
        *(({"scale": s}, TypeError, "^scale: got") for s in ("1", None, 1j)),
        ({"scale": torch.tensor(1)}, TypeError, "scale is a torch.int64 tensor"),
        *(({"kind": k}, ValueError, "kind is") for k in (None, 2, -1, [6])),
        ({"M": M[:3, :3]}, ValueError, "q must be even"),
    ],
    "frozen_linear": [
        ({"x": x.int(), "weight": W.int(), "bias": None}, TypeError, "x is torch.int32"),
        ({"weight": W.clone().requires_grad_()}, ValueError, "weight requires a gradient"),
    ],
    "lora_group": [
        ({"x": x, "layers": layers}, error, words)
        for layers, error, words in (
            ([], ValueError, "layers is empty"),
            (5, TypeError, "layers: got int"),
            (layer, TypeError, r"layers\[0\]: got Tensor"),
            ([layer, None], TypeError, r"layers\[1\]: got NoneType"),
            ([layer._replace(weight=[1])], TypeError, r"layers\[0\]: weight: got list"),
            ([layer, layer._replace(bias=[1])], TypeError, r"layers\[1\]: bias: got list"),
            ([layer._replace(terms=(A, B))], TypeError, r"layers\[0\]: terms: got tuple"),
            ([layer._replace(terms=LoraTerms(A, [1]))], TypeError, r"layers\[0\]: B: got list"),
            ([layer._replace(terms=LoraTerms(A, B, math.nan))], ValueError, r"layers\[0\]: scale: got nan"),
            ([layer._replace(dropout_p=math.nan)], ValueError, r"layers\[0\]: dropout_p is nan"),
        )
    ]
    + [({"x": [1.0], "layers": [layer]}, TypeError, "^x: got list")],
    "lora_mlp": [
        ({"x": x, "gate": gate, "up": up, "down": of, "activation": activation}, error, words)
        for gate, up, of, activation, error, words in (
            (None, layer, down, "silu", TypeError, "gate: got NoneType"),
            (layer, layer._replace(weight=None), down, "silu", TypeError, "up: weight: got NoneType"),
            (layer, layer, down._replace(terms=3), "silu", TypeError, "down: terms: got int"),
            (layer, layer, down, ["silu"], ValueError, r"activation \['silu'\] is unknown"),
            (layer, layer, down, None, ValueError, "activation None is unknown"),
        )
    ]
    + [({"x": None, "gate": layer, "up": layer, "down": down}, TypeError, "^x: got NoneType")],
    "orthonormal_rows": [
        *(({"A": bad}, TypeError, "^A: got") for bad in ("A", None, 3)),
        ({"A": [A, None]}, TypeError, r"^A\[1\]: got NoneType"),
        ({"A": A[0]}, ValueError, "^A: has shape"),
        ({"A": torch.empty(0, 3)}, ValueError, "r is 0"),
        ({"A": torch.empty(1).expand(2**31 + 8, 4)}, ValueError, "r is 2147483656"),
    ],
    "rsvd": [
        *(({"rank": r}, ValueError, "^rank is") for r in (0, -1, -(2**63), 6, 2**62)),
        *(({"rank": r}, TypeError, "^rank: got") for r in (2.0, None, "1")),
        *(({name: v}, ValueError, f"^{name} is") for name in ("n_iter", "oversample") for v in (-1, 2**62)),
        *(({name: v}, TypeError, f"^{name}: got") for name in ("n_iter", "oversample") for v in (1.5, None)),
        ({"generator": 3}, TypeError, "^generator: got int"),
        ({"matrix_or_factors": (W,)}, TypeError, "^matrix_or_factors: is a tuple of 1"),
        ({"matrix_or_factors": [W, [1]]}, TypeError, r"^matrix_or_factors\[1\]: got list"),
        ({"matrix_or_factors": (B, A.double())}, ValueError, "they must agree"),
    ],
    "merge_": [
        ({"merged": [x.clone()], "finetuned": [x], "weight": 0.5, **changed}, error, words)
        for changed, error, words in (
            ({"merged": None}, TypeError, "^merged: got NoneType"),
            ({"finetuned": "ab"}, TypeError, "^finetuned: got str"),
            ({"finetuned": [None]}, TypeError, r"^finetuned\[0\]: got NoneType"),
            ({"merged": [x.to_sparse()]}, TypeError, r"^merged\[0\]: is torch.sparse_coo"),
            *(({"weight": w}, TypeError, "^weight: got") for w in ("a", 1j, None, [1])),
            *(({"weight": w}, ValueError, "^weight: got") for w in NOT_FINITE),
            ({"merged": [x[:1].expand(4, 6)]}, ValueError, r"merged\[0\]: several of its elements are one"),
            ({"merged": [x.flatten().as_strided((4, 6), (2, 1))]}, ValueError, r"merged\[0\]: several of its elements"),
            ({"merged": [x[:3]], "finetuned": [x[1:]]}, ValueError, r"merged\[0\]: shares memory with finetuned\[0\]"),
            (
                {"merged": [x[:3], x[1:]], "finetuned": [torch.ones(3, 6)] * 2},
                ValueError,
                r"merged\[1\]: shares memory with merged\[0\]",
            ),
            (
                {"merged": [x[:, :4], x[:, 3:]], "finetuned": [torch.ones(4, 4), torch.ones(4, 3)]},
                ValueError,
                r"merged\[1\]: shares memory with merged\[0\]",
            ),
            (
                {"merged": [x, A], "finetuned": [torch.ones(4, 6), x[:2]]},
                ValueError,
                r"merged\[0\]: is the same memory as finetuned\[1\]",
            ),
        )
    ],
    "task_boundary_": [
        ({"merged": None, "finetuned": ([A], [B]), "weight": 0.5}, TypeError, "^merged: got NoneType"),
        ({"merged": ([A],), "finetuned": ([A], [B]), "weight": 0.5}, TypeError, "^merged: got 1 entries"),
        ({"merged": ([A], [B]), "finetuned": ([A], [B]), "weight": "1"}, TypeError, "^weight: got str"),
        (
            {"merged": ([A[:, :5]], [B]), "finetuned": ([A[:, 1:]], [B.clone()]), "weight": 0.5},
            ValueError,
            r"merged\[0\]: shares memory with finetuned\[0\]",
        ),
    ],
    "dropout_mask": [
        ({"seed": 1, "shape": shape, "p": 0.5}, error, "^shape")
        for shape, error in (([-1], ValueError), (None, TypeError), ("ab", TypeError), ([1.5], TypeError))
    ]
    + [
        ({"seed": None, "shape": [3], "p": 0.5}, TypeError, "^seed: got NoneType"),
        ({"seed": 1, "shape": [3], "p": None}, TypeError, "^dropout_p: got NoneType"),
        ({"seed": 2**63, "shape": [3], "p": 0.5}, ValueError, "^seed is"),
    ],
    "draw_seed": [({"device": "nowhere"}, RuntimeError, "device")],
    "mora_size": [
        ({"d_out": 3, "d_in": 2, "r": 1, **changed}, error, words)
        for changed, error, words in (
            ({"d_out": -3}, ValueError, "^d_out is -3"),
            ({"d_in": "3"}, TypeError, "^d_in: got str"),
            ({"r": 1.5}, TypeError, "^r: got float"),
            ({"kind": "a"}, ValueError, "^kind is 'a'"),
        )
    ],
    "use_backend": [({"name": name}, ValueError, "backend .* is unknown") for name in (None, "cuda", ["auto"])],
}


def public() -> set[str]:
    """Functions and context managers that take arguments; a reference is its formula in plain torch, no more."""
    names = {name for name in ops.__all__ if callable(getattr(ops, name)) and not name.endswith(("_ref", "_ref_"))}
    types = {name for name in names if inspect.isclass(getattr(ops, name)) and name != "use_backend"}
    return {name for name in names - types if inspect.signature(getattr(ops, name)).parameters}


def test_every_public_function_has_its_bad_calls() -> None:
    assert set(BAD) == public()
    assert set(ops._library._NOT_STRIDED) >= {"SparseCPU", "SparseCsrCPU"}  # type: ignore[attr-defined]


def calls() -> list[Any]:
    return [
        pytest.param(name, GOOD.get(name, {}) | changed, error, words, id=f"{name}-{n}")
        for name, cases in BAD.items()
        for n, (changed, error, words) in enumerate(cases)
    ]


def values(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments.to_dense().detach().clone()]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    return [v for a in arguments for v in values(a)] if isinstance(arguments, (list, tuple, type({}.values()))) else []


@pytest.mark.parametrize(("name", "arguments", "error", "words"), calls())
def test_bad_calls(name: str, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    small = {key: value for key, value in arguments.items() if getattr(value, "shape", (0,))[:1] != (2**31 + 8,)}
    before = values(small)
    with pytest.raises(error, match=words):
        getattr(ops, name)(**arguments)
    for was, now in zip(before, values(small), strict=True):
        torch.testing.assert_close(now, was, equal_nan=True)


# -- every tensor of every function ------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "str": lambda t: "tensor",
    "array": lambda t: t.numpy(),
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "one axis more": lambda t: t.new_ones(1, *t.shape, 1),
    "one axis less": lambda t: t[0, ..., :-1] if t.dim() > 1 else t[:0],
    "longer": lambda t: torch.cat([t, t, t], -1),
    "empty": lambda t: t[..., :0],
    "beyond 2^31": lambda t: t.new_ones(()).expand(*t.shape[:-1], 2**31 + 8),
}
TENSORS = [(name, key) for name, given in GOOD.items() for key, value in given.items() if isinstance(value, Tensor)]
OPTIONAL = ("bias", "gate", "mix")
RIGHT = {  # what is no mistake, and beyond 2^31 too large to be computed
    *((name, key, "beyond 2^31") for name, key in (("rsvd", "matrix_or_factors"), ("orthonormal_rows", "A"))),
    ("rsvd", "matrix_or_factors", "one axis more"),
    ("rsvd", "matrix_or_factors", "longer"),
    ("orthonormal_rows", "A", "longer"),
    *(("mora_accumulate", key, how) for key in ("y", "x") for how in ("longer", "empty", "beyond 2^31")),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_every_tensor_of_every_function(name: str, key: str, backend: Any) -> None:
    """The error has the argument's name in it; with the other arguments' it may be among several."""
    for how, change in WRONG.items():
        tensor = GOOD[name][key]
        if (how == "None" and key in OPTIONAL) or (name, key, how) in RIGHT:
            continue
        if how == "sparse" and backend == "reference" and name not in ("rsvd", "orthonormal_rows"):
            continue  # plain torch's own errors
        with ops.use_backend(backend), pytest.raises((TypeError, ValueError)) as caught:
            getattr(ops, name)(**GOOD[name] | {key: change(tensor)})
        assert key in str(caught.value), f"{name}, {key} {how}: {caught.value}"


def test_seeds_of_any_sign_and_size_make_a_mask() -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        assert ops.dropout_mask(seed, (40,), 0.5).shape == (40,)


# -- memory in common --------------------------------------------------------------------------------------------------


def test_what_may_share_memory() -> None:
    """A tensor as its own partner, the columns of one matrix, what has no elements, and what is on meta."""
    same = torch.randn(4, 6)
    expected = same.clone()
    ops.merge_([same], [same], 0.3)
    assert torch.equal(same, expected)
    matrix, of = torch.zeros(4, 6), torch.ones(4, 3)
    ops.merge_([matrix[:, :3], matrix[:, 3:]], [of, of], 1.0)
    assert matrix.sum() == 24
    empty, meta = torch.empty(0, 3), torch.empty(3, 3, device="meta")
    ops.merge_([empty, empty], [empty, empty], 0.5)
    ops.merge_([meta, meta.clone()], [meta, meta], 0.5)
    flat = torch.zeros(24)
    ops.merge_([flat[0::2], flat[1::2]], [torch.ones(12), torch.full((12,), 2.0)], 1.0)
    assert flat[:4].tolist() == [1.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_blocks_of_columns_share_memory_where_an_element_is_in_both(backend: str) -> None:
    """All pairs of two rows of columns of a matrix that is 5 wide, also of those that go on in the next row."""
    flat = torch.zeros(25)
    blocks = [(width, offset) for width in (1, 2, 4, 5) for offset in range(15)]
    views = [flat.as_strided((2, width), (5, 1), offset) for width, offset in blocks]
    elements = [{offset + 5 * row + n for row in (0, 1) for n in range(width)} for width, offset in blocks]
    with ops.use_backend(backend):
        for one, its in zip(views, elements, strict=True):
            for other, others in zip(views, elements, strict=True):
                pair = [one, other]
                with pytest.raises(ValueError, match="memory") if its & others else nullcontext():
                    ops.merge_(pair, [torch.zeros_like(view) for view in pair], 0.5)


# -- no elements -------------------------------------------------------------------------------------------------------

EMPTY = [(0, 5, 4, 2), (3, 0, 4, 2), (3, 5, 0, 2), (3, 5, 4, 0), (0, 0, 0, 0), (3, 0, 0, 2), (1, 0, 4, 0)]


def outcome(function: Callable[..., Any], tensors: dict[str, Tensor], terms: dict[str, Any]) -> list[Tensor]:
    """What it returns and every gradient."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    found = function(**leaves, **terms)
    (found.sum() + sum(leaf.sum() for leaf in leaves.values())).backward()
    return [found.detach(), *(leaf.grad for leaf in leaves.values())]  # type: ignore[list-item]


def linear_layers(x: Tensor, A: Tensor, B: Tensor, function: Any, **terms: Any) -> Tensor:
    weight = torch.ones(B.shape[0], x.shape[-1], dtype=x.dtype)
    one = GroupLayer(weight, LoraTerms(A, B))
    return torch.cat(list(function(x, [one, one], **terms)), -1)


def mlp_layers(x: Tensor, A: Tensor, B: Tensor, function: Any, **terms: Any) -> Tensor:
    one = GroupLayer(torch.ones(B.shape[0], x.shape[-1], dtype=x.dtype), LoraTerms(A, B))
    back = GroupLayer(torch.ones(3, B.shape[0], dtype=x.dtype), LoraTerms(B.T, torch.ones(3, A.shape[0]).to(x.dtype)))
    return function(x, one, one, back, **terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("rows", "d_in", "d_out", "r"), EMPTY)
def test_no_elements(rows: int, d_in: int, d_out: int, r: int, p: float, dtype: torch.dtype) -> None:
    """Sizes of zero, in which an extension once divided by one, give what the formula gives, gradients too."""
    shapes = {"x": (rows, d_in), "A": (r, d_in), "B": (d_out, r)}
    given = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    base = {"y": torch.ones(rows, d_out, dtype=dtype)}
    inner = {"Ea": torch.ones(2, r, dtype=dtype), "Eb": torch.ones(d_out, 2, dtype=dtype)}
    weight, square = torch.ones(d_out, d_in, dtype=dtype), {"x": given["x"], "M": torch.ones(2, 2, dtype=dtype)}
    dropout = {"dropout_p": p, "seed": 1} if p else {}
    every: list[tuple[Any, Any, dict[str, Tensor], dict[str, Any]]] = [
        (
            ops.lora_linear,
            ops.lora_linear_ref,
            given | {"weight": weight},
            {"mix": torch.ones(r, r).to(dtype), **dropout},
        ),
        (ops.lora_accumulate, ops.lora_accumulate_ref, base | given, {"gate": torch.ones(r).to(dtype), **dropout}),
        (ops.lilora_accumulate, ops.lilora_accumulate_ref, base | given | inner, {"weight": 0.5, **dropout}),
        (ops.mora_accumulate, ops.mora_accumulate_ref, base | square, dropout),
    ]
    if not p:
        every.append((ops.frozen_linear, ops.frozen_linear_ref, {"x": given["x"]}, {"weight": weight}))
        for layers, name in ((linear_layers, "lora_group"), (mlp_layers, "lora_mlp")):
            faces = [{"function": getattr(ops, name + end)} for end in ("", "_ref")]
            assert_alike(outcome(layers, given, faces[0]), outcome(layers, given, faces[1]), name)
    for function, reference, tensors, terms in every:
        assert_alike(outcome(function, tensors, terms), outcome(reference, tensors, terms), function.__name__)


def assert_alike(found: list[Tensor], expected: list[Tensor], name: str) -> None:
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, n=n: f"{name}, {n}: {text}")


def test_sizes_beyond_2_to_31_without_elements() -> None:
    """No size is taken for 32 bits, though nothing is that large in memory."""
    long = 2**33 + 8
    assert ops.frozen_linear(torch.empty(0, long), torch.zeros(1).expand(4, long)).shape == (0, 4)
    assert ops.frozen_linear(torch.empty(long, 0), torch.empty(0, 0)).shape == (long, 0)
    assert ops.dropout_mask(1, (0, long), 0.5).shape == (0, long)
    A, B = torch.empty(0, long), torch.empty(4, 0)
    assert ops.lora_linear(torch.empty(0, long), torch.zeros(1).expand(4, long), A, B).shape == (0, 4)
    with pytest.raises(RuntimeError):
        ops.dropout_mask(1, (2**40, 2**40), 0.5)


# -- the raw operators -------------------------------------------------------------------------------------------------

raw = torch.ops.mbf
fp64 = torch.tensor(0.5, dtype=torch.float64)
ROWS = torch.randn(2, 6)
PLAIN = (A, B, 1.0, None, None, 0.0, None, None, None)
LISTS = ([A], [B], [1.0], [None], [None], [0.0], [None], [None], [None])
MLP = tuple([*column] for column in zip(PLAIN, PLAIN, (*down.terms[:2], *PLAIN[2:]), strict=True))
WEIGHTS, NONE3, hs = [W, W, down.weight], [None] * 3, [torch.ones(4, 2)] * 3
NEEDS = [True] * 9


def of(place: int, value: Any, of: tuple[Any, ...] = PLAIN) -> tuple[Any, ...]:
    return (*of[:place], value, *of[place + 1 :])


REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("lora_linear", (x, W[:, :5], None, *PLAIN), r"weight has shape \[5, 5\]; it must be \[any, 6\]"),
    ("lora_linear", (x, W.bfloat16(), None, *PLAIN), "weight is BFloat16; it must be Float"),
    ("lora_linear", (x.int(), W.int(), None, *PLAIN), r"x is Int \[4, 6\]"),
    ("lora_linear", (torch.ones(()), W, None, *PLAIN), r"x has shape \[\]"),
    ("lora_linear", (x, W, torch.ones(4), *PLAIN), r"bias has shape \[4\]; it must be \[5\]"),
    ("lora_linear", (x, W, torch.ones(5, 1), *PLAIN), r"bias has shape \[5, 1\]"),
    ("lora_linear", (x, W, None, *of(0, A[:, :5])), r"A has shape \[2, 5\]"),
    ("lora_linear", (x, W, None, *of(1, B[:4])), r"B has shape \[4, 2\]"),
    ("lora_linear", (x, W, None, *of(1, B.double())), "B is Double"),
    ("lora_linear", (x, W, None, *of(3, torch.ones(3))), r"gate has shape \[3\]"),
    ("lora_linear", (x, W, None, *of(3, torch.ones(1, 4, 2))), r"gate has shape \[1, 4, 2\]"),
    ("lora_linear", (x, W, None, *of(4, torch.ones(2, 3))), r"mix has shape \[2, 3\]"),
    ("lora_linear", (x, W, None, *of(5, 0.5)), "seed is absent"),
    ("lora_linear", (x, W, None, *of(6, torch.ones(0).long(), of(5, 0.5))), r"seed is Long \[0\]"),
    ("lora_linear", (x, W, None, *of(5, math.nan)), "dropout_p is nan"),
    ("lora_linear", (x, W, None, *of(5, 1e30)), "dropout_p is 1"),
    ("lora_linear", (x, W, None, *of(7, B)), "merge_weight is absent"),
    ("lora_linear", (x, W, None, *of(8, fp64)), "merged_B is absent"),
    ("lora_linear", (x, W, None, *of(8, torch.ones(0), of(7, B))), r"merge_weight has shape \[0\]"),
    ("lora_linear_backward", (y, torch.ones(4, 2), x, W, *PLAIN, [True]), "needs has 1 entries; it must have 9"),
    ("lora_linear_backward", (y, torch.ones(3, 2), x, W, *PLAIN, NEEDS), r"h has shape \[3, 2\]"),
    ("lora_linear_backward", (y, torch.ones(4, 2).double(), x, W, *PLAIN, NEEDS), "h is Double"),
    ("lora_linear_backward", (y, torch.ones(4, 2), x[:3], W, *PLAIN, NEEDS), r"x has shape \[3, 6\]"),
    ("lora_linear_backward", (y[:, :4], torch.ones(4, 2), x, W, *PLAIN, NEEDS), r"dy has shape \[4, 4\]|B has shape"),
    ("lora_accumulate", (y[:3], x, *PLAIN), r"y has shape \[3, 5\]"),
    ("lora_accumulate_backward", (y, torch.ones(4, 1), x, *PLAIN, [True] * 7), r"h has shape \[4, 1\]"),
    ("lora_group", (x, [], [], *([] for _ in LISTS)), "weights is empty"),
    ("lora_group", (x, [W], [], *LISTS), "biases has 0 entries; it must have 1"),
    ("lora_group", (x, [W], [None], *of(2, [], LISTS)), "scales has 0 entries"),
    ("lora_group", (x, [W], [None], *of(0, [A[:1]], LISTS)), r"B\[0\] has shape \[5, 2\]"),
    ("lora_group_backward", ([None], [hs[0]], x, [W], *LISTS, [True] * 7), "dys has no gradient"),
    ("lora_group_backward", ([y], [], x, [W], *LISTS, [True] * 7), "hs has 0 entries"),
    ("lora_group_backward", ([y], [hs[0]], x, [W], *LISTS, [True] * 6), "needs has 6 entries; it must have 7"),
    ("lora_mlp", (x, WEIGHTS[:2], NONE3[:2], *(c[:2] for c in MLP), 0, True), "weights has 2 entries"),
    ("lora_mlp", (x, [W, W, W], NONE3, *MLP, 0, True), r"weights\[2\] has shape"),
    ("lora_mlp", (x, WEIGHTS, NONE3, *MLP, 2, True), "lora_mlp: activation is 2; it must be 0 for silu or 1 for gelu"),
    ("lora_mlp_backward", (x, x, y, y, hs, WEIGHTS, NONE3, *MLP, -1, [True] * 19), "backward: activation is -1"),
    ("lora_mlp_backward", (x, x, y[:3], y, hs, WEIGHTS, NONE3, *MLP, 0, [True] * 19), r"g has shape \[3, 5\]"),
    ("lora_mlp_backward", (x, x, y, y, hs[:2], WEIGHTS, NONE3, *MLP, 0, [True] * 19), "hs has 2 entries"),
    ("frozen_linear", (x, W[:, :5], None), "weight has shape"),
    ("frozen_linear", (x.double(), W, None), "weight is Float; it must be Double"),
    ("frozen_linear_backward", (y, W.T), "weight has shape"),
    ("lilora_accumulate", (y, x, A, B, Ea, Eb[:, :2], fp64, fp64, 0.0, None), r"Eb has shape \[5, 2\]"),
    ("lilora_accumulate", (y, x, A, B, Ea, Eb, torch.ones(0), fp64, 0.0, None), r"weight has shape \[0\]"),
    (
        "lilora_accumulate_backward",
        (y, torch.ones(4, 2), x, A, B, Ea, Eb, fp64, fp64, 0.0, None, [True]),
        "needs has 1 entries; it must have 7",
    ),
    ("mora_accumulate", (y, x, M[:, :3], 1, 1.0, 0.0, None), r"M has shape \[4, 3\]"),
    ("mora_accumulate", (y, x, M[:0, :0], 1, 1.0, 0.0, None), "M is empty"),
    ("mora_accumulate", (y, x, M[:3, :3], 6, 1.0, 0.0, None), "must be even"),
    ("mora_accumulate", (y, x, M, 2, 1.0, 0.0, None), "kind is 2"),
    ("mora_accumulate", (y, x, M, 1, 1.0, 0.5, None), "seed is absent"),
    ("mora_accumulate_backward", (y, x, M, -1, 1, 1.0, 0.0, None, [True, True]), "d_in is -1"),
    ("mora_accumulate_backward", (y, x, M, 7, 1, 1.0, 0.0, None, [True, True]), r"x has shape \[4, 6\]"),
    ("mora_accumulate_backward", (y, x, M, 6, 1, 1.0, 0.0, None, []), "needs has 0 entries"),
    ("merge_", ([x.clone()], [y], fp64), r"finetuned\[0\] is Float \[4, 5\]"),
    ("merge_", ([x.clone()], [x], fp64.float()), r"weight is Float \[\]"),
    ("merge_", ([x.int()], [x], fp64), r"merged\[0\] is Int"),
    ("merge_", ([x[:1].expand(4, 6)], [x], fp64), r"merged\[0\] is expanded"),
    ("merge_", ([x.flatten().as_strided((4, 6), (2, 1))], [x], fp64), r"merged\[0\] is expanded"),
    ("merge_with_norms_", ([x.clone()], [], fp64), "finetuned has 0 entries; it must have 1"),
    ("empty_like_all", ([x, A.int()],), r"like\[1\] is Int"),
    ("orthonormal_rows", ([A.int()],), r"A\[0\] is Int"),
    ("orthonormal_rows", ([A[0]],), r"A\[0\] is Float \[6\]"),
    ("orthonormal_rows", ([A.T],), r"r must lie in \[1, d\]"),
    ("merge_", ([x[:2], x[1:3]], [x[:2] + 1, x[:2] + 2], fp64), r"written\[0\] shares memory"),
    ("merge_", ([x[:, :2], x[:, 1:3]], [x[:, :2] + 1, x[:, :2] + 2], fp64), r"written\[0\] shares memory"),
    ("merge_with_norms_", ([x[:2]], [x[1:3]], fp64), r"written\[0\] shares memory"),
    ("task_boundary_", ([ROWS], [B.clone()], [ROWS], [A], [B], fp64), r"written\[0\] shares memory"),
    (
        "task_boundary_",
        ([A[:1].clone()], [B.clone()], [A.clone()], [A], [B], fp64),
        r"merged_A\[0\] has shape \[1, 6\]",
    ),
    ("task_boundary_", ([A.clone()], [B.clone()], [], [A], [B], fp64), "Q has 0 entries"),
    ("task_boundary_", ([x[None]], [B.clone()], [x[None]], [x[None]], [B], fp64), r"A\[0\] has shape \[1, 4, 6\]"),
    ("rsvd", ([W.int()], torch.ones(1).long(), 1, 0, 0), r"matrices\[0\] is Int"),
    ("rsvd", ([W], torch.ones(1).long(), 0, 0, 0), "rank is 0"),
    ("rsvd", ([W], torch.ones(1).long(), 6, 0, 0), r"rank is 6; it must lie in \[1, 5\]"),
    ("rsvd", ([W], torch.ones(2).long(), 1, 0, 0), "seeds is Long"),
    ("rsvd", ([W], torch.ones(1).long(), 1, -1, 0), "oversample is -1"),
    ("rsvd", ([W], torch.ones(1).long(), 1, 0, -1), "n_iter is -1"),
    ("rsvd", ([W], torch.ones(1).long(), 1, 0, 2**62), "n_iter is"),
    ("svd_factors", ([B], [A[:1]], 1), r"B\[0\] is Float \[5, 2\] and A Float \[1, 6\]"),
    ("svd_factors", ([B], [A.double()], 1), r"B\[0\] is Float; it must be Double"),
    ("svd_factors", ([B], [A], 3), r"rank is 3; it must lie in \[1, 2\]"),
    ("svd_factors", ([B, B], [A], 1), "B has 2 entries"),
]


@native
@pytest.mark.parametrize(
    ("name", "arguments", "words"), [pytest.param(*r, id=f"{n}-{r[0]}") for n, r in enumerate(REFUSED)]
)
def test_the_raw_operators_refuse(name: str, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=f"mbf::{name}: ({words})|{words}"):
        getattr(raw, name).default(*arguments)


@native
def test_what_is_written_may_be_its_own_partner_or_lie_between_others() -> None:
    whole, other = torch.randn(4, 6), torch.randn(4, 6)
    expected = torch.lerp(whole, other, 0.5)
    columns = [whole[:, ::2], whole[:, 1::2]]
    raw.merge_.default(columns, [other[:, ::2], other[:, 1::2]], torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(whole, expected)
    raw.merge_.default(columns, columns, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(whole, expected)


@native
def test_more_samples_than_memory_are_an_error() -> None:
    assert raw.rsvd.default([W], torch.ones(1).long(), 2, 2**63 - 1, 1)[0].shape == (5, 2)


@native
def test_what_lies_elsewhere_in_memory_is_read_where_it_lies() -> None:
    """h, g and u come packed from forward; from anywhere else they may not."""

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]

    dy, h, g, u = torch.randn(4, 6), torch.randn(4, 2), torch.randn(4, 5), torch.randn(4, 5)
    for name, arguments in {
        "lora_linear_backward": lambda at: (y, at(h), x, W, *PLAIN, NEEDS),
        "lora_accumulate_backward": lambda at: (y, at(h), x, *PLAIN, [True] * 7),
        "lora_group_backward": lambda at: ([y], [at(h)], x, [W], *LISTS, [True] * 7),
        "lora_mlp_backward": lambda at: (
            *(dy, x, at(g), at(u), [at(h)] * 3, WEIGHTS, NONE3),
            *(*MLP, 0, [True] * 19),
        ),
    }.items():
        operator = getattr(raw, name).default
        for found, expected in zip(operator(*arguments(strided)), operator(*arguments(torch.clone)), strict=True):
            assert found is expected is None or torch.equal(found, expected), name


@native
def test_gradients_that_cannot_be_are_absent() -> None:
    """Of operands that aren't there, and A's without x."""
    found = raw.lora_linear_backward.default(y, torch.ones(4, 2), None, W, *PLAIN, NEEDS)
    assert [gradient is not None for gradient in found] == [True, False, True, False, True, False, False, False, False]
