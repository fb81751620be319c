"""How a fill went."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FillReport:
    """What a cache held, and what was added to it."""

    encoded: int
    """Entries made now. An incomplete batch is made again whole, so some of them may have been there."""
    found: int
    """Entries that were there and sound."""
    damaged: int
    """Entries that were there and damaged; they were removed and made again."""
    seconds: float
