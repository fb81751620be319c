"""The order in which a run sees its samples. A pure function of (manifests, seed, epoch): nothing to save, nothing
to restore. An epoch is drawn and held as arrays; a micro-batch becomes an object when it is asked for.

Image sets with a window of activity make it piecewise: a `Span` for each stretch in which the same sets are active.
"""

import bisect
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Span:
    """Micro-batches through which the same sets are active. It ends where the next one starts."""

    start: int
    """Index of the first micro-batch, counted from the start of the run."""
    epoch: int
    """Epoch of that micro-batch, counted from 0."""
    place: int
    """Its place in that epoch: above 0 where the batch size changed inside it."""
    active: tuple[int, ...]
    """Indices of the sets, rising; empty where no set is active."""
    batches_per_epoch: int
    """0 where no set is active."""

    def at(self, index: int) -> tuple[int, int]:
        """The epoch of the micro-batch at `index`, and its place there."""
        if not self.active:
            return self.epoch, 0
        epochs, place = divmod(index - self.start + self.place, self.batches_per_epoch)
        return self.epoch + epochs, place

    def index_of(self, epoch: int) -> int:
        """Where `epoch` begins, or would if the span reached that far or as far back."""
        return self.start - self.place + (epoch - self.epoch) * self.batches_per_epoch


