"""Peak memory since a moment, of the accelerator and of this process."""

import contextlib
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from simpletuner.base.sizes import GIB

PROCESS_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"
"""Written to `CLEAR_REFS`, it sets the process's peak to what is resident now (proc(5))."""


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was in use at once, in bytes."""

    resident: int = 0
    """Host memory of this process."""
    reserved: int | None = None
    """What torch's allocator held of the accelerator; None without one."""
    allocated: int | None = None
    """What tensors took of `reserved`."""

    @property
    def used_gib(self) -> float:
        """`reserved`, or without an accelerator `resident`, in GiB to three places."""
        return round((self.resident if self.reserved is None else self.reserved) / GIB, 3)

    @property
    def allocated_gib(self) -> float | None:
        """`allocated` in GiB to three places."""
        return None if self.allocated is None else round(self.allocated / GIB, 3)

    def combined(self, other: "PeakMemory") -> "PeakMemory":
        """The peak of two spans of time."""
        return PeakMemory(
            max(self.resident, other.resident),
            _larger(self.reserved, other.reserved),
            _larger(self.allocated, other.allocated),
        )


def reset_peak_memory() -> None:
    """Begin the span of time that `read_peak_memory` looks at. What is in use now is the least that it can return.

    Where the system does not let a process reset its peak, `resident` stays that of the whole process.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(CLEAR_PEAK)


def read_peak_memory() -> PeakMemory:
    """Peak memory since `reset_peak_memory` was called last, or else since the process began."""
    resident = _peak_resident_bytes()
    if not torch.cuda.is_available():
        return PeakMemory(resident)
    stats = torch.cuda.memory_stats()  # empty before the first tensor
    return PeakMemory(resident, stats.get("reserved_bytes.all.peak", 0), stats.get("allocated_bytes.all.peak", 0))


def _peak_resident_bytes() -> int:
    lines = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
    if "VmHWM" in lines:
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    # Not first: it also counts the program that this process was before it became this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _larger(one: int | None, other: int | None) -> int | None:
    return max((each for each in (one, other) if each is not None), default=None)
