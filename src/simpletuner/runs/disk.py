"""Free space on the disk that a run writes to."""

import time
from collections.abc import Callable
from pathlib import Path

from simpletuner.base import machine

CHECK_SPACE_EVERY_S = 30.0


def wait_for_space(path: Path, limit: int, until: Callable[[], bool], every_s: float = 5.0) -> float:
    """Wait until `limit` bytes are free or `until` returns True. Returns the waiting time in seconds."""
    began = time.monotonic()
    while machine.free_disk_bytes(path) < limit and not until():
        time.sleep(every_s)
    return time.monotonic() - began
