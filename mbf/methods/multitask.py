"""All tasks at once: the upper bound that no sequential method is expected to reach."""

from mbf.methods.base import Method, MethodInfo, register


@register
class MultiTask(Method):
    """One LoRA trained once on the union of all tasks' data; ``mbf run`` mixes them, a plain loop has to."""

    name = "multitask"
    joint = True
    merges_alone = False
    info = MethodInfo(
        title="All tasks at once", trained="A, B", frozen="W", merge="none", memory="O(P)", data_free=False
    )
