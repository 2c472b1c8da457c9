"""SeqLoRA: one LoRA trained through all tasks, each from where the last one ended. The lower bound."""

from mbf.methods.base import Method, MethodInfo, register


@register
class SeqLora(Method):
    """Every hook at its default: nothing is merged, nothing is kept."""

    name = "seqlora"
    info = MethodInfo(title="Sequential fine-tuning", trained="A, B", frozen="W", merge="none", memory="O(P)")
