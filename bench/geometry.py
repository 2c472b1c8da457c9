"""The linear layers of the models that the benchmarks speak of, as pairs (d_in, d_out)."""

from __future__ import annotations

Layers = list[tuple[int, int]]


def llama(hidden: int, kv: int, mlp: int, blocks: int) -> Layers:
    """q, k, v, o, gate, up and down of every block."""
    attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    return [*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden)] * blocks


MODELS: dict[str, Layers] = {
    "SmolLM2-135M": llama(576, 192, 1536, 30),
    "Llama-3.2-1B": llama(2048, 512, 8192, 16),
    "Llama-2-7B": llama(4096, 4096, 11008, 32),
    "Llama-2-7B q, v": [(4096, 4096)] * 64,
}
