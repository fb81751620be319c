"""Memory, disk and GPU use of this machine, shared by all clients and read at most every two seconds."""

import threading
import time
from pathlib import Path

from pydantic import BaseModel

from simpletuner.base.machine import free_disk_bytes, gpus, host_memory

MAX_AGE_S = 2.0
LOW_DISK_BYTES = 10 * 2**30
"""Free space below which the page warns. A run reacts at its own `disk_low_threshold`."""


class MeteredGpu(BaseModel):
    """A GPU. Values that its driver does not report are null."""

    index: int
    name: str
    total_bytes: int | None
    used_bytes: int | None
    utilization_percent: int | None


class MachineMeter(BaseModel):
    """Used and free memory, disk space and GPUs of this machine."""

    ram_total_bytes: int | None
    """Null if the system does not report it."""
    ram_available_bytes: int | None
    disk_free_bytes: int
    """Free space on the disk that runs are written to."""
    disk_is_low: bool
    gpus: list[MeteredGpu]


class Meter:
    """The machine's readings, cached for `MAX_AGE_S`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading: tuple[float, MachineMeter] | None = None

    def read(self, folder: Path) -> MachineMeter:
        """Return a reading at most `MAX_AGE_S` old; `folder` is where runs are written."""
        with self._lock:
            if self._reading is None or time.monotonic() - self._reading[0] > MAX_AGE_S:
                self._reading = time.monotonic(), _measured(folder)
            return self._reading[1]


def _measured(folder: Path) -> MachineMeter:
    memory, free_bytes = host_memory(), free_disk_bytes(folder)
    return MachineMeter(
        ram_total_bytes=None if memory is None else memory.total_bytes,
        ram_available_bytes=None if memory is None else memory.available_bytes,
        disk_free_bytes=free_bytes,
        disk_is_low=free_bytes < LOW_DISK_BYTES,
        gpus=[MeteredGpu.model_validate(gpu, from_attributes=True) for gpu in gpus()],
    )
