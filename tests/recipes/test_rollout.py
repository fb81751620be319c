"""Whole runs with scheduled sampling."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace

from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.train.rollout import Rollout

ON = {"scheduled_sampling_max_step_offset": 40, "scheduled_sampling_sampler": "heun"}
"""Two steps of two calls, and one for ReflexFlow."""


def same_tensors(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.slow
def test_off_is_the_run_without_it_byte_for_byte(workplace: Workplace) -> None:
    assert workplace.train("--output_dir=output/without", "--max_train_steps=1") == 0
    workplace.config |= {"scheduled_sampling_max_step_offset": 0}
    assert workplace.train("--output_dir=output/off", "--max_train_steps=1") == 0
    assert workplace.run("off").lora.read_bytes() == workplace.run("without").lora.read_bytes()
    workplace.config |= ON | {"scheduled_sampling_probability": 0.0}
    assert workplace.train("--output_dir=output/never", "--max_train_steps=1") == 0
    assert workplace.losses("never") == workplace.losses("without")
    assert same_tensors(workplace.run("never").lora, workplace.run("without").lora)
    assert {event["rollout_calls"] for event in workplace.events("step", "never")} == {0}


def planned_calls(config: dict[str, Any], steps: int) -> list[int]:
    """Of each step: a batch of one whose draw is 0 takes none."""
    options = {name: value for name, value in config.items() if name in RolloutOptions.model_fields}
    rollout = Rollout.of(RolloutOptions(**options), 42)
    assert rollout is not None
    lengths = [rollout.lengths(step, range(2)) for step in range(1, steps + 1)]
    return [rollout.calls * sum(length > 0 for length in drawn) for drawn in lengths]


@pytest.mark.slow
def test_a_run_says_what_it_will_do_and_counts_it(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    workplace.config |= ON | {"max_train_steps": 2, "lora_dropout": 0.1, "flux_guidance_mode": "random-range"}
    assert workplace.train() == 0
    printed = capsys.readouterr().out
    assert (
        "Scheduled sampling: lengths 0–40 of 1000 (uniform), probability 1; 2 steps of heun, model calls without "
        "gradient for a batch with rollouts: 4 and 1 for ReflexFlow." in printed
    )
    expected = planned_calls(workplace.config, 2)
    assert sum(expected) > 0
    assert f"s/step, {expected[-1]} rollout calls" in printed
    assert [event["rollout_calls"] for event in workplace.events("step")] == expected
    assert all(math.isfinite(loss) for loss in workplace.losses())


@pytest.mark.slow
def test_recomputing_changes_no_bit_of_a_rollout(workplace: Workplace) -> None:
    workplace.config |= ON | {"max_train_steps": 2, "lora_dropout": 0.3, "train_batch_size": 2}
    for value in ("true", "false"):
        assert workplace.train(f"--gradient_checkpointing={value}", f"--output_dir=output/{value}") == 0
    assert workplace.losses("true") == workplace.losses("false")
    assert same_tensors(workplace.run("true").lora, workplace.run("false").lora)


@pytest.mark.slow
def test_a_resumed_run_ends_like_the_uninterrupted_one(workplace: Workplace) -> None:
    ramp = {"prob_start": 0.5, "prob_end": 1.0, "ramp_steps": 3}
    workplace.config |= ON | {f"scheduled_sampling_{key}": value for key, value in ramp.items()}
    workplace.config |= {"loss_type": "huber"}
    assert workplace.train("--output_dir=output/whole") == 0
    assert workplace.train("--max_train_steps=1") == 0
    assert workplace.train("--max_train_steps=3") == 0
    assert workplace.losses() == workplace.losses("whole")
    assert workplace.run().lora.read_bytes() == workplace.run("whole").lora.read_bytes()
    name = "optimizer.safetensors"
    found, expected = (run.checkpoint(3) / name for run in (workplace.run(), workplace.run("whole")))
    assert found.read_bytes() == expected.read_bytes()


def test_its_options_may_not_change_on_resume(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    assert workplace.train("--scheduled_sampling_max_step_offset=5", "--scheduled_sampling_sampler=dpm") == 6
    refused = capsys.readouterr().err
    assert "scheduled_sampling_max_step_offset = 5 (was 0), scheduled_sampling_sampler = " in refused


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm"])
def test_every_sampler_trains(workplace: Workplace, sampler: str) -> None:
    workplace.config |= ON | {"max_train_steps": 2, "mixed_precision": "bf16", "scheduled_sampling_sampler": sampler}
    assert workplace.train() == 0
    assert [event["rollout_calls"] for event in workplace.events("step")] == planned_calls(workplace.config, 2)
    assert all(math.isfinite(loss) for loss in workplace.losses())
