"""Noise levels spread evenly over an epoch: each of its samples gets a stratum of the density to itself."""

import functools

import numpy as np
from jaxtyping import Int64

from simpletuner.base.draws import draw_seed
from simpletuner.data.order import Order, permutation


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
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)  # a step may end one epoch and begin the next

    def __call__(self, step: int, slot: int) -> tuple[int, int]:
        """(stratum, number of strata) of the sample in `slot` of `step`, counted from 1."""
        epoch, micro_batch = self.order.place((step - 1) * self.batches_per_step)
        while True:
            starts, strata = self._drawn(epoch)
            place = int(starts[micro_batch]) + slot
            if place < len(strata):
                return int(strata[place]), len(strata)
            epoch, micro_batch, slot = epoch + 1, 0, place - len(strata)

    def _draw(self, epoch: int) -> tuple[Int64[np.ndarray, " micro_batches"], Int64[np.ndarray, " samples"]]:
        """How many samples of the epoch come before each of its micro-batches, and the stratum of each sample."""
        sizes = self.order.epoch(epoch).batch_sizes()
        ends = sizes.cumsum(dtype=np.int64)
        return ends - sizes, permutation(int(ends[-1]), draw_seed(self.seed, "strata", epoch))
