"""mbf: one LoRA that learns task after task without forgetting, on fused kernels.

>>> import mbf
>>> mbf.fuse(model)                              # peft's LoRA layers, computed by fused kernels
>>> learner = mbf.ContinualLora(model)           # SLAO, arXiv 2512.23017
>>> with learner.task("agnews"):
...     trainer.train()                          # any loop; afterwards the adapter is the merged LoRA
"""

from importlib.metadata import PackageNotFoundError, version

from mbf import continual, methods, ops
from mbf.continual import ContinualLora, TaskError
from mbf.ops import use_backend
from mbf.peft import FuseReport, fuse, fused, unfuse

try:
    __version__ = version("mbf")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ContinualLora",
    "FuseReport",
    "TaskError",
    "continual",
    "fuse",
    "fused",
    "methods",
    "ops",
    "unfuse",
    "use_backend",
]
