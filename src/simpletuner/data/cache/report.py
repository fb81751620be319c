"""How a fill is shared out among ranks, and how it went."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from simpletuner.memory.world import World

B = TypeVar("B")


@dataclass(frozen=True)
class FillReport:
    """What a cache held, and what was added to it, by all ranks together."""

    encoded: int
    """Entries made now. An incomplete batch is made again whole, so some of them may have been there."""
    found: int
    """Entries that were there and sound."""
    damaged: int
    """Entries that were there and damaged; they were removed and made again."""
    seconds: float


def share_of(batches: Sequence[B], world: World) -> Sequence[B]:
    """The batches that this rank encodes: every `world.size`-th. Batches are sorted by length or size, so ranks differ
    by less than the longest one.
    """
    return batches[world.rank :: world.size]


def whole_progress(report: Callable[[int, int], None], own: int, whole: int) -> Callable[[int], None]:
    """Reports entries that this rank has encoded, of `own`, as a part of `whole`, those of all ranks: the others are
    about as far, and nobody asks them.
    """
    return lambda done: report(whole * done // own, whole)
