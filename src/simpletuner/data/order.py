"""The order in which a run sees its samples. A pure function of (manifests, seed, epoch): nothing to save, nothing
to restore. An epoch is drawn and held as arrays; a micro-batch becomes an object when it is asked for."""

import bisect
import functools
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from simpletuner.base.draws import draw_seed
from simpletuner.data.geometry import Size
from simpletuner.data.manifest import Manifest


@dataclass(frozen=True)
class Visit:
    """One picture seen once: `manifests[set_index].samples[sample_index]`."""

    set_index: int
    sample_index: int


@dataclass(frozen=True)
class MicroBatch:
    """Pictures of one set and one bucket that go through the model together."""

    visits: tuple[Visit, ...]
    bucket: Size


@dataclass(frozen=True)
class BucketBatches:
    """What an epoch draws from one bucket of a set, cut into batches."""

    set_index: int
    bucket: Size
    samples: Int32[np.ndarray, "batches size"]
    """Indices of the samples in their set."""


class EpochOrder:
    """The micro-batches of one epoch: `order[place]`, counted from 0."""

    def __init__(self, buckets: Sequence[BucketBatches], numbers: Int32[np.ndarray, " places"]) -> None:
        """`numbers[place]` counts through the batches of all `buckets`, one bucket after the other."""
        self._buckets = tuple(buckets)
        self._numbers = numbers
        self._starts = [0, *itertools.accumulate(len(bucket.samples) for bucket in buckets[:-1])]

    def __getitem__(self, place: int) -> MicroBatch:
        number = int(self._numbers[place])
        index = bisect.bisect_right(self._starts, number) - 1
        bucket = self._buckets[index]
        samples = bucket.samples[number - self._starts[index]].tolist()
        return MicroBatch(tuple(Visit(bucket.set_index, sample) for sample in samples), bucket.bucket)

    def batch_sizes(self) -> Int32[np.ndarray, " places"]:
        """Samples in each micro-batch."""
        sizes = np.array([bucket.samples.shape[1] for bucket in self._buckets], dtype=np.int32)
        return sizes.take(self._bucket_indices())

    def by_bucket(self) -> list[tuple[MicroBatch, int]]:
        """The first micro-batch of each bucket of each set, in the epoch's order, and how many micro-batches it has."""
        _, places, counts = np.unique(self._bucket_indices(), return_index=True, return_counts=True)
        return [(self[place], count) for place, count in sorted(zip(places.tolist(), counts.tolist(), strict=True))]

    def _bucket_indices(self) -> Int64[np.ndarray, " places"]:
        counts = [len(bucket.samples) for bucket in self._buckets]
        return np.arange(len(counts)).repeat(counts).take(self._numbers)


