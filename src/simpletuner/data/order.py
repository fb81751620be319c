"""In which order the pictures are seen. A pure function of (manifests, seed, epoch): nothing to save, nothing
to restore."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from simpletuner.base.draws import draw_seed
from simpletuner.data.geometry import Size
from simpletuner.data.manifest import Manifest

T = TypeVar("T")


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
        self._latest = (0, self._drawn(0))
        self.batches_per_epoch = len(self._latest[1])
        """Micro-batches in an epoch; the same for all epochs."""

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

    def epoch(self, number: int) -> list[MicroBatch]:
        """All micro-batches of epoch `number`, counted from 0."""
        latest = self._latest  # held here: a thread that reads ahead may replace it
        if latest[0] != number:
            latest = self._latest = (number, self._drawn(number))
        return latest[1]

    def micro_batch(self, index: int) -> tuple[int, MicroBatch]:
        """The epoch and the micro-batch at `index`, counted from the start of the run."""
        number, place = divmod(index, self.batches_per_epoch)
        return number, self.epoch(number)[place]

    def _batch_size(self, manifest: Manifest) -> int:
        own = manifest.image_set.train_batch_size
        return self.batch_size if own is None else own

    def _drawn(self, epoch: int) -> list[MicroBatch]:
        batches: list[MicroBatch] = []
        for set_index, manifest in enumerate(self.manifests):
            batches += self._drawn_of_set(epoch, set_index, manifest)
        return shuffled(batches, draw_seed(self.seed, "order", epoch))

    def _drawn_of_set(self, epoch: int, set_index: int, manifest: Manifest) -> list[MicroBatch]:
        size = self._batch_size(manifest)
        name = manifest.image_set.id
        batches = []
        for bucket, members in manifest.buckets.items():
            place = (epoch, name, f"{bucket[0]}x{bucket[1]}")
            visits = shuffled(members * (manifest.image_set.repeats + 1), draw_seed(self.seed, "order", *place))
            missing = -len(visits) % size
            last = set(visits[len(visits) - len(visits) % size :])
            again = shuffled(members, draw_seed(self.seed, "order", *place, "fill"))
            others_first = [m for m in again if m not in last] + [m for m in again if m in last]
            visits += [others_first[turn % len(others_first)] for turn in range(missing)]
            for start in range(0, len(visits), size):
                chosen = tuple(Visit(set_index, index) for index in visits[start : start + size])
                batches.append(MicroBatch(chosen, bucket))
        if manifest.image_set.probability < 1:
            kept = max(1, round(manifest.image_set.probability * len(batches)))
            batches = shuffled(batches, draw_seed(self.seed, "order", epoch, name, "probability"))[:kept]
        return batches


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """`items` in an order drawn from `seed`.

    Sorted by `random()`, the one method whose sequence Python promises to keep between versions; `shuffle` is
    not.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]
