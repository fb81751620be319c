"""The order as arrays against the same order in pure Python, micro-batch for micro-batch."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.draws import draw_seed
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ImageSet
from simpletuner.data.geometry import Geometry, Size
from simpletuner.data.manifest import Manifest
from simpletuner.data.order import Cut, MicroBatch, Order, Visit, permutation
from simpletuner.data.sample import Sample

SIZES: tuple[Size, ...] = ((64, 64), (48, 80), (80, 48), (96, 32), (32, 96))


def manifest(name: str, targets: Sequence[Size], **keys: Any) -> Manifest:
    """A set whose samples have the sizes `targets`, in this order."""
    samples = tuple(
        Sample(name, LocalStorage(Path()), f"{index}.png", "", *target, Geometry(target, target, (0, 0)), ("",))
        for index, target in enumerate(targets)
    )
    image_set = ImageSet.model_validate({"id": name, "instance_data_dir": "."} | keys)
    return Manifest(image_set, samples, (), ())


def micro_batches(order: Order, epoch: int) -> list[MicroBatch]:
    """All of an epoch, in turn."""
    first = epoch * len(order.epoch(0))
    placed = [order.micro_batch(first + place) for place in range(len(order.epoch(0)))]
    assert {number for number, _ in placed} == {epoch}
    return [micro_batch for _, micro_batch in placed]


def reference_epoch(manifests: Sequence[Manifest], seed: int, batch_size: int, epoch: int) -> list[MicroBatch]:
    """The epoch by Python's own generator and sort, as the first release drew it."""
    batches: list[MicroBatch] = []
    for set_index, each in enumerate(manifests):
        batches += reference_set(set_index, each, seed, each.image_set.train_batch_size or batch_size, epoch)
    return reference_shuffled(batches, draw_seed(seed, "order", epoch))


def reference_set(set_index: int, each: Manifest, seed: int, size: int, epoch: int) -> list[MicroBatch]:
    name = each.image_set.id
    batches = []
    for bucket, members in each.buckets.items():
        place = (epoch, name, f"{bucket[0]}x{bucket[1]}")
        indices = reference_shuffled(members * (each.image_set.repeats + 1), draw_seed(seed, "order", *place))
        missing = -len(indices) % size
        last = set(indices[len(indices) - len(indices) % size :])
        again = reference_shuffled(members, draw_seed(seed, "order", *place, "fill"))
        again = [index for index in again if index not in last] + [index for index in again if index in last]
        indices += [again[turn % len(again)] for turn in range(missing)]
        for start in range(0, len(indices), size):
            visits = tuple(Visit(set_index, index) for index in indices[start : start + size])
            batches.append(MicroBatch(visits, bucket))
    if each.image_set.probability < 1:
        kept = max(1, round(each.image_set.probability * len(batches)))
        batches = reference_shuffled(batches, draw_seed(seed, "order", epoch, name, "probability"))[:kept]
    return batches


def reference_shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def random_manifests(draw: random.Random) -> Iterator[Manifest]:
    for index in range(draw.randint(1, 3)):
        sizes = draw.sample(SIZES, draw.randint(1, len(SIZES)))
        yield manifest(
            f"set-{index}",
            draw.choices(sizes, k=draw.randint(1, 40)),
            repeats=draw.randint(0, 3),
            probability=draw.choice((1.0, 1.0, 0.5, 0.3, 0.01)),
            train_batch_size=draw.choice((None, None, 1, 2, 7)),
        )


@pytest.mark.parametrize("case", range(60))
def test_every_epoch_is_the_one_that_pure_python_draws(case: int) -> None:
    draw = random.Random(case)
    manifests = list(random_manifests(draw))
    seed, batch_size = draw.choice((0, 1, 42, 2**40, -3)), draw.randint(1, 5)
    order = Order(manifests, seed=seed, batch_size=batch_size)
    for epoch in (0, 1, 3, 2, 0):
        expected = reference_epoch(manifests, seed, batch_size, epoch)
        assert micro_batches(order, epoch) == expected
        assert len(expected) == len(order.epoch(0))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_a_permutation_sorts_the_numbers_of_pythons_generator(seed: int) -> None:
    assert permutation(2000, seed).tolist() == reference_shuffled(range(2000), seed)


@pytest.mark.parametrize("case", range(20))
def test_what_an_epoch_says_of_its_buckets_is_counted_from_its_micro_batches(case: int) -> None:
    draw = random.Random(case)
    order = Order(list(random_manifests(draw)), seed=case, batch_size=draw.randint(1, 5))
    listed = micro_batches(order, 1)
    buckets = [(batch.visits[0].set_index, batch.bucket) for batch in listed]
    expected = [(listed[buckets.index(bucket)], count) for bucket, count in Counter(buckets).items()]
    assert order.epoch(1).by_bucket() == expected
    assert order.epoch(1).batch_sizes().tolist() == [len(batch.visits) for batch in listed]


def test_threads_may_walk_through_different_epochs_of_one_order() -> None:
    manifests = [manifest("a", SIZES * 10, repeats=1)]
    order = Order(manifests, seed=1, batch_size=2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda epoch: micro_batches(order, epoch), range(12)))
    assert found == [reference_epoch(manifests, 1, 2, epoch) for epoch in range(12)]


