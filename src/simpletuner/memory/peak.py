"""Measure the peak memory of the accelerator and of this process in a span of time."""

import contextlib
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from simpletuner.base.sizes import GIB

PROCESS_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"
"""Written to `CLEAR_REFS`, it resets the process's peak to the current resident size (proc(5))."""


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory in bytes."""

    resident: int = 0
    """Peak host memory of this process."""
    reserved: int | None = None
    """Peak accelerator memory reserved by torch's allocator; None without an accelerator."""
    allocated: int | None = None
    """Peak accelerator memory of tensors."""

    @property
    def used_gib(self) -> float:
        """`reserved`, or without an accelerator `resident`, in GiB, rounded to three decimals."""
        return round((self.resident if self.reserved is None else self.reserved) / GIB, 3)

    @property
    def allocated_gib(self) -> float | None:
        """`allocated` in GiB, rounded to three decimals."""
        return None if self.allocated is None else round(self.allocated / GIB, 3)

    def combined(self, second: "PeakMemory") -> "PeakMemory":
        """The peak over two spans of time."""
        return PeakMemory(
            max(self.resident, second.resident),
            _larger(self.reserved, second.reserved),
            _larger(self.allocated, second.allocated),
        )


def reset_peak_memory() -> None:
    """Begin the span of time that `read_peak_memory` measures. The current memory is its lower bound.

    If the system does not let a process reset its peak, `resident` stays the peak since the process started.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(CLEAR_PEAK)


def read_peak_memory() -> PeakMemory:
    """Peak memory since the last call of `reset_peak_memory`, or since the process started."""
    resident = _peak_resident_bytes()
    if not torch.cuda.is_available():
        return PeakMemory(resident)
    stats = torch.cuda.memory_stats()  # empty before the first tensor
    return PeakMemory(resident, stats.get("reserved_bytes.all.peak", 0), stats.get("allocated_bytes.all.peak", 0))


def _peak_resident_bytes() -> int:
    lines = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
    if "VmHWM" in lines:
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    # Second choice: it also counts the program that ran in this process before exec.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _larger(first: int | None, second: int | None) -> int | None:
    return max((each for each in (first, second) if each is not None), default=None)
