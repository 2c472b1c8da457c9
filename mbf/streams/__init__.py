"""Task streams: the packaged tasks, one's own files, data sets of the hub, and the SAPT / O-LoRA folders."""

from mbf.streams.fetch import FetchError, Progress, cache_dir
from mbf.streams.load import load_stream
from mbf.streams.spec import StreamSpec, TaskSpec
from mbf.streams.task import Row, Stream, StreamError, Task, make_task

__all__ = [
    "FetchError",
    "Progress",
    "Row",
    "Stream",
    "StreamError",
    "StreamSpec",
    "Task",
    "TaskSpec",
    "cache_dir",
    "load_stream",
    "make_task",
]
