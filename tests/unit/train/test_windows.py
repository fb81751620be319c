"""Windows of activity in the plan of a run, and when it is resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ImageSet
from simpletuner.config.load import load
from simpletuner.config.run import RunConfig
from simpletuner.data.geometry import Geometry
from simpletuner.data.manifest import Manifest
from simpletuner.data.order import Cut, Order
from simpletuner.data.sample import Sample
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.length import RunSchedule
from simpletuner.train.resume import RestartCommands, ResumePoint, check_windows
from simpletuner.train.state import TrainState

PER_STEP = 2


def manifests(*keys: dict[str, int], images: int = 5) -> list[Manifest]:
    """A set of five images of one size for each of `keys`."""
    place = Geometry((64, 64), (64, 64), (0, 0))
    return [
        Manifest(
            ImageSet.model_validate({"id": f"set-{at}", "instance_data_dir": "."} | own),
            tuple(Sample("", LocalStorage(Path()), str(n), "", 64, 64, place, ("",)) for n in range(images)),
            (),
            (),
        )
        for at, own in enumerate(keys)
    ]


def order(*keys: dict[str, int]) -> Order:
    return Order(manifests(*keys), seed=1, batch_size=1, batches_per_step=PER_STEP)


def plan(*keys: dict[str, int], **options: Any) -> RunSchedule:
    return RunSchedule.of(RunConfig(**options), order(*keys), PER_STEP)


def due(own: RunSchedule, every_epochs: int) -> list[int]:
    return [step for step in range(1, own.steps + 1) if own.is_due(step, None, every_epochs)]


def test_a_run_without_windows_is_planned_as_before() -> None:
    own = plan({}, num_train_epochs=3)
    assert (own.steps, own.epochs, own.notices) == (8, 3.2, ())
    assert plan({}, {"start_step": 0}, {"start_epoch": 1}, num_train_epochs=2).steps == 15
    for every in (1, 2, 3):
        assert due(own, every) == [
            step for step in range(1, 9) if step * 2 // (5 * every) > (step * 2 - 2) // (5 * every)
        ]


def test_epochs_that_are_cut_short_are_counted() -> None:
    """Two of five images in step 1, then an epoch of ten, then epochs of five."""
    keys: Sequence[dict[str, int]] = ({}, {"start_step": 2, "end_epoch": 2})
    assert [(span.start, span.epoch, span.batches_per_epoch) for span in order(*keys).spans] == [
        (0, 0, 5),
        (2, 1, 10),
        (12, 2, 5),
    ]
    assert [plan(*keys, num_train_epochs=epochs).steps for epochs in (1, 2, 3, 4)] == [1, 6, 9, 11]
    own = plan(*keys, num_train_epochs=4)
    assert due(own, 1) == [1, 6, 9, 11]
    assert due(own, 2) == [6, 11]
    assert own.epochs == 4
    assert own.order.visits(22) == 2 + 10 + 10


def test_the_last_epoch_of_a_window_fills_its_step() -> None:
    """Five images and steps of two: the third step needs a sixth."""
    own = plan({"end_epoch": 1}, max_train_steps=3)
    assert [own.order.position(index) for index in range(6)] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    assert own.order.micro_batch(5)[1].visits
    assert plan({"end_epoch": 1}, num_train_epochs=1).steps == 3


@pytest.mark.parametrize(
    ("keys", "options", "which", "remedy"),
    [
        ([{"end_epoch": 2}], {"max_train_steps": 9}, "in steps 6 to 9", "--max_train_steps=5."),
        ([{"end_epoch": 1}, {"start_step": 5}], {"max_train_steps": 9}, "in step 4", "dataset list."),
        ([{"end_step": 4}], {"num_train_epochs": 9}, "from step 5 on", "--max_train_steps=4."),
    ],
)
def test_a_step_without_a_set_is_named(
    keys: list[dict[str, int]], options: dict[str, int], which: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*keys, **options)
    (problem,) = caught.value.problems
    assert problem.found == f"no image set is active {which}"
    assert str(problem).endswith(remedy)


def test_a_set_outside_of_the_run_is_named() -> None:
    own = plan({}, {"start_step": 4}, {"start_epoch": 9}, max_train_steps=4)
    assert own.notices == ("set-2: its window contains none of the steps 1 to 4, so this dataset is not trained.",)


@pytest.mark.parametrize(
    ("then", "now", "is_same"),
    [
        ([{}, {}], [{}, {}], True),
        ([{"end_step": 6}, {}], [{"end_step": 9}, {}], True),
        ([{"end_step": 5}, {}], [{"end_step": 9}, {}], False),
        ([{"end_step": 6}, {}], [{"end_step": 5}, {}], False),
        ([{}, {}], [{}, {"start_step": 7}], False),
        ([{}, {"start_step": 7}], [{}, {"start_step": 8}], True),
        ([{}, {"start_step": 7}], [{}, {}], False),
        ([{}, {"end_epoch": 2}], [{}, {"end_epoch": 1}], False),
        ([{}, {"end_epoch": 2}], [{}, {}], True),
        ([{}, {"start_epoch": 2}], [{}, {"start_epoch": 3}], False),
    ],
)
def test_only_what_is_to_come_may_change(
    tmp_path: Path, then: list[dict[str, int]], now: list[dict[str, int]], is_same: bool
) -> None:
    """After six steps of two images, in the second epoch."""
    state = TrainState(step=6, windows={each.image_set.id: each.image_set.windows for each in manifests(*then)})
    found = ResumePoint(Path("step-6"), TrainState.model_validate_json(state.model_dump_json()))
    (tmp_path / "config.json").write_text(json.dumps({"model_flavour": "tiny", "max_train_steps": 10}))
    (tmp_path / "multidatabackend.json").write_text(json.dumps([{"id": "set-0", "instance_data_dir": "."}]))
    loaded = load((), folder=tmp_path, environ={})
    commands = RestartCommands(RunDirectory(tmp_path / "output"), loaded)
    own = {each.image_set.id: each.image_set.windows for each in manifests(*now)}
    cut = Cut(6, 1, PER_STEP)
    new = Order.of(manifests(*now), seed=1, cuts=(), now=cut)
    if is_same:
        check_windows(found, commands, own, new)
        return
    with pytest.raises(CheckpointError, match="active in other steps or epochs up to step 6 than when step-6"):
        check_windows(found, commands, own, new)