class EpochOrder:
    """The micro-batches of one epoch: `order[place]`, counted from 0."""

    def __init__(self, buckets: Sequence[BucketBatches], numbers: Int32[np.ndarray, " places"]) -> None:
        """`numbers[place]` counts through the batches of all `buckets`, one bucket after the other."""
        self._buckets = tuple(buckets)
        self._numbers = numbers
        self._starts = [0, *itertools.accumulate(len(bucket.samples) for bucket in buckets[:-1])]

    def __len__(self) -> int:
        return len(self._numbers)

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

    Sets with a window are drawn in the epochs and steps in which they are active. Where that changes, a new epoch
    begins, and the one before is cut short if it is not at its end. Windows in steps change between global batches,
    those in epochs wherever an epoch ends.

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
        order = cls(manifests, seed=seed, batch_size=first.batch_size, batches_per_step=first.batches_per_step)
        for cut, following in zip(cuts, later, strict=True):
            order = order._resumed(cut.steps, following)
        return order

    def __init__(self, manifests: Sequence[Manifest], *, seed: int, batch_size: int, batches_per_step: int = 1) -> None:
        """`batches_per_step` are the micro-batches of a global batch, at whose ends windows in steps change."""
        self.manifests = tuple(manifests)
        self.seed = seed
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.spans = self._spans(0, 0, 0)
        """By their start and epoch, rising; a single one where no set has a window."""
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
        return _last(self.spans, index, lambda span: span.start).at(index)

    def micro_batch(self, index: int) -> tuple[int, MicroBatch]:
        """The epoch and the micro-batch at `index`, counted from the start of the run."""
        number, place = self.place(index)
        return number, self.epoch(number)[place]

    def end_of(self, epochs: int) -> int | None:
        """The index after the last micro-batch of the first `epochs` epochs; None where no set is active before they
        are over.
        """
        span = self._span_of(epochs - 1)
        if not span.active:
            return None
        following = [later.start for later in self.spans if later.start > span.start]
        return min([span.index_of(epochs), *following[:1]])

    def gaps(self, end: int | None) -> list[tuple[int, int | None]]:
        """The first and last step, counted from 1, of each stretch without an active set that begins before the
        micro-batch at `end`; None looks at all. The last is None where no set is active ever after.
        """
        ends = [*(span.start // self.batches_per_step for span in self.spans[1:]), None]
        return [
            (span.start // self.batches_per_step + 1, last)
            for span, last in zip(self.spans, ends, strict=True)
            if not span.active and (end is None or span.start < end)
        ]

    def visits(self, end: int) -> float:
        """How many images the micro-batches before `end` show, in whole epochs' proportions."""
        return sum(epochs * int(self.epoch(span.epoch).batch_sizes().sum()) for span, epochs in self._epochs(end))

    def by_bucket(self) -> list[MicroBatch]:
        """A micro-batch of each bucket of each set, whatever the set's window and `probability`."""
        return [
            EpochOrder([BucketBatches(index, bucket, self._draw_bucket(0, manifest, bucket))], np.zeros(1, np.int32))[0]
            for index, manifest in enumerate(self.manifests)
            for bucket in manifest.buckets
        ]

    def shown(self, end: int) -> Iterator[tuple[MicroBatch, float]]:
        """A micro-batch of each bucket of each set, and how many of it come before the micro-batch at `end`, in whole
        epochs' proportions. A bucket comes once for each span in which its set is active.
        """
        for span, epochs in self._epochs(end):
            for micro_batch, count in self.epoch(span.epoch).by_bucket():
                yield micro_batch, count * epochs

    def _epochs(self, end: int) -> Iterator[tuple[Span, float]]:
        """The spans with active sets before the micro-batch at `end`, and how many epochs of it each has."""
        ends = [*(span.start for span in self.spans[1:]), end]
        for span, last in zip(self.spans, ends, strict=True):
            if span.active and span.start < end:
                yield span, (min(last, end) - span.start) / span.batches_per_epoch

    def _spans(self, start: int, epoch: int, place: int) -> tuple[Span, ...]:
        """The spans of a run from the micro-batch at `start` on, which is at `place` of `epoch`."""
        own = [manifest.image_set for manifest in self.manifests]
        steps = {step for each in own for step in (each.start_step - 1, each.end_step or 0) if step > 0}
        epochs = {last for each in own for last in (each.start_epoch - 1, each.end_epoch or 0) if last > 0}

        def span(index: int, epoch: int, place: int) -> Span:
            step = index // self.batches_per_step + 1
            active = tuple(number for number, each in enumerate(own) if each.is_active(step, epoch + 1))
            return Span(index, epoch, place, active, sum(self._batches_kept(self.manifests[each]) for each in active))

        # Where nothing is left of the epoch, the next one begins.
        spans, index = [span(start, *span(start, epoch, place).at(start))], start
        while True:
            now = spans[-1]
            changes = [at for step in steps if (at := step * self.batches_per_step) > index]
            if now.active:
                changes += [now.index_of(last) for last in epochs if last > now.at(index)[0]]
            if not changes:
                return tuple(spans)
            index = min(changes)
            if not span(index, *now.at(index)).active:  # the last global batch is filled from one epoch more
                index += -index % self.batches_per_step
            epoch, place = now.at(index)
            if span(index, epoch, place).active != now.active:
                spans.append(span(index, epoch + (place > 0), 0))

    def _span_of(self, epoch: int) -> Span:
        return _last(self.spans, epoch, lambda span: span.epoch)

    def _resumed(self, steps: int, cut: Cut) -> "Order":
        """This order, cut as `cut` says after the first `steps` steps."""
        epoch, place = self.place(steps * self.batches_per_step)
        order = Order(self.manifests, seed=self.seed, batch_size=cut.batch_size, batches_per_step=cut.batches_per_step)
        start = steps * order.batches_per_step
        order.spans = order._spans(start, epoch, 0)
        if place > 0:
            order._rest = order._draw_rest(epoch, self._due(epoch, place))
            order.spans = order._spans(start, epoch, order._rest.first)
        return order

    def _rest_of(self, epoch: int) -> Rest | None:
        return self._rest if self._rest is not None and self._rest.epoch == epoch else None

    def _due(self, epoch: int, place: int) -> tuple[Int64[np.ndarray, " _"], ...]:
        """How often each sample of each set is due from `place` on, without what fills batches."""
        rest, batches = self._rest_of(epoch), self.epoch(epoch)
        seen, coming = ([np.zeros(len(each.samples), dtype=np.int64) for each in self.manifests] for _ in range(2))
        for number in range(0 if rest is None else rest.first, len(batches)):
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
        whole = self._span_of(epoch).batches_per_epoch
        numbers = permutation(count, draw_seed(self.seed, "order", epoch, "rest"))[:whole]
        first = whole - len(numbers)
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
        active = self._span_of(epoch).active
        manifests = [self.manifests[each] for each in active]
        buckets = [
            BucketBatches(set_index, bucket, self._draw_bucket(epoch, manifest, bucket))
            for set_index, manifest in zip(active, manifests, strict=True)
            for bucket in manifest.buckets
        ]
        starts = itertools.accumulate(map(self._batches, manifests), initial=0)
        numbers = np.concatenate(
            [start + self._draw_kept(epoch, manifest) for start, manifest in zip(starts, manifests, strict=False)]
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


def _last(spans: Sequence[Span], number: int, key: Callable[[Span], int]) -> Span:
    """The last of `spans` whose `key` is at most `number`; the first where none is."""
    return spans[max(bisect.bisect_right(spans, number, key=key) - 1, 0)]


def permutation(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """0 … count - 1 in an order drawn from `seed`: sorted by `random.Random(seed)`'s `random()`.

    numpy's `random_sample` gives the same numbers from the same state. Python and numpy (`RandomState`) both promise
    to keep that sequence between versions; Python does not promise it for `shuffle`.
    """
    _, (*key, position), _ = random.Random(seed).getstate()
    generator = np.random.RandomState(0)
    generator.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})
    return generator.random_sample(count).argsort(kind="stable")
