"""mbf: one LoRA that learns task after task without forgetting, on fused kernels.

>>> import mbf
>>> mbf.fuse(model)                              # peft's LoRA layers, computed by fused kernels
>>> learner = mbf.ContinualLora(model)           # SLAO, arXiv 2512.23017
>>> with learner.task("agnews"):
...     trainer.train()                          # any loop; afterwards the adapter is the merged LoRA
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mbf import methods, ops
from mbf.ops import use_backend

if TYPE_CHECKING:
    from mbf import continual, peft
    from mbf.continual import ContinualLora, TaskError
    from mbf.peft.fuse import fuse, fused, unfuse
    from mbf.peft.initialise import orthogonalize_
    from mbf.peft.pissa import init_pissa_
    from mbf.peft.report import FuseReport

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
    "init_pissa_",
    "methods",
    "ops",
    "orthogonalize_",
    "peft",
    "unfuse",
    "use_backend",
]

# peft brings transformers' models, accelerate and triton with it; whoever needs only the operators does not wait.
_LAZY = {
    "ContinualLora": "mbf.continual",
    "TaskError": "mbf.continual",
    "FuseReport": "mbf.peft",
    "fuse": "mbf.peft",
    "fused": "mbf.peft",
    "init_pissa_": "mbf.peft",
    "orthogonalize_": "mbf.peft",
    "unfuse": "mbf.peft",
}


def __getattr__(name: str) -> Any:
    if name in ("continual", "peft"):
        return importlib.import_module(f"mbf.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mbf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
