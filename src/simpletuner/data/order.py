"""The order in which a run uses its samples: a pure function of (manifests, seed, epoch), without state to save or
restore. An epoch is drawn and stored as arrays; a micro-batch becomes an object when it is requested.

Datasets with a window (`start_step`, `end_epoch`, …) divide a run into `Span`s, in each of which the same datasets are
active.
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
    """One use of one image: `manifests[set_index].samples[sample_index]`."""

    set_index: int
    sample_index: int


@dataclass(frozen=True)
class MicroBatch:
    """Images of one dataset and one bucket for one forward pass."""

    visits: tuple[Visit, ...]
    bucket: Size


@dataclass(frozen=True)
class BucketBatches:
    """The samples that an epoch draws from one bucket of a dataset, cut into batches."""

    set_index: int
    bucket: Size
    samples: Int32[np.ndarray, "batches size"]
    """Indices of the samples in their dataset."""


@dataclass(frozen=True)
class Cut:
    """The batch size of a run up to a step, after which the run was resumed with another batch size."""

    steps: int
    """The last step with this batch size."""
    batch_size: int
    """Images in a micro-batch."""
    batches_per_step: int
    """Micro-batches of a global batch, over all processes."""


@dataclass(frozen=True)
class Span:
    """A range of micro-batches with the same active datasets. It ends where the next span starts."""

    start: int
    """Index of the first micro-batch, counted from the start of the run."""
    epoch: int
    """Epoch of that micro-batch, counted from 0."""
    position: int
    """Its position in that epoch: above 0 if the batch size changed inside the epoch."""
    active: tuple[int, ...]
    """Indices of the active datasets, ascending; may be empty."""
    batches_per_epoch: int
    """0 if no dataset is active."""

    def at(self, index: int) -> tuple[int, int]:
        """The epoch of the micro-batch at `index`, and its position in the epoch."""
        if not self.active:
            return self.epoch, 0
        epochs, position = divmod(index - self.start + self.position, self.batches_per_epoch)
        return self.epoch + epochs, position

    def index_of(self, epoch: int) -> int:
        """Index of the first micro-batch of `epoch`, extrapolated if the epoch lies outside the span."""
        return self.start - self.position + (epoch - self.epoch) * self.batches_per_epoch


class EpochOrder:
    """The micro-batches of one epoch: `order[position]`, counted from 0."""

    def __init__(self, buckets: Sequence[BucketBatches], numbers: Int32[np.ndarray, " batches"]) -> None:
        """`numbers[position]` is a batch's number, counted through all `buckets`, one bucket after the other."""
        self._buckets = tuple(buckets)
        self._numbers = numbers
        self._starts = [0, *itertools.accumulate(len(bucket.samples) for bucket in buckets[:-1])]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> MicroBatch:
        number = int(self._numbers[position])
        index = bisect.bisect_right(self._starts, number) - 1
        bucket = self._buckets[index]
        samples = bucket.samples[number - self._starts[index]].tolist()
        return MicroBatch(tuple(Visit(bucket.set_index, sample) for sample in samples), bucket.bucket)

    def batch_sizes(self) -> Int32[np.ndarray, " batches"]:
        """Number of samples in each micro-batch."""
        sizes = np.array([bucket.samples.shape[1] for bucket in self._buckets], dtype=np.int32)
        return sizes.take(self._bucket_indices())

    def by_bucket(self) -> list[tuple[MicroBatch, int]]:
        """The first micro-batch of each bucket of each dataset, with the bucket's number of micro-batches, in order."""
        _, firsts, counts = np.unique(self._bucket_indices(), return_index=True, return_counts=True)
        return [(self[first], count) for first, count in sorted(zip(firsts.tolist(), counts.tolist(), strict=True))]

    def _bucket_indices(self) -> Int64[np.ndarray, " batches"]:
        counts = [len(bucket.samples) for bucket in self._buckets]
        return np.arange(len(counts)).repeat(counts).take(self._numbers)


