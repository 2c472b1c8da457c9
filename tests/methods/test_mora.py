"""MoRA: dW of the square matrix, its linearity, rank and budget, both kinds on odd widths, both merges, what ships."""

import math

import pytest
import torch

import mbf
from mbf.methods.mora import plain_lora, update
from mbf.ops import mora_size
from tests.continual.tiny import base_model, logits, peft_model, train
from tests.methods.plain import WIDTHS, begin, end, method

KINDS = (1, 6)
# d_out, d_in, q: q divides both; x is padded; the output is repeated; it is cut off, twice; one chunk of q > d_in.
SHAPES = ((24, 24, 8), (24, 40, 12), (33, 17, 10), (9, 29, 6), (9, 29, 12), (7, 5, 16))


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def turn(i, q):
    """R_i ``[q, q]``: the pair (j, j + q/2) turned by i · 10000^(−2j/q)."""
    R = torch.zeros(q, q, dtype=torch.float64)
    for j in range(q // 2):
        angle = i * 10000 ** (-2 * j / q)
        R[j, j] = R[j + q // 2, j + q // 2] = math.cos(angle)
        R[j, j + q // 2], R[j + q // 2, j] = -math.sin(angle), math.sin(angle)
    return R


def dense(M, d_out, d_in, kind):
    """dW entry by entry: output o takes row o mod q of the chunk that it lies in, and of x every place k as often as
    the chunks hold it."""
    q = len(M)
    dW = torch.zeros(d_out, d_in, dtype=torch.float64)
    count = -(-d_in // q)
    blocks = [M @ turn(i, q) if kind == 6 else M for i in range(count)]
    for o in range(d_out):
        for place in range(count * q):
            i, j = divmod(place, q)
            if kind == 1 or o % (count * q) // q == i:
                dW[o, place % d_in] += blocks[i][o % q, j]
    return dW


def trained(i, tensors=None, **options):
    """A rule inside task i, every task's M random; ``tensors`` collects them."""
    rule = method("mora", **options)
    for task in range(1, i + 1):
        begin(rule, task)
        for M in rule.learned["M"]:
            M.data.normal_()
        if tensors is not None:
            tensors.append([M.detach().clone() for M in rule.learned["M"]])
        if task < i:
            end(rule, task)
    return rule


def deltas(rule):
    return [layer.delta() for layer in rule.layers]


def close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_out", "d_in", "q"), SHAPES)
def test_i_and_vi_dw_by_columns_is_the_forward_where_q_divides_pads_repeats_or_cuts(d_out, d_in, q, kind):
    M = draw(q, q)
    torch.testing.assert_close(update(M, d_out, d_in, kind), dense(M, d_out, d_in, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_i_the_layers_compute_it(kind):
    tensors = []
    rule = trained(1, tensors, kind=kind)
    wanted = [dense(M.double(), *width, kind).float() for M, width in zip(tensors[0], WIDTHS, strict=True)]
    close(deltas(rule), wanted)
    end(rule, 1)
    close(deltas(rule), wanted)


def test_i_the_adapter_s_own_factors_and_scale_have_no_part():
    rule = trained(2)
    before = deltas(rule)
    for layer in rule.layers:
        layer.A.data.normal_()
        layer.B.data.normal_()
        layer.scale *= 3
    assert all(torch.equal(a, b) for a, b in zip(before, deltas(rule), strict=True))
    assert rule.trains(1) == rule.trains(2) == (False, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_out", "d_in", "q"), SHAPES)
def test_ii_the_merge_of_m_is_the_merge_of_dw(d_out, d_in, q, kind):
    M, other = draw(q, q), draw(q, q)
    merged = 0.3 * update(M, d_out, d_in, kind) + 0.7 * update(other, d_out, d_in, kind)
    torch.testing.assert_close(update(0.3 * M + 0.7 * other, d_out, d_in, kind), merged)


@pytest.mark.parametrize("kind", KINDS)
def test_ii_merging_is_slao_s_recursion_of_dw(kind):
    rule = method("mora", merge="slao", kind=kind)
    merged = [torch.zeros(width) for width in WIDTHS]
    for i in range(1, 5):
        begin(rule, i)
        for M in rule.learned["M"]:
            M.data.normal_()
        merged = [m + (new - m) / math.sqrt(i) for m, new in zip(merged, deltas(rule), strict=True)]
        end(rule, i)
        close(deltas(rule), merged)


def test_ii_slao_trains_on_from_the_last_m_and_plain_mora_from_its_own():
    for merge in ("slao", "none"):
        tensors = []
        rule = trained(3, tensors, merge=merge)
        end(rule, 3)
        begin(rule, 4)
        assert all(torch.equal(M, last) for M, last in zip(rule.learned["M"], tensors[-1], strict=True))
        assert ("last" in rule.state) == (merge == "slao")


def test_the_view_inside_a_task_is_what_the_end_of_it_keeps():
    rule = trained(3, merge="slao")
    layers = list(enumerate(rule.layers))
    view = [rule.merged_terms(layer, n, 3, None).M for n, layer in layers]
    half = [rule.merged_terms(layer, n, 3, 0.5).M for n, layer in layers]
    close(half, [(kept + M) / 2 for kept, M in zip(rule.state["M"], rule.learned["M"], strict=True)])
    end(rule, 3)
    close(view, rule.state["M"])
    rule = trained(1)
    with pytest.raises(ValueError, match="merges without a weight"):
        rule.merged_terms(rule.layers[0], 0, 1, 0.5)


def test_iii_where_q_divides_a_square_dw_kind_6_is_block_diagonal_of_full_rank():
    d, q = 24, 8
    M = draw(q, q)
    dW = update(M, d, d, 6)
    torch.testing.assert_close(dW, torch.block_diag(*[M @ turn(i, q) for i in range(d // q)]))
    assert torch.linalg.matrix_rank(dW) == d
    assert torch.linalg.matrix_rank(update(M, d, d, 1)) == q


def test_iv_the_first_task_starts_from_the_base_and_m_can_learn():
    rule = method("mora")
    begin(rule, 1)
    assert not any(bool(delta.any()) for delta in deltas(rule))
    x = torch.randn(3, 40)
    torch.stack([layer(x[:, : layer.A.shape[1]]).square().sum() for layer in rule.layers]).sum().backward()
    assert all(bool(M.grad.any()) for M in rule.learned["M"])


@pytest.mark.parametrize("kind", KINDS)
def test_v_m_has_the_parameters_of_the_lora(kind):
    for d_out, d_in, r in ((576, 576, 8), (1536, 576, 16), (4096, 4096, 8), (192, 576, 8)):
        q = mora_size(d_out, d_in, r, kind)
        assert abs(q * q / ((d_out + d_in) * r) - 1) < 0.01
    rule = method("mora", kind=kind)
    begin(rule, 1)
    sizes = [mora_size(*width, 4, kind) for width in WIDTHS]
    assert [tuple(M.shape) for M in rule.learned["M"]] == [(q, q) for q in sizes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_out", "d_in", "q"), SHAPES)
def test_a_plain_lora_is_exact_and_no_larger_than_it_must_be(d_out, d_in, q, kind):
    M = draw(q, q)
    A, B = plain_lora(M, d_out, d_in, kind)
    torch.testing.assert_close(B @ A, dense(M, d_out, d_in, kind))
    assert len(A) == min(d_out, d_in, q if kind == 1 else d_out)


@pytest.mark.parametrize("kind", KINDS)
def test_what_ships_is_what_computes(kind):
    rule = trained(2, merge="slao", kind=kind)
    end(rule, 2)
    shipped = rule.shipped()
    close([layer.scale * B @ A for layer, A, B in zip(rule.layers, shipped.A, shipped.B, strict=True)], deltas(rule))


@pytest.mark.parametrize("merge", ["none", "slao"])
def test_a_learner_is_saved_after_its_first_task(merge, tmp_path):
    model = peft_model()
    learner = mbf.ContinualLora(model, "mora", merge=merge)
    with learner.task("one"):
        train(model, 1)
    learner.save(tmp_path / "learner")
    loaded = mbf.ContinualLora.load(base_model(), tmp_path / "learner")
    assert torch.equal(logits(loaded.model), logits(model))
