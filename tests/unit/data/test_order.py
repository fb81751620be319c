"""The order of a run: a function of manifests, seed and epoch."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.data.manifest import Manifest
from simpletuner.data.order import Cut, MicroBatch, Order, Visit, permutation

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
    return [order.epoch(number)[place] for place in range(len(order.epoch(0)))]


def visits(batches: list[MicroBatch]) -> Counter[Visit]:
    return Counter(visit for batch in batches for visit in batch.visits)


def test_an_epoch_shows_each_picture_repeats_plus_one_times(manifest: Scanned) -> None:
    order = Order([manifest(repeats=2)], seed=1, batch_size=1)
    assert len(order.epoch(0)) == 30
    for number in (0, 1, 7):
        assert set(visits(epoch(order, number)).values()) == {3}
    assert order.notices == ()
    assert epoch(order, 0) != epoch(order, 1)


def test_each_bucket_is_told_also_where_the_first_epoch_leaves_it_out(manifest: Scanned) -> None:
    found = manifest(probability=0.1, start_step=5)
    for seed in range(5):
        order = Order([found], seed=seed, batch_size=2)
        batches = order.by_bucket()
        assert sorted(batch.bucket for batch in batches) == sorted(found.buckets)
        assert {len(batch.visits) for batch in batches} == {2}
    shown = {batch.bucket: count for batch, count in order.batches_shown(10)}
    assert sum(shown.values()) == pytest.approx(6)  # from step 5 on


def test_a_batch_is_of_one_bucket_and_incomplete_ones_are_filled_within_it(manifest: Scanned) -> None:
    found = manifest()
    order = Order([found], seed=1, batch_size=4)
    assert len(order.epoch(0)) == 3
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
    assert "2 of 2 buckets do not divide into batches of 4; 2 extra images per epoch are drawn" in notice
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
    assert len(order.epoch(0)) == 3
    for number in range(30):
        with pytest.raises(IndexError):
            order.epoch(number)[3]
    seen = set().union(*(visits(epoch(order, number)) for number in range(30)))
    assert len(seen) == 10, "in the long run all are seen"
    assert len(Order([manifest(probability=0.0001)], seed=1, batch_size=1).epoch(0)) == 1


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


def test_a_run_that_never_changed_has_the_order_of_before(manifest: Scanned) -> None:
    found = manifest(repeats=1)
    order, plain = Order.of([found], seed=5, cuts=(), now=Cut(0, 3, 2)), Order([found], seed=5, batch_size=3)
    assert [order.micro_batch(index) for index in range(30)] == [plain.micro_batch(index) for index in range(30)]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7, 15, 23, 24])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 1), (1, 4), (2, 4), (4, 2)])
def test_another_batch_size_neither_repeats_nor_skips_but_for_what_fills_batches(
    manifest: Scanned, before: int, after: int, steps: int
) -> None:
    """Steps of four: 20 visits an epoch of 14 wide and 6 tall pictures, more where batches are filled."""
    found = manifest(repeats=1)
    first, now = Cut(steps, before, 4 // before), Cut(steps, after, 4 // after)
    old = Order([found], seed=5, batch_size=before)
    new = Order.of([found], seed=5, cuts=[first], now=now)
    change = steps * first.batches_per_step
    number, place = old.position(change)
    done = [old.epoch(number)[each] for each in range(place)]
    rest = []
    index = steps * now.batches_per_step
    while (found_at := new.micro_batch(index))[0] == number:
        rest.append(found_at[1])
        index += 1
    seen, left = visits(done), visits(rest)
    assert all(len(batch.visits) == after for batch in rest)
    fill = [sum(-count % size for count in (14, 6)) for size in (before, after)]
    whole = seen + left
    assert len(whole) == 10
    assert min(whole.values()) >= 2, "none is skipped"
    assert sum(whole.values()) - 20 <= sum(fill) + 2 * (after - 1), (
        "what fills batches of two buckets, before and after"
    )
    # Whole epochs follow, those of this batch size, and the epochs of a step are counted on.
    assert new.position(index) == (number + 1, 0)
    plain = Order([found], seed=5, batch_size=after)
    later = [new.micro_batch(index + each) for each in range(2 * len(new.epoch(0)))]
    assert [batch for _, batch in later] == epoch(plain, number + 1) + epoch(plain, number + 2)
    assert new.by_bucket() == plain.by_bucket()


def test_an_epoch_may_be_cut_anew_more_than_once(manifest: Scanned) -> None:
    found = manifest(repeats=3)
    cuts = [Cut(3, 1, 4), Cut(5, 2, 2), Cut(8, 4, 1)]
    order = Order.of([found], seed=5, cuts=cuts, now=Cut(8, 1, 4))
    seen: Counter[Visit] = Counter()
    start = 0
    for number, cut in enumerate(cuts):
        part = Order.of([found], seed=5, cuts=cuts[:number], now=cut)
        at = range(start * cut.batches_per_step, cut.steps * cut.batches_per_step)
        assert {part.position(index)[0] for index in at} == {0}
        seen += visits([part.micro_batch(index)[1] for index in at])
        start = cut.steps
    assert sum(seen.values()) == 32
    rest = [order.micro_batch(index) for index in range(32, 60)]
    seen += visits([batch for number, batch in rest if number == 0])
    assert min(seen.values()) == 4
    assert sum(seen.values()) - 40 <= 2
    # A step at which an epoch ends leaves nothing of it.
    assert Order.of([found], seed=5, cuts=[Cut(10, 1, 4)], now=Cut(10, 2, 2)).position(20) == (1, 0)


def test_of_a_set_with_a_probability_the_chosen_pictures_come(manifest: Scanned) -> None:
    found = manifest(probability=0.5, repeats=3)
    old = Order([found], seed=5, batch_size=1)
    chosen = visits(epoch(old, 0))
    new = Order.of([found], seed=5, cuts=[Cut(2, 1, 4)], now=Cut(2, 2, 2))
    rest = [new.micro_batch(index) for index in range(4, 24)]
    seen = visits(epoch(old, 0)[:8]) + visits([batch for number, batch in rest if number == 0])
    assert seen >= chosen
    assert sum(seen.values()) - sum(chosen.values()) <= 2


@pytest.mark.parametrize("processes", [3, 5])
def test_another_number_of_micro_batches_a_step_neither_repeats_nor_skips(manifest: Scanned, processes: int) -> None:
    found = manifest(repeats=1)
    old, now = Order([found], seed=5, batch_size=1, batches_per_step=4), Cut(2, 1, processes)
    new = Order.of([found], seed=5, cuts=[Cut(2, 1, 4)], now=now)
    rest = [new.micro_batch(index) for index in range(2 * processes, 2 * processes + 13)]
    assert [number for number, _ in rest] == [0] * 12 + [1]
    assert set((visits(epoch(old, 0)[:8]) + visits([batch for _, batch in rest[:-1]])).values()) == {2}
