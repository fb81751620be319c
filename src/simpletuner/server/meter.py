"""What the machine has left, for everyone who looks: asked of the system at most every two seconds."""

import threading
import time
from pathlib import Path

from pydantic import BaseModel

from simpletuner.base.machine import disk_room, gpus, host_memory

ASKED_EVERY_S = 2.0
LOW_DISK_BYTES = 10 * 2**30
"""Free space below which the page warns. A run acts at its `disk_low_threshold`."""


class MeteredGpu(BaseModel):
    """A GPU. Null is what its driver does not say."""

    index: int
    name: str
    total_bytes: int | None
    used_bytes: int | None
    utilization_percent: int | None


class MachineMeter(BaseModel):
    """What is in use and what is left."""

    ram_total_bytes: int | None
    """Null where the system does not say."""
    ram_available_bytes: int | None
    disk_free_bytes: int
    """Where runs are written."""
    disk_is_low: bool
    gpus: list[MeteredGpu]


class Meter:
    """The meter of one server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: tuple[float, MachineMeter] | None = None

    def read(self, folder: Path) -> MachineMeter:
        """The machine now, or up to `ASKED_EVERY_S` ago; `folder` is where runs are written."""
        with self._lock:
            if self._read is None or time.monotonic() - self._read[0] > ASKED_EVERY_S:
                self._read = time.monotonic(), _measured(folder)
            return self._read[1]


def _measured(folder: Path) -> MachineMeter:
    memory, free = host_memory(), disk_room(folder)
    return MachineMeter(
        ram_total_bytes=None if memory is None else memory.total_bytes,
        ram_available_bytes=None if memory is None else memory.available_bytes,
        disk_free_bytes=free,
        disk_is_low=free < LOW_DISK_BYTES,
        gpus=[MeteredGpu.model_validate(gpu, from_attributes=True) for gpu in gpus()],
    )
