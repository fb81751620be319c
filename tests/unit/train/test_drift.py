"""The drift against the formula by hand, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train.test_validate import ALONE, CPU, SHARDED, CallCounter, context_of, in_threads, model
from torch import Tensor

from simpletuner.config.flavours import GuidanceScales
from simpletuner.config.options.ema import EmaOptions
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.flow.condition import Condition
from simpletuner.flux2.generate import initial_noise, sample_latents
from simpletuner.memory.world import World
from simpletuner.runs.events import ValidationEvent
from simpletuner.train.drift import DRIFT_STEPS, DriftMeter, drift_of
from simpletuner.train.ema import Ema
from simpletuner.train.loop import with_drift
from simpletuner.train.preview import TrainedModel

PROMPTS = ("one", "two", "three")


def silent(*_: int) -> None:
    pass


def meter(
    world: World, folder: Path, *, is_sharded: bool = False, with_ema: bool = False, **options: Any
) -> DriftMeter:
    transformer, adapter = model()
    told = {"validation_resolution": "32x48,64x64", "validation_num_inference_steps": 2} | options
    return DriftMeter(
        folder=folder / "drift",
        options=ValidationOptions(validation_drift_prompts=PROMPTS, **told),
        scales=GuidanceScales(1.0, 1.0),
        seed=1,
        model=TrainedModel(CallCounter(transformer, world, is_sharded=is_sharded)),
        trained=adapter,
        ema=Ema(adapter, EmaOptions(use_ema=True), CPU) if with_ema else None,
        has_live=True,
        context=context_of,
        world=world,
        is_sharded=is_sharded,
    )


def changed(drift: DriftMeter, factor: float) -> None:
    with torch.no_grad():
        for parameter in drift.trained.parameters():
            parameter.mul_(factor)


def final_latents(drift: DriftMeter, prompt: str) -> Tensor:
    noise = initial_noise(1, width=32, height=48)
    with drift.model.ready() as denoise:
        return sample_latents(denoise, noise, Condition.at(context_of(prompt), 1.0), steps=2)


def test_it_is_zero_for_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    drift = meter(ALONE, tmp_path, with_ema=True)
    changed(drift, 0)
    assert drift.ensure_base(0, silent)
    assert drift(silent)["live"] == dict.fromkeys(PROMPTS, 0.0)


def test_it_is_the_rms_of_the_difference_over_that_of_the_base(tmp_path: Path) -> None:
    drift = meter(ALONE, tmp_path, with_ema=True)
    changed(drift, 3)
    assert drift.ensure_base(5, silent)
    found = drift(silent)
    for prompt in PROMPTS:
        ours = final_latents(drift, prompt)
        disabled = drift.trained.disabled()
        assert disabled is not None
        with disabled:
            base = final_latents(drift, prompt)
        expected = (ours - base).square().mean().sqrt() / base.square().mean().sqrt()
        assert found["live"][prompt] == pytest.approx(float(expected), rel=1e-5)
    assert found["ema"] != found["live"]
    assert drift_of(torch.zeros(3), torch.ones(3)) == 1


def test_of_an_average_alone_the_event_has_the_drift_of_each_prompt() -> None:
    average = dict.fromkeys(PROMPTS, 0.25)
    event = ValidationEvent(step=3, loss=0.5)
    alone = {"drift": None, "drift_by_prompt": average, "ema_drift": 0.25}
    assert with_drift(event, {"ema": average}) == event.model_copy(update=alone)
    live = dict.fromkeys(PROMPTS, 0.5)
    both = {"drift": 0.5, "drift_by_prompt": live, "ema_drift": 0.25}
    assert with_drift(event, {"live": live, "ema": average}) == event.model_copy(update=both)


@SHARDED
def test_ranks_measure_what_one_does_and_what_they_keep_is_used_again(tmp_path: Path, is_sharded: bool) -> None:
    def measured(world: World, folder: Path) -> dict[str, dict[str, float]]:
        drift = meter(world, folder, is_sharded=is_sharded, with_ema=True)
        changed(drift, 2)
        assert drift.ensure_base(0, silent)
        assert not drift.lacks_base
        return drift(silent)

    expected = measured(ALONE, tmp_path / "alone")
    assert in_threads(2, lambda world: measured(world, tmp_path / "ranks")) == [expected] * 2
    for name in ("000", "001", "002"):
        kept = [tmp_path / place / "drift" / f"{name}.safetensors" for place in ("alone", "ranks")]
        assert kept[0].read_bytes() == kept[1].read_bytes()


def test_the_base_is_made_again_where_it_is_missing_or_of_other_options(tmp_path: Path) -> None:
    drift = meter(ALONE, tmp_path)
    assert drift.lacks_base
    assert drift.ensure_base(0, silent)
    path = drift.folder / "001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert drift.lacks_base
    assert drift.ensure_base(3, silent)
    assert path.read_bytes() == whole
    for other in ({"validation_seed": 2}, {"validation_resolution": "64"}, {"validation_num_inference_steps": 3}):
        assert meter(ALONE, tmp_path, **other).lacks_base
    many = {"validation_num_inference_steps": DRIFT_STEPS}
    assert meter(ALONE, tmp_path, **many).ensure_base(0, silent)
    assert not meter(ALONE, tmp_path, validation_num_inference_steps=DRIFT_STEPS + 1).lacks_base


def test_a_start_at_step_0_draws_the_base_anew_whatever_lies_there(tmp_path: Path) -> None:
    """A start that came to no checkpoint may have had another base."""
    drift = meter(ALONE, tmp_path)
    assert drift.ensure_base(0, silent)
    path = drift.folder / "000.safetensors"
    first = path.read_bytes()
    assert isinstance(drift.model, TrainedModel)
    with torch.no_grad():
        for parameter in drift.model.denoise.transformer.parameters():
            parameter.mul_(1.1)
    assert drift.ensure_base(1, silent)
    assert path.read_bytes() == first
    assert drift.ensure_base(0, silent)
    assert path.read_bytes() != first


def test_a_full_model_keeps_its_base_before_the_first_step_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift = meter(ALONE, tmp_path)
    monkeypatch.setattr(type(drift.trained), "disabled", lambda self: None)
    assert not drift.ensure_base(1, silent)
    assert drift.ensure_base(0, silent)
    assert drift.ensure_base(1, silent)
