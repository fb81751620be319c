"""How the machine is used."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from simpletuner.config.options.kinds import Count, Says, Slice


def _first_and_last(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError("no two steps")
    return first, last


def _are_steps(text: str) -> str:
    _first_and_last(text)
    return text


class ProcessOptions(Slice):
    """Processes."""

    max_workers: Count | None = None
    """Threads that open and prepare pictures; by default one per core, at most 8."""

    dataloader_prefetch: bool = True
    """Read the next batch while this one trains."""

    profile_steps: (
        Annotated[
            str,
            AfterValidator(_are_steps),
            Says("FIRST:LAST, two steps counted from 1 of which the second is not before the first, such as 10:12"),
        ]
        | None
    ) = None
    """Write a trace of these steps, both included, and a table of the operations that take most time into `profile` in
    the run directory. The steps themselves take longer. [performance.md](performance.md) explains it."""

    @property
    def profiled(self) -> range:
        """The steps of `profile_steps`; empty where it is not set."""
        if self.profile_steps is None:
            return range(0)
        first, last = _first_and_last(self.profile_steps)
        return range(first, last + 1)

    @property
    def workers(self) -> int:
        """`max_workers`, or one per core that this process may use, at most 8."""
        return self.max_workers or min(8, os.cpu_count() or 1)
