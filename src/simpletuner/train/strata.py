"""Noise levels spread evenly over an epoch: each of its samples gets a stratum of the density to itself."""

from itertools import accumulate

from simpletuner.base.draws import draw_seed
from simpletuner.data.order import Order, shuffled


class Strata:
    """Which part of the density a sample draws its sigma from. A function of (seed, step, slot) and the order of the
    data, so ranks agree and a resumed run goes on as the first would have.

    An epoch of n samples has n strata, handed out by a draw of the epoch's own. A step that ends one epoch and begins
    the next takes from both.
    """

    def __init__(self, order: Order, *, seed: int, batches_per_step: int) -> None:
        self.order = order
        self.seed = seed
        self.batches_per_step = batches_per_step
        self._latest: tuple[int, list[int], list[int]] | None = None

    def __call__(self, step: int, slot: int) -> tuple[int, int]:
        """(stratum, number of strata) of the sample in `slot` of `step`, counted from 1."""
        index = (step - 1) * self.batches_per_step
        while True:
            epoch, place = divmod(index, self.order.batches_per_epoch)
            starts, strata = self._epoch(epoch)
            size = starts[place + 1] - starts[place]
            if slot < size:
                return strata[starts[place] + slot], len(strata)
            slot -= size
            index += 1

    def _epoch(self, number: int) -> tuple[list[int], list[int]]:
        """How many samples of the epoch come before each of its micro-batches, and the stratum of each sample."""
        if self._latest is None or self._latest[0] != number:
            sizes = [len(micro_batch.visits) for micro_batch in self.order.epoch(number)]
            starts = list(accumulate(sizes, initial=0))
            strata = shuffled(range(starts[-1]), draw_seed(self.seed, "strata", number))
            self._latest = (number, starts, strata)
        return self._latest[1:]
