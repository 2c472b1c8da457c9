"""IncLoRA: a new LoRA for every task; the old ones are frozen and all are summed, dW = Σ_k s B_k A_k."""

from mbf.methods._summed import Summed
from mbf.methods.base import MethodInfo, register


@register
class IncLora(Summed):
    """The sum itself, every hook as ``Summed`` has it."""

    name = "inclora"
    info = MethodInfo(
        title="A new LoRA for every task (IncLoRA)",
        trained="A_i, B_i",
        frozen="W, old A, B",
        merge="sum (concatenated)",
        memory="O(TP)",
    )
