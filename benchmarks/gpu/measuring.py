"""What all GPU measurements share: arguments, the remaining time, and timing."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that all measurements take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    made.add_argument("--tiny", action="store_true", help="use small models, to test the script")
    made.add_argument("--seconds", type=float, default=600.0, help="start no further measurement after this time")
    made.add_argument("--out", type=Path, default=Path("gpu-results"))
    return made


def free() -> None:
    """Free unreachable memory of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until all launched work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """The time that a measurement has left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def seconds_of(work: Callable[[], object], device: torch.device, *, rounds: int = 5, calls: int = 1) -> float:
    """Seconds of one call: the median of a few rounds of `calls` calls each, after one warm-up round."""
    seconds = []
    for _ in range(1 + rounds):
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        seconds.append((time.perf_counter() - began) / calls)
    return statistics.median(seconds[1:])
