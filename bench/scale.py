"""What each process of a run holds, and sends in a step and between two tasks, at 7B, 70B and 405B: arithmetic.

No time is predicted and nothing is measured here; tests/bench/test_scale.py holds the counts of parameters against
transformers and PEFT, and the bytes of a boundary against what two processes really send.

    python bench/scale.py
    python bench/scale.py --rank 8 --targets q_proj,v_proj --processes 4,32,128
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

FP32, BF16 = 4, 2
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama whose head is not tied to its embeddings."""

    name: str
    hidden: int
    kv: int
    mlp: int
    blocks: int
    vocabulary: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linear layers of a block."""
        h, kv, mlp = self.hidden, self.kv, self.mlp
        attention = {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h)}
        return attention | {"gate_proj": (h, mlp), "up_proj": (h, mlp), "down_proj": (mlp, h)}

    @property
    def block(self) -> int:
        """Parameters of a decoder layer: its linear layers and two norms."""
        return sum(d_in * d_out for d_in, d_out in self.linear.values()) + 2 * self.hidden

    @property
    def rest(self) -> int:
        """Parameters outside of the decoder layers: embeddings, head and the last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.blocks * self.block + self.rest

    def adapter(self, rank: int, targets: list[str]) -> int:
        """Parameters of A and B of rank ``rank`` on ``targets``."""
        return self.blocks * rank * sum(sum(self.linear[target]) for target in targets)


MODELS = [
    Llama("Llama-2-7B", 4096, 4096, 11008, 32, 32000),
    Llama("Llama-3.1-70B", 8192, 1024, 28672, 80, 128256),
    Llama("Llama-3.1-405B", 16384, 1024, 53248, 126, 128256),
]


@dataclass(frozen=True)
class Share:
    """Bytes of one process. The base is bf16 and frozen, the adapter fp32 with AdamW, the method ``slao``.

    Attributes:
        base: of W, as long as the task lasts.
        gathered: of FSDP2's decoder layers in flight: the one that computes and the one that is fetched.
        training: of A and B, their gradients and AdamW's two moments.
        learner: of the merged LoRA (to undo a task) and the last fine-tuned one, whole on every process.
        step: sent in a forward and backward.
        boundary: sent between two tasks, from the end of one to the beginning of the next.
    """

    base: float
    gathered: float
    training: float
    learner: float
    step: float
    boundary: float

    @property
    def holds(self) -> float:
        return self.base + self.gathered + self.training + self.learner


SHARES = 3  # broadcasts of adapter and state: at the end, at the beginning, and of the start that was written
GATHERS = 4  # of the adapter: what was trained, what is merged, what was merged, and what the next task can undo to


def boundary(adapter: int, state: int, processes: int, sharded: bool) -> float:
    """Bytes that leave a process between two tasks; ``adapter`` and ``state``: bytes of the LoRA and the method's."""
    if sharded:
        return GATHERS * adapter * (processes - 1) / processes + SHARES * state
    return SHARES * (adapter + state)


def share(model: Llama, adapter: int, processes: int, sharded: bool) -> Share:
    """Of one of ``processes``, for an adapter of so many parameters."""
    parts, others = (processes if sharded else 1), (processes - 1) / processes
    weights, lora = BF16 * model.parameters, FP32 * adapter
    # A ring: (N − 1)/N of the bytes leave each process to reduce-scatter or to gather, twice that to all-reduce.
    step = 2 * others * lora
    if sharded:  # gathered for forward and backward, the root's own once; gradients of A and B scattered
        step = others * (BF16 * (2 * model.blocks * model.block + model.rest) + 3 * lora)
    return Share(
        base=weights / parts,
        gathered=2 * BF16 * model.block if sharded else 0,
        training=4 * lora / parts,
        learner=2 * lora,
        step=step,
        boundary=boundary(lora, lora, processes, sharded),
    )


def size(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= 0.95 * GIB else f"{value / MIB:.0f} MiB"


def table(rank: int, targets: list[str], processes: list[int]) -> str:
    """Markdown."""
    head = ["model, adapter", "processes", "how", "holds", "W", "training", "learner", "sends a step", "a boundary"]
    rows = [head, ["---"] * len(head)]
    for model, count in zip(MODELS, processes, strict=True):
        adapter = model.adapter(rank, targets)
        for how in ("DDP", "FSDP2"):
            one = share(model, adapter, count, how == "FSDP2")
            base = size(one.base) + (f" + {size(one.gathered)}" if one.gathered else "")
            first = f"{model.name}, {adapter / 1e6:.0f}M" if how == "DDP" else ""
            cells = [one.training, one.learner, one.step, one.boundary]
            rows.append([first, str(count), how, size(one.holds), base, *map(size, cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default=",".join(MODELS[0].linear), help="linear layers, with commas between them")
    parser.add_argument("--processes", default="8,16,64", help="GPUs for 7B, 70B and 405B (default: %(default)s)")
    given = parser.parse_args(arguments)
    targets = given.targets.split(",")
    if unknown := set(targets) - set(MODELS[0].linear):
        parser.error(f"--targets: {', '.join(sorted(unknown))} is none of {', '.join(MODELS[0].linear)}")
    counts = [int(count) for count in given.processes.split(",")]
    if len(counts) != len(MODELS) or min(counts) < 2:
        parser.error(f"--processes: found {given.processes}, wanted {len(MODELS)} numbers of 2 or more")
    print(table(given.rank, targets, counts))


if __name__ == "__main__":
    main()
