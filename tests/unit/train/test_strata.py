"""Strata: an epoch covers the density evenly, and what a sample draws is still a function of (seed, step, slot)."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from simpletuner.base.draws import draw_seed
from simpletuner.config.datasets import ImageSet
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.manifest import scan
from simpletuner.data.order import Cut, Order
from simpletuner.flow.sigma import sigmoid_density
from simpletuner.train.step import Objective
from simpletuner.train.strata import Strata

PER_STEP = 3
SHAPE = (1, 2, 2)


@pytest.fixture
def order(tmp_path: Path) -> Order:
    """Two sets with batches of 2 and 1; of the second an epoch sees a half. Steps of three do not divide an epoch."""
    manifests = []
    for name, size, count, probability in (("a", 2, 9, 1.0), ("b", 1, 6, 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(count):
            Image.new("RGB", (64, 64), (index, size, 0)).save(folder / f"{index}.png")
        keys = {"id": name, "instance_data_dir": str(folder), "cache_dir_vae": str(tmp_path / "cache" / name)}
        chosen = {
            "train_batch_size": size,
            "probability": probability,
            "resolution": 64,
            "caption_strategy": "filename",
        }
        manifests.append(scan(ImageSet.model_validate(keys | chosen), seed=0, workers=1, report=lambda *_: None))
    return Order(manifests, seed=5, batch_size=1)


def strata(order: Order, seed: int = 5) -> Strata:
    return Strata(order, seed=seed, batches_per_step=PER_STEP)


def objective(order: Order, **options: object) -> Objective:
    return Objective.of(ScheduleOptions(**options), GuidanceOptions(), 5, strata(order))  # type: ignore[arg-type]


def slots(order: Order, step: int) -> int:
    """Samples of a step."""
    batches = [order.micro_batch(index)[1] for index in range((step - 1) * PER_STEP, step * PER_STEP)]
    return sum(len(batch.visits) for batch in batches)


def test_an_epoch_takes_every_stratum_exactly_once_in_an_order_of_its_own(order: Order) -> None:
    assert len(order.epoch(0)) == 8
    of = strata(order)
    drawn = [of(step, slot) for step in range(1, 9) for slot in range(slots(order, step))]  # three epochs
    assert {count for _, count in drawn} == {13}
    epochs = [[stratum for stratum, _ in drawn[start : start + 13]] for start in (0, 13, 26)]
    assert all(Counter(epoch) == Counter(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_strata_are_those_that_pythons_generator_draws(order: Order) -> None:
    for epoch in range(3):
        draw = random.Random(draw_seed(5, "strata", epoch))
        keys = [draw.random() for _ in range(13)]
        expected = sorted(range(13), key=keys.__getitem__)
        of = Strata(order, seed=5, batches_per_step=8)  # a step is an epoch
        assert [of(epoch + 1, slot) for slot in range(13)] == [(stratum, 13) for stratum in expected]


def test_a_step_may_span_several_epochs(order: Order) -> None:
    apart, together = (Strata(order, seed=5, batches_per_step=count) for count in (8, 24))
    expected = [apart(step, slot) for step in (1, 2, 3) for slot in range(13)]
    assert [together(1, slot) for slot in range(39)] == expected


def test_the_rest_of_an_epoch_that_is_cut_anew_takes_strata_to_itself(order: Order) -> None:
    now = Cut(1, 2, 3)
    new = Order.of(order.manifests, seed=5, cuts=[Cut(1, 1, PER_STEP)], now=now)
    of = Strata(new, seed=5, batches_per_step=PER_STEP)
    places = [(step, slot) for step in range(2, 9) for slot in range(slots(new, step))]
    rest = sum(len(new.micro_batch(index)[1].visits) for index in range(PER_STEP, 30) if new.position(index)[0] == 0)
    drawn = [of(*place) for place in places]
    assert all(stratum < count for stratum, count in drawn)
    assert len({stratum for stratum, _ in drawn[:rest]}) == rest
    assert sorted(stratum for stratum, _ in drawn[rest:][: drawn[rest][1]]) == list(range(drawn[rest][1]))


def test_a_stratum_depends_on_seed_step_and_slot_alone(order: Order) -> None:
    places = [(step, slot) for step in range(1, 9) for slot in range(slots(order, step))]
    forwards = {place: strata(order)(*place) for place in places}
    of = strata(order)
    assert {place: of(*place) for place in reversed(places)} == forwards
    assert {place: strata(order, seed=6)(*place) for place in places} != forwards


def test_sigmas_of_an_epoch_lie_one_in_each_nth_of_the_density(order: Order) -> None:
    asked = objective(order, timestep_strata=True, flow_schedule_shift=1.0)
    sigmas = [value for step in range(1, 9) for value in asked.draw(step, range(slots(order, step)), SHAPE).sigma]
    edges = torch.tensor([sigmoid_density(1.0)(index / 13) for index in range(1, 13)])
    for start in (0, 13, 26):
        found = torch.bucketize(torch.stack(sigmas[start : start + 13]), edges)
        assert sorted(found.tolist()) == list(range(13))


def test_the_density_of_a_sample_is_unchanged(order: Order) -> None:
    """Over many seeds, what one sample draws is as even as without strata."""
    levels = []
    for seed in range(300):
        asked = Objective.of(
            ScheduleOptions(timestep_strata=True, flow_use_uniform_schedule=True, flow_schedule_shift=1.0),
            GuidanceOptions(),
            seed,
            strata(order, seed),
        )
        levels += asked.draw(2, [1], SHAPE).sigma.tolist()
    counts = torch.histc(torch.tensor(levels), bins=10, min=0, max=1)
    assert (counts - 30).abs().max() < 24  # 4.5 standard deviations
    assert sum(levels) / len(levels) == pytest.approx(0.5, abs=0.05)


def test_off_draws_the_very_same_numbers_and_on_changes_sigma_only(order: Order) -> None:
    plain = Objective.of(ScheduleOptions(), GuidanceOptions(), 5)
    off, on = objective(order), objective(order, timestep_strata=True)
    for step in (0, 1, 4):
        one, same, other = (asked.draw(step, range(3), SHAPE) for asked in (plain, off, on))
        assert torch.equal(one.sigma, same.sigma)
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.sigma, other.sigma) == (step == 0)  # the trial step is outside every epoch


def test_listed_timesteps_with_strata_come_equally_often_and_unshifted(order: Order) -> None:
    asked = objective(order, timestep_strata=True, flow_custom_timesteps="800,500", flow_schedule_shift=7.0)
    drawn = [v for step in range(1, 9) for v in asked.draw(step, range(slots(order, step)), SHAPE).sigma.tolist()]
    counts = Counter(round(value, 6) for value in drawn[:13])
    assert counts.keys() == {0.5, 0.8}
    assert abs(counts[0.5] - counts[0.8]) == 1
