"""Leading singular triples of many matrices in one call, dense ones and products of thin factors.

Against ``torch.svd_lowrank`` and scikit-learn's ``randomized_svd`` of the same sketch width and power iterations, the
whole ``torch.linalg.svd``, and PEFT's ``add_weighted_adapter(combination_type="svd")``. Beside the times stands the
residual, over that of the best approximation. Script: ``python bench/rsvd.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, stdev

import torch
from contest import Contest, run_contests
from peft import LoraConfig, get_peft_model
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn

from mbf.ops import rsvd

RANK, OVERSAMPLE, ITERATIONS = 16, 8, 2
DRAWS = 64  # sketches whose residuals are averaged, with the standard error of the mean
Triple = tuple[Tensor, Tensor, Tensor]  # U, S, Vh
CASES: dict[str, tuple[str, tuple[int, ...]]] = {
    "16 dense [2048, 2048], rank 16": ("dense", (16, 2048, 2048)),
    "1 dense [2048, 2048], rank 16, beside the whole SVD": ("whole", (1, 2048, 2048)),
    "16 dense [2048, 512], rank 16": ("dense", (16, 2048, 512)),
    "112 dense [576, 1536], rank 16": ("dense", (112, 576, 1536)),
    "factors of [4096, 4096], 4 LoRAs of r 16": ("factors", (4096, 4096)),
    "2 dense [200, 300], rank 16": ("dense", (2, 200, 300)),
}
QUICK = ["2 dense [200, 300], rank 16"]


def lowrank(matrices: Sequence[Tensor]) -> list[Triple]:
    found = [torch.svd_lowrank(M, q=RANK + OVERSAMPLE, niter=ITERATIONS) for M in matrices]
    return [(U[:, :RANK], S[:RANK], V[:, :RANK].mT) for U, S, V in found]


def sklearns(matrices: Sequence[Tensor]) -> list[Triple]:
    options = {"n_components": RANK, "n_oversamples": OVERSAMPLE, "n_iter": ITERATIONS}
    found = [randomized_svd(M.numpy(), **options, random_state=0) for M in matrices]
    return [tuple(map(torch.from_numpy, triple)) for triple in found]


def whole(matrices: Sequence[Tensor]) -> list[Triple]:
    found = [torch.linalg.svd(M, full_matrices=False) for M in matrices]
    return [(U[:, :RANK], S[:RANK], Vh[:RANK]) for U, S, Vh in found]


def residual(matrix: Tensor, triple: Triple) -> float:
    """‖M − U S Vh‖ in fp64, Frobenius."""
    U, S, Vh = (part.double() for part in triple)
    return float(torch.linalg.vector_norm(matrix.double() - (U * S) @ Vh))


def dense(sizes: tuple[int, ...], exact: bool) -> Contest:
    """Spectra that fall as 1 / i, of which the tail beyond any rank is long."""
    count, m, n = sizes
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(d, k)).Q for d in (m, n))
    spectrum = 1 / torch.arange(1, k + 1)
    base = (U * spectrum) @ V.mT
    matrices = [base[torch.randperm(m)].contiguous() for _ in range(count)]
    best = float(torch.linalg.vector_norm(spectrum[RANK:].double()))
    calls: dict[str, Callable[[Sequence[Tensor]], list[Triple]]] = {
        "mbf": lambda matrices: rsvd(list(matrices), RANK, n_iter=ITERATIONS, oversample=OVERSAMPLE),
        "svd_lowrank, loop": lowrank,
        "scikit-learn, loop": sklearns,
    }
    if exact:
        calls["linalg.svd"] = whole

    slow = frozenset({"linalg.svd", "scikit-learn, loop"})

    def over_best(found: list[Triple]) -> list[float]:
        some = list(zip(matrices, found, strict=True))[:16]
        return [residual(M, triple) / best for M, triple in some]

    def check(name: str, found: list[Triple]) -> list[str]:
        over = mean(over_best(found))
        return [] if over <= 1.05 else [f"the residual is {over:.4f} of the best"]

    def note(name: str, found: list[Triple]) -> str:
        """The residual hangs on the sketch, so it is that of many."""
        over = over_best(found)
        while name not in slow and len(over) < DRAWS:
            over += over_best(calls[name](matrices))
        error = stdev(over) / len(over) ** 0.5 if len(over) > 1 else 0.0
        return f"residual {mean(over):.6f} ± {error:.6f} of {len(over)}"

    return Contest({name: partial(call, matrices) for name, call in calls.items()}, check, note, slow)


def factors(sizes: tuple[int, ...]) -> Contest:
    """A weighted sum of LoRAs, of total rank 64, brought back to one of rank 16."""
    d_out, d_in = sizes
    names = ["a", "b", "c", "d"]
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    layer = peft.base_model.model[0]
    B = torch.cat([layer.lora_B[name].weight.data for name in names], 1)
    A = torch.cat([layer.lora_A[name].weight.data for name in names])
    exact = B.double() @ A.double()
    best = float(torch.linalg.vector_norm(torch.linalg.svdvals(exact.float())[RANK:].double()))

    def by_peft() -> Triple:
        if "merged" in peft.peft_config:
            peft.delete_adapter("merged")
        peft.add_weighted_adapter(names, [1.0] * 4, "merged", combination_type="svd", svd_rank=RANK)
        merged = (layer.lora_B["merged"].weight.data, layer.lora_A["merged"].weight.data)
        return merged[0], torch.ones(RANK), merged[1] * layer.scaling["merged"]

    def over_best(triple: Triple) -> float:
        return residual(exact, triple) / best

    return Contest(
        {"mbf": lambda: rsvd((B, A), RANK), "PEFT's svd": by_peft},
        lambda name, found: (
            [] if over_best(found) <= 1.001 else [f"the residual is {over_best(found):.4f} of the best"]
        ),
        lambda name, found: f"residual {over_best(found):.6f}",
        slow=frozenset({"PEFT's svd"}),
    )


def build(case: str) -> Contest:
    kind, sizes = CASES[case]
    return factors(sizes) if kind == "factors" else dense(sizes, kind == "whole")


def main(argv: Sequence[str] | None = None) -> int:
    return run_contests("rsvd.py", argv, __doc__, CASES, QUICK, build, 60.0)


def test_rsvd(capsys):
    with capsys.disabled():
        assert main(["--quick"]) == 0


if __name__ == "__main__":
    sys.exit(main())
