"""Prediction, never a measurement: times of a LoRA layer on GPUs, from the bytes that ``traffic.py`` counted.

A part takes the base product's time, the greater of its flops over tensor throughput and its bytes over bandwidth,
and, one after the other, the extra bytes over bandwidth and an overhead for every launch. mbf's pass that makes the
dropout mask takes the greater of that pass's bytes and of its integer work, which is Philox. The branch's flops are
added at tensor throughput only where they exceed the time of the extra bytes. All counted bytes are taken to come from
DRAM, although a part of them are hits in the second-level cache; the host is taken to keep up with the GPU.

``peft-nocast`` is PEFT with A and B in bf16. Run: ``python bench/roofline.py --csv bench/results/roofline.csv``, on
what ``traffic.py`` wrote to bench/results/traffic.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import csv_rows, read_csv, table

TRAFFIC = Path(__file__).resolve().parent / "results" / "traffic.csv"


class Gpu(NamedTuple):
    """Peaks of a GPU as its vendor publishes them.

    Attributes:
        bandwidth: of DRAM, bytes a second.
        tensor: dense bf16 flops a second.
        lanes: 32-bit integer instructions a second, all lanes together.
        source: where the figures are from.
    """

    bandwidth: float
    tensor: float
    lanes: float
    source: str


GPUS = {
    "A100 80GB SXM (sm_80)": Gpu(
        2.039e12,
        312e12,
        19.5e12 / 2,
        "NVIDIA A100 datasheet; A100 whitepaper: 19.5 INT32 TOPS, a multiply-add being two",
    ),
    "H100 SXM (sm_90)": Gpu(
        3.35e12,
        989.4e12,
        67e12 / 4,
        "NVIDIA H100 datasheet; H100 whitepaper: 64 INT32 lanes an SM beside 128 of fp32 (67 TFLOPS)",
    ),
    "B200 HGX (sm_100)": Gpu(
        8e12,
        2250e12,
        80e12 / 4,
        "NVIDIA Blackwell brief: HGX B200, 80 TFLOPS of fp32; half as many INT32 lanes as fp32 lanes is assumed",
    ),
}
OF_BANDWIDTH, OF_TENSOR, OF_LANES = 0.8, 0.7, 0.7  # what is reached of the peaks
OVERHEAD = 2e-6  # seconds a launch, between kernels that are already queued
PHILOX = (20 * 2 + 40) / 8  # instructions an element: ten rounds of two wide products, at half rate, and four others
PARTS = ("forward", "backward")
VARIANTS = ("frozen", "peft-nocast", "mbf")
COLUMNS = [
    *("gpu", "shape", "rank", "p", "tokens", "part"),
    *(f"predicted_{name}_us" for name in ("frozen", "peft_nocast", "mbf")),
    *("predicted_peft_over_frozen", "predicted_mbf_over_frozen", "predicted_peft_over_mbf"),
]


class Layers(NamedTuple):
    """One case of ``traffic.py``: layers that share x."""

    shape: str
    rank: int
    p: float
    tokens: int

    @classmethod
    def of(cls, row: Mapping[str, str]) -> Layers:
        return cls(row["shape"], int(row["rank"]), float(row["p"]), int(row["tokens"]))

    @property
    def d_in(self) -> int:
        return int(self.shape.split("x")[0])

    @property
    def d_outs(self) -> list[int]:
        return [int(d_out) for d_out in self.shape.split("x")[1].split("+")]

    def frozen(self, gpu: Gpu) -> float:
        """Seconds of the base products of one part, which are as large in either."""
        return sum(
            max(
                2 * self.tokens * self.d_in * d_out / (OF_TENSOR * gpu.tensor),
                2 * (self.tokens * (self.d_in + d_out) + self.d_in * d_out) / (OF_BANDWIDTH * gpu.bandwidth),
            )
            + OVERHEAD
            for d_out in self.d_outs
        )

    def extra(self, gpu: Gpu, part: str, moved: int, launches: int, masked: bool) -> float:
        """Seconds beside the base products.

        Args:
            moved: bytes.
            masked: whether the mask is made in the pass over x, or over x and dx.
        """
        flops = (1 if part == "forward" else 2) * 2 * self.tokens * self.rank * sum(self.d_in + d for d in self.d_outs)
        memory = moved / (OF_BANDWIDTH * gpu.bandwidth)
        if masked and self.p:
            of_pass = (1 if part == "forward" else 3) * 2 * self.tokens * self.d_in / (OF_BANDWIDTH * gpu.bandwidth)
            masks = PHILOX * self.tokens * self.d_in * len(self.d_outs) / (OF_LANES * gpu.lanes)
            memory += max(0.0, masks - of_pass)
        return max(memory, flops / (OF_TENSOR * gpu.tensor)) + launches * OVERHEAD


def is_mbf(row: Mapping[str, str]) -> bool:
    """Whether the row is of mbf with A and B in bf16, as those of the PEFT that it is compared with."""
    return row["variant"] == "mbf" and row["factors"] == "bf16"


def predictions(layers: Layers, rows: Sequence[Mapping[str, str]], gpu: Gpu) -> dict[str, dict[str, float]]:
    """Seconds by part, both together included, and by variant; ``rows`` are those of one case."""
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        counted = {row["variant"]: (int(row["bytes"]), int(row["launches"])) for row in rows if row["part"] == part}
        base = layers.frozen(gpu)
        found[part] = {
            name: base + layers.extra(gpu, part, *counted[name], masked=name == "mbf") for name in VARIANTS[1:]
        }
        sums = counted.get("frozen", (0, 0))  # of the gradients of a shared x
        found[part]["frozen"] = base + sums[0] / (OF_BANDWIDTH * gpu.bandwidth) + sums[1] * OVERHEAD
    found["both"] = {name: sum(found[part][name] for part in PARTS) for name in VARIANTS}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--traffic", type=Path, default=TRAFFIC, help="what traffic.py wrote with --csv")
    parser.add_argument("--csv", metavar="FILE")
    args = parser.parse_args(argv)
    if not args.traffic.exists():
        parser.error(f"{args.traffic} does not exist; make it: python bench/traffic.py --csv {args.traffic}")
    counted, rows = read_csv(args.traffic)
    cases: dict[Layers, list[dict[str, str]]] = {Layers.of(row): [] for row in rows if is_mbf(row)}
    for row in rows:
        if Layers.of(row) in cases and (row["variant"] != "mbf" or is_mbf(row)):
            cases[Layers.of(row)].append(row)
    header = {
        "prediction": "nothing here was measured; bytes were counted, times follow from published peaks",
        "bytes": f"{counted.get('command', args.traffic)}, commit {counted.get('commit', 'unknown')}",
        "reached": f"{OF_BANDWIDTH:g} of bandwidth, {OF_TENSOR:g} of tensor peak, {OF_LANES:g} of integer lanes",
        "launch": f"{1e6 * OVERHEAD:g} us each",
        **{
            name: f"{gpu.bandwidth / 1e12:g} TB/s, {gpu.tensor / 1e12:g} TFLOPS of bf16, "
            f"{gpu.lanes / 1e12:.4g}e12 integer instructions a second; {gpu.source}"
            for name, gpu in GPUS.items()
        },
    }
    print("\n".join(f"{name}: {value}" for name, value in header.items()))
    with csv_rows(args.csv, COLUMNS, header) as add:
        for name, gpu in GPUS.items():
            lines = []
            for layers, of_case in cases.items():
                for part, seconds in predictions(layers, of_case, gpu).items():
                    frozen, peft, mbf = (seconds[variant] for variant in VARIANTS)
                    us = [f"{1e6 * time:.1f}" for time in (frozen, peft, mbf)]
                    ratios = [f"{ratio:.3f}" for ratio in (peft / frozen, mbf / frozen, peft / mbf)]
                    add([name, *layers, part, *us, *ratios])
                    case = f"{layers.shape} r={layers.rank} p={layers.p:g} T={layers.tokens}"
                    lines.append([f"{case} {part}", *us, *ratios])
            heads = ["frozen µs", "PEFT bf16 µs", "mbf µs", "PEFT/frozen", "mbf/frozen", "PEFT/mbf"]
            print(f"\nPREDICTED for {name}\n" + table(["", *heads], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