class Order:
    """The endless sequence of micro-batches of a run.

    In an epoch each picture is seen `repeats` + 1 times, shuffled within its bucket and cut into batches of
    the set's `train_batch_size` (or `batch_size`). An incomplete last batch is filled by drawing again within
    the bucket, other pictures first. Of a set with `probability` p, an epoch sees the share p of its batches,
    at least one, chosen anew each time: of batches and not of pictures, so that every epoch has the same
    length. Then the batches of all sets are shuffled together.
    """

    def __init__(self, manifests: Sequence[Manifest], *, seed: int, batch_size: int) -> None:
        self.manifests = tuple(manifests)
        self.seed = seed
        self.batch_size = batch_size
        self.batches_per_epoch = sum(self._batches_kept(manifest) for manifest in self.manifests)
        """Micro-batches in an epoch; the same for all epochs."""
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know about how the buckets divide into batches."""
        found = []
        for manifest in self.manifests:
            size = self._batch_size(manifest)
            passes = manifest.image_set.repeats + 1
            visits = {bucket: len(members) * passes for bucket, members in manifest.buckets.items()}
            short = {bucket: -count % size for bucket, count in visits.items() if count % size}
            if short:
                text = (
                    f"{manifest.image_set.id}: {len(short)} of {len(visits)} buckets do not divide into "
                    f"batches of {size}; {sum(short.values())} visits an epoch are drawn again to fill them"
                )
                small = [f"{w}x{h}" for (w, h), count in visits.items() if count < size]
                if small:
                    named = ", ".join(small[:5]) + (", …" if len(small) > 5 else "")
                    text += f" (smaller than one batch: {named})"
                found.append(text + ".")
        return tuple(found)

    def epoch(self, number: int) -> EpochOrder:
        """Epoch `number`, counted from 0. The latest two are kept, since a step may end one and begin the next.

        Threads may call this at the same time.
        """
        return self._drawn(number)

    def micro_batch(self, index: int) -> tuple[int, MicroBatch]:
        """The epoch and the micro-batch at `index`, counted from the start of the run."""
        number, place = divmod(index, self.batches_per_epoch)
        return number, self.epoch(number)[place]

    def _batch_size(self, manifest: Manifest) -> int:
        own = manifest.image_set.train_batch_size
        return self.batch_size if own is None else own

    def _batches(self, manifest: Manifest) -> int:
        """Micro-batches of a set with `probability` 1."""
        passes, size = manifest.image_set.repeats + 1, self._batch_size(manifest)
        return sum(math.ceil(len(members) * passes / size) for members in manifest.buckets.values())

    def _batches_kept(self, manifest: Manifest) -> int:
        """Micro-batches of a set in an epoch."""
        return max(1, round(manifest.image_set.probability * self._batches(manifest)))

    def _draw(self, epoch: int) -> EpochOrder:
        buckets = [
            BucketBatches(set_index, bucket, self._draw_bucket(epoch, manifest, bucket))
            for set_index, manifest in enumerate(self.manifests)
            for bucket in manifest.buckets
        ]
        starts = itertools.accumulate(map(self._batches, self.manifests), initial=0)
        numbers = np.concatenate(
            [start + self._draw_kept(epoch, manifest) for start, manifest in zip(starts, self.manifests, strict=False)]
        )
        return EpochOrder(buckets, numbers[permutation(len(numbers), draw_seed(self.seed, "order", epoch))])

    def _draw_kept(self, epoch: int, manifest: Manifest) -> Int32[np.ndarray, " kept"]:
        """Which of a set's batches the epoch sees."""
        numbers = np.arange(self._batches(manifest), dtype=np.int32)
        if manifest.image_set.probability == 1:
            return numbers
        key = draw_seed(self.seed, "order", epoch, manifest.image_set.id, "probability")
        return numbers.take(permutation(len(numbers), key)[: self._batches_kept(manifest)])

    def _draw_bucket(self, epoch: int, manifest: Manifest, bucket: Size) -> Int32[np.ndarray, "batches size"]:
        """Indices of the samples, batch by batch."""
        place = (epoch, manifest.image_set.id, f"{bucket[0]}x{bucket[1]}")
        size = self._batch_size(manifest)
        members = np.array(manifest.buckets[bucket], dtype=np.int32)
        visits = np.tile(members, manifest.image_set.repeats + 1)
        visits = visits[permutation(len(visits), draw_seed(self.seed, "order", *place))]
        if left := len(visits) % size:
            again = members[permutation(len(members), draw_seed(self.seed, "order", *place, "fill"))]
            is_in_last = np.isin(again, visits[-left:])
            others_first = np.concatenate([again[~is_in_last], again[is_in_last]])
            visits = np.concatenate([visits, np.resize(others_first, size - left)])
        return visits.reshape(-1, size)


def permutation(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """0 … count - 1 in an order drawn from `seed`: sorted by `random.Random(seed)`'s `random()`.

    numpy's `random_sample` gives the same numbers from the same state. Python and numpy (`RandomState`) both promise
    to keep that sequence between versions; Python does not promise it for `shuffle`.
    """
    _, (*key, position), _ = random.Random(seed).getstate()
    generator = np.random.RandomState(0)
    generator.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})
    return generator.random_sample(count).argsort(kind="stable")
