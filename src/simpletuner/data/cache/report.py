"""Division of a cache fill among ranks, and its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from simpletuner.memory.world import World

B = TypeVar("B")


@dataclass(frozen=True)
class FillReport:
    """Entries found in a cache and entries added to it, over all ranks."""

    encoded: int
    """Entries encoded now. An incomplete batch is encoded again as a whole, so some of them may have existed."""
    existing: int
    """Existing, sound entries."""
    damaged: int
    """Existing, damaged entries; they were removed and encoded again."""
    seconds: float


def share_of(batches: Sequence[B], world: World) -> Sequence[B]:
    """The batches that this rank encodes: every `world.size`-th. Batches are sorted by length or size, so the work of
    ranks differs by less than the longest batch.
    """
    return batches[world.rank :: world.size]


def whole_progress(report: Callable[[int, int], None], share_size: int, total: int) -> Callable[[int], None]:
    """Scale this rank's progress, in entries of `share_size`, to the `total` entries of all ranks. The estimate assumes
    that the other ranks are equally far along; it needs no communication.
    """
    return lambda done: report(total * done // share_size, total)