@pytest.mark.parametrize(
    ("keys", "batch_size", "epoch", "expected"),
    [
        ({}, 1, 0, "5d285bed5fc2d781"),
        ({}, 4, 1, "fdc0942465c0b343"),
        ({"repeats": 2}, 5, 0, "f510580502567552"),
        ({"repeats": 1, "probability": 0.3}, 3, 2, "eff0cedf5d98b08a"),
    ],
)
def test_orders_of_the_first_release_stay(keys: dict[str, Any], batch_size: int, epoch: int, expected: str) -> None:
    targets = [SIZES[index * index % 7 % len(SIZES)] for index in range(50)]
    order = Order(
        [manifest("a", targets, **keys), manifest("b", targets[:9], train_batch_size=2)],
        seed=42,
        batch_size=batch_size,
    )
    listed = [
        (batch.bucket, [(visit.set_index, visit.sample_index) for visit in batch.visits])
        for batch in micro_batches(order, epoch)
    ]
    assert hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16] == expected


def windows(draw: random.Random) -> dict[str, int]:
    """Keys of a window in steps, in epochs, in both, or none."""
    keys = {}
    for noun, most in (("step", 14), ("epoch", 5)):
        if draw.random() < 0.6:
            first = keys[f"start_{noun}"] = draw.randint(0, most)
            if draw.random() < 0.7:
                keys[f"end_{noun}"] = draw.randint(max(first, 1), most + 4)
    return keys


def reference_steps(
    manifests: Sequence[Manifest], seed: int, batch_size: int, per_step: int, steps: int
) -> list[list[tuple[int, MicroBatch]]]:
    """Step by step, with the epoch of each micro-batch, to where no set is active."""

    def active(step: int, epoch: int) -> list[int]:
        return [index for index, each in enumerate(manifests) if each.image_set.is_active(step, epoch + 1)]

    def drawn(sets: list[int], epoch: int) -> list[MicroBatch]:
        batches = []
        for index in sets:
            each = manifests[index]
            batches += reference_set(index, each, seed, each.image_set.train_batch_size or batch_size, epoch)
        return reference_shuffled(batches, draw_seed(seed, "order", epoch))

    found: list[list[tuple[int, MicroBatch]]] = []
    epoch, sets = 0, active(1, 0)
    left = drawn(sets, epoch)
    is_new = True
    for step in range(1, steps + 1):
        if active(step, epoch) != sets:
            epoch += not is_new
            sets = active(step, epoch)
            left, is_new = drawn(sets, epoch), True
        if not sets:
            return found
        found.append([])
        while len(found[-1]) < per_step:
            found[-1].append((epoch, left.pop(0)))
            is_new = not left
            if is_new:
                epoch += 1
                # A step that is begun goes on with the sets of the last epoch where none follows.
                sets = active(step, epoch) or sets
                left = drawn(sets, epoch)
    return found


@pytest.mark.parametrize("case", range(40))
def test_windows_change_what_is_drawn_at_the_step_or_epoch_that_they_name(case: int) -> None:
    draw = random.Random(case)
    manifests = [
        manifest(each.image_set.id, [s.geometry.target for s in each.samples[:9]], **each_keys(each), **windows(draw))
        for each in random_manifests(draw)
    ]
    per_step, steps = draw.randint(1, 4), 20
    order = Order(manifests, seed=case, batch_size=2, batches_per_step=per_step)
    expected = reference_steps(manifests, case, 2, per_step, steps)
    for number, step in enumerate(expected):
        assert [order.micro_batch(number * per_step + place) for place in range(per_step)] == step
    gaps = order.gaps(steps * per_step)
    assert (gaps[0][0] if gaps else steps + 1) == len(expected) + 1
    # Where an epoch ends: what comes next is of a later one.
    for epoch in range(1, expected[-1][-1][0] + 1) if expected else ():
        end = order.end_of(epoch)
        assert end is not None
        assert order.position(end - 1)[0] < epoch <= order.position(end)[0]


def each_keys(each: Manifest) -> dict[str, Any]:
    own = each.image_set
    return {"repeats": own.repeats, "probability": own.probability, "train_batch_size": own.train_batch_size}


@pytest.mark.parametrize("case", range(16))
def test_windows_stay_where_the_batch_size_changes(case: int) -> None:
    """Steps of four images before and after: what is active in each step stays, and epochs are counted on."""
    draw = random.Random(case)
    manifests = [
        manifest("a", SIZES * 3, start_step=draw.randint(0, 4), end_step=draw.randint(5, 30)),
        manifest("b", SIZES * 2, start_step=draw.randint(5, 20)),
        manifest("c", SIZES[:2] * 2),
    ]
    before, after = draw.sample((1, 2, 4), 2)
    steps = draw.randint(1, 25)
    cut, now = Cut(steps, before, 4 // before), Cut(steps, after, 4 // after)
    old = Order(manifests, seed=case, batch_size=before, batches_per_step=4 // before)
    new = Order.of(manifests, seed=case, cuts=[cut], now=now)
    epoch, _ = old.position(steps * cut.batches_per_step)
    assert new.position(steps * now.batches_per_step)[0] in (epoch, epoch + 1)
    last = epoch
    for step in range(steps, 40):
        for place in range(now.batches_per_step):
            number, micro_batch = new.micro_batch(step * now.batches_per_step + place)
            assert number >= last
            last = number
            (index,) = {visit.set_index for visit in micro_batch.visits}
            assert manifests[index].image_set.is_active(step + 1, number + 1)
