"""One continual run end to end: configuration, training, evaluation, results, resumption."""

from mbf.run.config import ConfigError, RunConfig, load_config
from mbf.run.directory import RunError
from mbf.run.engine import default_output, resume, run
from mbf.run.progress import LogProgress, Progress

__all__ = [
    "ConfigError",
    "LogProgress",
    "Progress",
    "RunConfig",
    "RunError",
    "default_output",
    "load_config",
    "resume",
    "run",
]
