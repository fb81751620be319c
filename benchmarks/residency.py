"""Simulate which blocks to keep resident: the time of a streamed step for several choices of blocks at equal memory.

    python benchmarks/residency.py [--budgets 8,14,26,40]

dev's blocks: 8 double blocks of two units of bytes, 48 single blocks of one, all with the same arithmetic. A forward
pass of a block takes 1, a recomputed backward pass 2. A ring of two slots prefetches one group, as
`memory/offload.py` does: a copy begins when the group before it begins to compute. The figures are the time of a step
above its arithmetic; a copy of a single block takes `ratio` times its forward pass. Budgets are units of resident
blocks and slots together, of 64. Nothing runs on a device.
"""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass

from simpletuner.config.flavours import DEV
from simpletuner.flux2.residency import resident_indices

DOUBLES, BLOCKS = DEV.double_blocks, DEV.blocks
SIZES = [2] * DOUBLES + [1] * (BLOCKS - DOUBLES)
FORWARD, BACKWARD = 1.0, 2.0
RATIOS = (0.5, 1.0, 1.5, 2.0, 4.0)
STEPS = 4
"""Simulated steps; the last one counts, because its ring is in the state that a step leaves."""


def spread(of: int, count: int) -> set[int]:
    return {(2 * index + 1) * of // (2 * count) for index in range(count)}


def singles_first(count: int) -> set[int]:
    singles = min(count, BLOCKS - DOUBLES)
    return {DOUBLES + index for index in spread(BLOCKS - DOUBLES, singles)} | spread(DOUBLES, count - singles)


CHOICES: dict[str, Callable[[int], Collection[int]]] = {
    "the first blocks": range,
    "the last blocks": lambda count: range(BLOCKS - count, BLOCKS),
    "spread over all": lambda count: spread(BLOCKS, count),
    "singles first, spread": singles_first,
    "doubles first, spread": lambda count: resident_indices(DEV, count),
}


@dataclass
class Ring:
    """Two slots, and the time at which the copy stream is free."""

    slot_of: dict[int, int]
    ratio: float
    free_at: float = 0.0

    def __post_init__(self) -> None:
        self.holds = [-1, -1]
        self.ready = dict.fromkeys(self.slot_of, 0.0)

    def copy(self, block: int, earliest: float) -> None:
        if self.holds[self.slot_of[block]] != block:
            self.free_at = max(earliest, self.free_at) + SIZES[block] * self.ratio
            self.ready[block] = self.free_at
            self.holds[self.slot_of[block]] = block


def overhead(resident: Collection[int], ratio: float) -> float:
    """Time of a step that copies add, as a share of its arithmetic."""
    streamed = [block for block in range(BLOCKS) if block not in resident]
    ring = Ring({block: index % 2 for index, block in enumerate(streamed)}, ratio)
    step = [(block, FORWARD) for block in range(BLOCKS)] + [(block, BACKWARD) for block in reversed(range(BLOCKS))]
    run = step * STEPS
    now, began = 0.0, 0.0
    for index, (block, seconds) in enumerate(run):
        if index == len(step) * (STEPS - 1):
            began = now
        if block in ring.slot_of:
            ring.copy(block, now)
            now = max(now, ring.ready[block])
            later = (other for other, _ in run[index + 1 :] if other != block and other in ring.slot_of)
            following = next(later, None)
            if following is not None and ring.slot_of[following] != ring.slot_of[block]:
                ring.copy(following, now)
        now += seconds
    return (now - began) / (BLOCKS * (FORWARD + BACKWARD)) - 1


def taken(resident: Collection[int]) -> int:
    """Units of memory of the resident blocks and of the slots."""
    streamed = [SIZES[block] for block in range(BLOCKS) if block not in resident]
    return sum(SIZES) - sum(streamed) + min(2, len(streamed)) * max(streamed, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="8,14,26,40")
    arguments = parser.parse_args()
    print("| memory | resident blocks | of them | " + " | ".join(f"ratio {ratio:g}" for ratio in RATIOS) + " |")
    print("|---|---|---" + "|---:" * len(RATIOS) + "|")
    for budget in map(int, arguments.budgets.split(",")):
        for name, choose in CHOICES.items():
            count = max(n for n in range(BLOCKS + 1) if taken(choose(n)) <= budget)
            resident = choose(count)
            cells = [f"{overhead(resident, ratio):+.0%}" for ratio in RATIOS]
            print(f"| {taken(resident)} of {sum(SIZES)} | {name} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
