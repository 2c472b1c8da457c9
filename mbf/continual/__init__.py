"""The learner: one LoRA through a stream of tasks, its checkpoints, offline merging and the metrics."""

from mbf.continual.checks import DivergedError, NonFiniteAdapterError, TaskError
from mbf.continual.header import CheckpointError
from mbf.continual.learner import ContinualLora, TaskRecord
from mbf.continual.metrics import FORMULAS, ScoreMatrix
from mbf.continual.offline import Compressed, MergeReport, merge_adapters

__all__ = [
    "FORMULAS",
    "CheckpointError",
    "Compressed",
    "ContinualLora",
    "DivergedError",
    "MergeReport",
    "NonFiniteAdapterError",
    "ScoreMatrix",
    "TaskError",
    "TaskRecord",
    "merge_adapters",
]
