"""Stratified noise levels: each sample of an epoch draws its sigma from a different stratum of the density."""

import functools

import numpy as np
from jaxtyping import Int64

from simpletuner.base.draws import draw_seed
from simpletuner.data.order import Order, permutation


class Strata:
    """The stratum of the density from which each sample draws its sigma. It depends only on (seed, step, slot) and the
    data order, so ranks agree and a resumed run continues identically.

    An epoch of n samples has n strata, assigned by a permutation that is keyed by the epoch. A step that spans two
    epochs uses the strata of both.
    """

    def __init__(self, order: Order, *, seed: int, batches_per_step: int) -> None:
        self.order = order
        self.seed = seed
        self.batches_per_step = batches_per_step
        self._cached_draw = functools.lru_cache(maxsize=2)(self._draw)  # a step may span two epochs

    def __call__(self, step: int, slot: int) -> tuple[int, int]:
        """(stratum, number of strata) of the sample in `slot` of `step`, counted from 1."""
        epoch, micro_batch = self.order.position((step - 1) * self.batches_per_step)
        while True:
            starts, strata = self._cached_draw(epoch)
            sample_index = int(starts[micro_batch]) + slot
            if sample_index < len(strata):
                return int(strata[sample_index]), len(strata)
            epoch, micro_batch, slot = epoch + 1, 0, sample_index - len(strata)

    def _draw(self, epoch: int) -> tuple[Int64[np.ndarray, " micro_batches"], Int64[np.ndarray, " samples"]]:
        """The index of the first sample of each micro-batch of `epoch`, and the stratum of each sample."""
        sizes = self.order.epoch(epoch).batch_sizes()
        ends = sizes.cumsum(dtype=np.int64)
        return ends - sizes, permutation(int(ends[-1]), draw_seed(self.seed, "strata", epoch))
