"""How the machine is used."""

import os

from simpletuner.config.options.kinds import Count, Slice


class ProcessOptions(Slice):
    """Processes."""

    max_workers: Count | None = None
    """Threads that open and prepare pictures; by default one per core, at most 8."""

    dataloader_prefetch: bool = True
    """Read the next batch while this one trains."""

    @property
    def workers(self) -> int:
        """`max_workers`, or one per core that this process may use, at most 8."""
        return self.max_workers or min(8, os.cpu_count() or 1)