@dataclass(frozen=True)
class EpochRemainder:
    """The remainder of an epoch in which the batch size changed."""

    epoch: int
    first: int
    """Position of its first micro-batch, as if the whole epoch had the new batch size."""
    due: tuple[Int64[np.ndarray, " _"], ...]
    """Number of uses of each sample of each dataset, without those that fill batches."""
    order: EpochOrder
    """Micro-batches from position `first` on; earlier positions have no meaning."""


class Order:
    """The endless sequence of micro-batches of a run.

    An epoch uses each image `repeats` + 1 times, shuffled within its bucket and cut into batches of the dataset's
    `train_batch_size` (or `batch_size`). An incomplete last batch is filled by drawing again within the bucket, images
    outside that batch first. With `probability` p, an epoch uses the share p of the dataset's batches, at least one,
    drawn for each epoch. Batches are drawn rather than images, so that every epoch has the same length. Then the
    batches of all datasets are shuffled together.

    Datasets with a window are drawn in the epochs and steps in which they are active. When the active datasets change,
    a new epoch begins, and an unfinished epoch is cut short. Windows in steps change between global batches, windows in
    epochs at the end of an epoch.

    If a run is resumed with another batch size, the remainder of its epoch is cut into new batches (`of`): each image
    is used as often as before, apart from the images that fill batches.
    """

    @classmethod
    def of(cls, manifests: Sequence[Manifest], *, seed: int, cuts: Sequence[Cut], now: Cut) -> "Order":
        """The order of a run with the batch sizes `cuts`, one after the other, and `now` after them. Indices of
        micro-batches count as if `now` applied from the start: step n, counted from 0, begins at index
        n · `batches_per_step`.
        """
        first, *later = [*cuts, now]
        order = cls(manifests, seed=seed, batch_size=first.batch_size, batches_per_step=first.batches_per_step)
        for cut, following in zip(cuts, later, strict=True):
            order = order._resumed(cut.steps, following)
        return order

    def __init__(self, manifests: Sequence[Manifest], *, seed: int, batch_size: int, batches_per_step: int = 1) -> None:
        """`batches_per_step` is the number of micro-batches in a global batch; windows in steps change between global
        batches."""
        self.manifests = tuple(manifests)
        self.seed = seed
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.spans = self._spans(0, 0, 0)
        """Sorted by start and epoch; a single span if no dataset has a window."""
        self._remainder: EpochRemainder | None = None
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices for the user about buckets that do not divide into batches."""
        texts = []
        for manifest in self.manifests:
            size = self._batch_size(manifest)
            passes = manifest.image_set.repeats + 1
            visits = {bucket: len(members) * passes for bucket, members in manifest.buckets.items()}
            short = {bucket: -count % size for bucket, count in visits.items() if count % size}
            if short:
                text = (
                    f"{manifest.image_set.id}: {len(short)} of {len(visits)} buckets do not divide into "
                    f"batches of {size}; {sum(short.values())} extra images per epoch are drawn to fill them"
                )
                small = [f"{w}x{h}" for (w, h), count in visits.items() if count < size]
                if small:
                    named = ", ".join(small[:5]) + (", …" if len(small) > 5 else "")
                    text += f" (smaller than one batch: {named})"
                texts.append(text + ".")
        return tuple(texts)

    def epoch(self, number: int) -> EpochOrder:
        """Epoch `number`, counted from 0. The latest two are cached, since a step may end one and begin the next.

        Thread-safe.
        """
        remainder = self._remainder_of(number)
        return self._drawn(number) if remainder is None else remainder.order

    def position(self, index: int) -> tuple[int, int]:
        """The epoch of the micro-batch at `index`, counted from the start of the run, and its position in the epoch."""
        return _last(self.spans, index, lambda span: span.start).at(index)

    def micro_batch(self, index: int) -> tuple[int, MicroBatch]:
        """The epoch and the micro-batch at `index`, counted from the start of the run."""
        number, position = self.position(index)
        return number, self.epoch(number)[position]

    def end_of(self, epochs: int) -> int | None:
        """The index after the last micro-batch of the first `epochs` epochs; None if no dataset is active before their
        end.
        """
        span = self._span_of(epochs - 1)
        if not span.active:
            return None
        following = [later.start for later in self.spans if later.start > span.start]
        return min([span.index_of(epochs), *following[:1]])

    def gaps(self, end: int | None) -> list[tuple[int, int | None]]:
        """First and last step, counted from 1, of each span without an active dataset that begins before the
        micro-batch at `end`; with None, of all such spans. The last step is None if no dataset is active afterwards.
        """
        ends = [*(span.start // self.batches_per_step for span in self.spans[1:]), None]
        return [
            (span.start // self.batches_per_step + 1, last)
            for span, last in zip(self.spans, ends, strict=True)
            if not span.active and (end is None or span.start < end)
        ]

    def visits(self, end: int) -> float:
        """Number of images in the micro-batches before `end`. A partial epoch counts as its share of a whole one."""
        return sum(epochs * int(self.epoch(span.epoch).batch_sizes().sum()) for span, epochs in self._epochs(end))

    def by_bucket(self) -> list[MicroBatch]:
        """A micro-batch of each bucket of each dataset, regardless of the dataset's window and `probability`."""
        return [
            EpochOrder([BucketBatches(index, bucket, self._draw_bucket(0, manifest, bucket))], np.zeros(1, np.int32))[0]
            for index, manifest in enumerate(self.manifests)
            for bucket in manifest.buckets
        ]

    def batches_shown(self, end: int) -> Iterator[tuple[MicroBatch, float]]:
        """A micro-batch of each bucket of each dataset, and the number of the bucket's micro-batches before `end`.

        A partial epoch counts as its share of a whole one. A bucket is repeated for each span in which its dataset is
        active.
        """
        for span, epochs in self._epochs(end):
            for micro_batch, count in self.epoch(span.epoch).by_bucket():
                yield micro_batch, count * epochs

    def _epochs(self, end: int) -> Iterator[tuple[Span, float]]:
        """The spans with active datasets before the micro-batch at `end`, and the number of epochs of each."""
        ends = [*(span.start for span in self.spans[1:]), end]
        for span, last in zip(self.spans, ends, strict=True):
            if span.active and span.start < end:
                yield span, (min(last, end) - span.start) / span.batches_per_epoch

    def _spans(self, start: int, epoch: int, position: int) -> tuple[Span, ...]:
        """The spans of a run from the micro-batch at `start` on, which is at `position` of `epoch`."""
        image_sets = [manifest.image_set for manifest in self.manifests]
        steps = {step for each in image_sets for step in (each.start_step - 1, each.end_step or 0) if step > 0}
        epochs = {last for each in image_sets for last in (each.start_epoch - 1, each.end_epoch or 0) if last > 0}

        def span(index: int, epoch: int, position: int) -> Span:
            step = index // self.batches_per_step + 1
            active = tuple(number for number, each in enumerate(image_sets) if each.is_active(step, epoch + 1))
            return Span(
                index, epoch, position, active, sum(self._batches_per_epoch(self.manifests[each]) for each in active)
            )

        # At the end of an epoch, the span begins with the next one.
        spans, index = [span(start, *span(start, epoch, position).at(start))], start
        while True:
            current = spans[-1]
            changes = [change for step in steps if (change := step * self.batches_per_step) > index]
            if current.active:
                changes += [current.index_of(last) for last in epochs if last > current.at(index)[0]]
            if not changes:
                return tuple(spans)
            index = min(changes)
            if not span(index, *current.at(index)).active:  # the last global batch is filled from one more epoch
                index += -index % self.batches_per_step
            epoch, position = current.at(index)
            if span(index, epoch, position).active != current.active:
                spans.append(span(index, epoch + (position > 0), 0))

    def _span_of(self, epoch: int) -> Span:
        return _last(self.spans, epoch, lambda span: span.epoch)

    def _resumed(self, steps: int, cut: Cut) -> "Order":
        """This order with the batch size of `cut` after the first `steps` steps."""
        epoch, position = self.position(steps * self.batches_per_step)
        order = Order(self.manifests, seed=self.seed, batch_size=cut.batch_size, batches_per_step=cut.batches_per_step)
        start = steps * order.batches_per_step
        order.spans = order._spans(start, epoch, 0)
        if position > 0:
            order._remainder = order._draw_remainder(epoch, self._due(epoch, position))
            order.spans = order._spans(start, epoch, order._remainder.first)
        return order

    def _remainder_of(self, epoch: int) -> EpochRemainder | None:
        return self._remainder if self._remainder is not None and self._remainder.epoch == epoch else None

    def _due(self, epoch: int, position: int) -> tuple[Int64[np.ndarray, " _"], ...]:
        """Number of uses of each sample of each dataset from `position` on, without those that fill batches."""
        remainder, batches = self._remainder_of(epoch), self.epoch(epoch)
        past, future = ([np.zeros(len(each.samples), dtype=np.int64) for each in self.manifests] for _ in range(2))
        for number in range(0 if remainder is None else remainder.first, len(batches)):
            for visit in batches[number].visits:
                (past if number < position else future)[visit.set_index][visit.sample_index] += 1
        due = []
        for index, manifest in enumerate(self.manifests):
            limit = manifest.image_set.repeats + 1 if remainder is None else remainder.due[index]
            # With a probability below 1, an epoch has fewer uses than the limit.
            due.append((np.minimum(past[index] + future[index], limit) - past[index]).clip(min=0))
        return tuple(due)

    def _draw_remainder(self, epoch: int, due: tuple[Int64[np.ndarray, " _"], ...]) -> EpochRemainder:
        """The remainder of an epoch, cut into batches of this order."""
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
        padded = np.concatenate([np.zeros(first, dtype=np.int32), numbers.astype(np.int32)])
        return EpochRemainder(epoch, first, due, EpochOrder(buckets, padded))

    def _batch_size(self, manifest: Manifest) -> int:
        dataset_batch_size = manifest.image_set.train_batch_size
        return self.batch_size if dataset_batch_size is None else dataset_batch_size

    def _batches(self, manifest: Manifest) -> int:
        """Number of micro-batches of a dataset in an epoch with `probability` 1."""
        passes, size = manifest.image_set.repeats + 1, self._batch_size(manifest)
        return sum(math.ceil(len(members) * passes / size) for members in manifest.buckets.values())

    def _batches_per_epoch(self, manifest: Manifest) -> int:
        """Number of micro-batches of a dataset in an epoch."""
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
            [start + self._draw_numbers(epoch, manifest) for start, manifest in zip(starts, manifests, strict=False)]
        )
        return EpochOrder(buckets, numbers[permutation(len(numbers), draw_seed(self.seed, "order", epoch))])

    def _draw_numbers(self, epoch: int, manifest: Manifest) -> Int32[np.ndarray, " batches"]:
        """Numbers of the dataset's batches that the epoch uses."""
        numbers = np.arange(self._batches(manifest), dtype=np.int32)
        if manifest.image_set.probability == 1:
            return numbers
        key = draw_seed(self.seed, "order", epoch, manifest.image_set.id, "probability")
        return numbers.take(permutation(len(numbers), key)[: self._batches_per_epoch(manifest)])

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
        """Shuffle `visits` and cut them into batches of `size`; the last batch is filled from all `members`."""
        visits = visits[permutation(len(visits), draw_seed(self.seed, "order", *key))]
        if excess := len(visits) % size:
            fillers = members[permutation(len(members), draw_seed(self.seed, "order", *key, "fill"))]
            is_in_last = np.isin(fillers, visits[-excess:])
            others_first = np.concatenate([fillers[~is_in_last], fillers[is_in_last]])
            visits = np.concatenate([visits, np.resize(others_first, size - excess)])
        return visits.reshape(-1, size)


def _last(spans: Sequence[Span], number: int, key: Callable[[Span], int]) -> Span:
    """The last of `spans` whose `key` is at most `number`; the first span if there is none."""
    return spans[max(bisect.bisect_right(spans, number, key=key) - 1, 0)]


def permutation(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """A permutation of 0 … count - 1 drawn from `seed`: sorted by the numbers of `random.Random(seed).random()`.

    numpy's `random_sample` returns the same numbers from the same state. Python and numpy (`RandomState`) both
    guarantee this sequence across versions; Python does not guarantee it for `shuffle`.
    """
    _, (*key, position), _ = random.Random(seed).getstate()
    generator = np.random.RandomState(0)
    generator.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": position}})
    return generator.random_sample(count).argsort(kind="stable")
