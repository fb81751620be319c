"""The order of a run: a function of manifests, seed and epoch."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.data.manifest import Manifest
from simpletuner.data.order import MicroBatch, Order, Visit, permutation

Scanned = Callable[..., Manifest]


@pytest.fixture
def manifest(save: Callable[..., Path], scanned: Scanned) -> Scanned:
    """Seven wide pictures and three tall ones."""
    for number in range(7):
        save(f"wide-{number}.png", (128, 64), f"rgb({number}, 0, 0)")
    for number in range(3):
        save(f"tall-{number}.png", (64, 128), f"rgb(0, {number}, 0)")
    return scanned


def epoch(order: Order, number: int) -> list[MicroBatch]:
    return [order.epoch(number)[place] for place in range(order.batches_per_epoch)]


def visits(batches: list[MicroBatch]) -> Counter[Visit]:
    return Counter(visit for batch in batches for visit in batch.visits)


def test_an_epoch_shows_each_picture_repeats_plus_one_times(manifest: Scanned) -> None:
    order = Order([manifest(repeats=2)], seed=1, batch_size=1)
    assert order.batches_per_epoch == 30
    for number in (0, 1, 7):
        assert set(visits(epoch(order, number)).values()) == {3}
    assert order.notices == ()
    assert epoch(order, 0) != epoch(order, 1)


def test_a_batch_is_of_one_bucket_and_incomplete_ones_are_filled_within_it(manifest: Scanned) -> None:
    found = manifest()
    order = Order([found], seed=1, batch_size=4)
    assert order.batches_per_epoch == 3
    for number in range(5):
        batches = epoch(order, number)
        for batch in batches:
            assert len(batch.visits) == 4
            shown = [found.samples[visit.sample_index] for visit in batch.visits]
            assert {sample.geometry.target for sample in shown} == {batch.bucket}
        counts = visits(batches)
        assert len(counts) == 10, "every picture is seen"
        for batch in batches:
            most = 1 if batch.bucket == (80, 48) else 2
            assert max(Counter(batch.visits).values()) <= most, "other pictures first"
    (notice,) = order.notices
    assert "2 of 2 buckets do not divide into batches of 4; 2 visits an epoch are drawn again" in notice
    assert "smaller than one batch: 48x80" in notice


def test_a_bucket_much_smaller_than_a_batch_is_drawn_with_repetition(manifest: Scanned) -> None:
    order = Order([manifest()], seed=1, batch_size=16)
    counts = visits([batch for batch in epoch(order, 0) if batch.bucket == (48, 80)])
    assert sorted(counts.values()) == [5, 5, 6]


def test_a_set_may_have_its_own_batch_size(manifest: Scanned) -> None:
    order = Order([manifest(train_batch_size=2)], seed=1, batch_size=5)
    assert {len(batch.visits) for batch in epoch(order, 0)} == {2}


def test_probability_is_a_share_that_changes_every_epoch_and_never_its_length(manifest: Scanned) -> None:
    order = Order([manifest(probability=0.3)], seed=1, batch_size=1)
    assert order.batches_per_epoch == 3
    for number in range(30):
        with pytest.raises(IndexError):
            order.epoch(number)[3]
    seen = set().union(*(visits(epoch(order, number)) for number in range(30)))
    assert len(seen) == 10, "in the long run all are seen"
    assert Order([manifest(probability=0.0001)], seed=1, batch_size=1).batches_per_epoch == 1


def test_several_sets_are_mixed(manifest: Scanned) -> None:
    sets = [manifest(), manifest(id="others", repeats=1)]
    order = Order(sets, seed=1, batch_size=1)
    whole = epoch(order, 0)
    assert Counter(batch.visits[0].set_index for batch in whole) == {0: 10, 1: 20}
    assert {batch.visits[0].set_index for batch in whole[:15]} == {0, 1}


def test_any_place_is_found_without_the_ones_before(manifest: Scanned) -> None:
    found = manifest(repeats=1)
    walked = Order([found], seed=5, batch_size=3)
    sequence = [walked.micro_batch(index) for index in range(40)]
    for index in (39, 0, 17, 16, 38):
        assert Order([found], seed=5, batch_size=3).micro_batch(index) == sequence[index]
    assert [number for number, _ in sequence[:9]] == [0] * 7 + [1] * 2
    assert epoch(Order([found], seed=6, batch_size=3), 0) != epoch(walked, 0)


def test_a_permutation_is_the_same_on_every_machine() -> None:
    assert ["abcdefgh"[index] for index in permutation(8, 42)] == list("bhdcafeg")
    assert sorted(permutation(1000, 7).tolist()) == list(range(1000))
    assert permutation(0, 7).tolist() == []
