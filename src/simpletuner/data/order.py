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


@dataclass(frozen=True)
class Cut:
    """How a run's steps were cut into micro-batches before it was resumed with another batch size."""

    steps: int
    """The last of these steps."""
    batch_size: int
    """Images in a micro-batch."""
    batches_per_step: int
    """Micro-batches of a global batch, over all processes."""


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


@dataclass(frozen=True)
class Rest:
    """The rest of an epoch in which the batch size changed."""

    epoch: int
    first: int
    """The place at which it begins, counted as if the epoch were whole."""
    due: tuple[Int64[np.ndarray, " _"], ...]
    """How often each sample of each set comes, but for what fills batches."""
    order: EpochOrder
    """Micro-batches from `first` on; places before that have no meaning."""


class Order:
    """The endless sequence of micro-batches of a run.

    In an epoch each picture is seen `repeats` + 1 times, shuffled within its bucket and cut into batches of
    the set's `train_batch_size` (or `batch_size`). An incomplete last batch is filled by drawing again within
    the bucket, other pictures first. Of a set with `probability` p, an epoch sees the share p of its batches,
    at least one, chosen anew each time: of batches and not of pictures, so that every epoch has the same
    length. Then the batches of all sets are shuffled together.

    A run that is resumed with another batch size has the rest of its epoch cut anew (`of`): each picture comes as
    often as it would have, but for what fills the batches.
    """

    @classmethod
    def of(cls, manifests: Sequence[Manifest], *, seed: int, cuts: Sequence[Cut], now: Cut) -> "Order":
        """The order of a run whose steps were cut as `cuts` say, one after the other, and are cut as `now` from there
        on. Indices of micro-batches count as if `now` had been from the start: a step begins at its number before it
        times `batches_per_step`.
        """
        first, *later = [*cuts, now]
        order = cls(manifests, seed=seed, batch_size=first.batch_size)
        for cut, following in zip(cuts, later, strict=True):
            index = cut.steps * following.batches_per_step
            order = order._resumed(cut.steps * cut.batches_per_step, following.batch_size, index)
        return order

    def __init__(self, manifests: Sequence[Manifest], *, seed: int, batch_size: int) -> None:
        self.manifests = tuple(manifests)
        self.seed = seed
        self.batch_size = batch_size
        self.batches_per_epoch = sum(self._batches_kept(manifest) for manifest in self.manifests)
        """Micro-batches in an epoch; the same for all epochs."""
        self.shift = 0
        """Added to the index of a micro-batch, it counts them as if each epoch before were whole."""
        self._rest: Rest | None = None
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
        rest = self._rest_of(number)
        return self._drawn(number) if rest is None else rest.order

    def place(self, index: int) -> tuple[int, int]:
        """The epoch of the micro-batch at `index`, counted from the start of the run, and its place there."""
        return divmod(index + self.shift, self.batches_per_epoch)

    def micro_batch(self, index: int) -> tuple[int, MicroBatch]:
        """The epoch and the micro-batch at `index`, counted from the start of the run."""
        number, place = self.place(index)
        return number, self.epoch(number)[place]

    def by_bucket(self) -> list[tuple[MicroBatch, int]]:
        """A micro-batch of each bucket of each set, and how many micro-batches a whole epoch has of it."""
        return self._drawn(0).by_bucket()

    def _resumed(self, index: int, batch_size: int, new_index: int) -> "Order":
        """This order from the micro-batch at `index` on, cut into batches of `batch_size`. That one is at `new_index`
        there.
        """
        epoch, place = self.place(index)
        order, first = Order(self.manifests, seed=self.seed, batch_size=batch_size), 0
        if place > 0:
            order._rest = order._draw_rest(epoch, self._due(epoch, place))
            first = order._rest.first
        order.shift = epoch * order.batches_per_epoch + first - new_index
        return order

    def _rest_of(self, epoch: int) -> Rest | None:
        return self._rest if self._rest is not None and self._rest.epoch == epoch else None

    def _due(self, epoch: int, place: int) -> tuple[Int64[np.ndarray, " _"], ...]:
        """How often each sample of each set is due from `place` on, without what fills batches."""
        rest, batches = self._rest_of(epoch), self.epoch(epoch)
        seen, coming = ([np.zeros(len(each.samples), dtype=np.int64) for each in self.manifests] for _ in range(2))
        for number in range(0 if rest is None else rest.first, self.batches_per_epoch):
            for visit in batches[number].visits:
                (seen if number < place else coming)[visit.set_index][visit.sample_index] += 1
        due = []
        for index, manifest in enumerate(self.manifests):
            most = manifest.image_set.repeats + 1 if rest is None else rest.due[index]
            # Of a set with a probability, an epoch has fewer.
            due.append((np.minimum(seen[index] + coming[index], most) - seen[index]).clip(min=0))
        return tuple(due)

    def _draw_rest(self, epoch: int, due: tuple[Int64[np.ndarray, " _"], ...]) -> Rest:
        """The rest of an epoch, cut into batches of this order."""
        buckets = []
        for set_index, manifest in enumerate(self.manifests):
            for bucket, samples in manifest.buckets.items():
                members = np.array(samples, dtype=np.int32)
                visits = members.repeat(due[set_index][members])
                key = (epoch, manifest.image_set.id, f"{bucket[0]}x{bucket[1]}", "rest")
                batches = self._draw_batches(visits, members, self._batch_size(manifest), key)
                buckets.append(BucketBatches(set_index, bucket, batches))
        count = sum(len(bucket.samples) for bucket in buckets)
        numbers = permutation(count, draw_seed(self.seed, "order", epoch, "rest"))[: self.batches_per_epoch]
        first = self.batches_per_epoch - len(numbers)
        places = np.concatenate([np.zeros(first, dtype=np.int32), numbers.astype(np.int32)])
        return Rest(epoch, first, due, EpochOrder(buckets, places))

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
        key = (epoch, manifest.image_set.id, f"{bucket[0]}x{bucket[1]}")
        members = np.array(manifest.buckets[bucket], dtype=np.int32)
        visits = np.tile(members, manifest.image_set.repeats + 1)
        return self._draw_batches(visits, members, self._batch_size(manifest), key)

    def _draw_batches(
        self,
        visits: Int32[np.ndarray, " visits"],
        members: Int32[np.ndarray, " samples"],
        size: int,
        key: tuple[int | str, ...],
    ) -> Int32[np.ndarray, "batches size"]:
        """`visits` shuffled and cut into batches of `size`, of which the last is filled from all `members`."""
        visits = visits[permutation(len(visits), draw_seed(self.seed, "order", *key))]
        if left := len(visits) % size:
            again = members[permutation(len(members), draw_seed(self.seed, "order", *key, "fill"))]
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
