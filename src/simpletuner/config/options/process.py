"""Options for loader threads, prefetching and profiling."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from simpletuner.config.options.kinds import Count, Expects, Slice


def _first_and_last(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError("not two steps")
    return first, last


def _are_steps(text: str) -> str:
    _first_and_last(text)
    return text


class ProcessOptions(Slice):
    """Processes."""

    max_workers: Count | None = None
    """Threads that load and prepare images. By default one per CPU core, at most 8."""

    dataloader_prefetch: bool = True
    """Prefetch the next batch while the current one trains."""

    profile_steps: (
        Annotated[
            str,
            AfterValidator(_are_steps),
            Expects("FIRST:LAST, two steps counted from 1, such as 10:12, with LAST not before FIRST"),
        ]
        | None
    ) = None
    """Profile these steps, both included: write a trace and a table of the slowest operations into `profile` in the run
    directory. Profiled steps take longer. See [performance.md](performance.md)."""

    @property
    def profiled(self) -> range:
        """The steps in `profile_steps`; empty where it is not set."""
        if self.profile_steps is None:
            return range(0)
        first, last = _first_and_last(self.profile_steps)
        return range(first, last + 1)

    @property
    def workers(self) -> int:
        """`max_workers`, or one per core that this process may use, at most 8."""
        return self.max_workers or min(8, os.cpu_count() or 1)
