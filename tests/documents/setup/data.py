# A folder of tasks.
from pathlib import Path

from tests.run.tiny import write_stream

write_stream(Path("data"))
