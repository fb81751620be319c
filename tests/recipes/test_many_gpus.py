"""Several processes train what one process trains: under DDP, FSDP2 and DeepSpeed, by the real command.

Tolerance: gradients are fp32 sums of the same numbers in another order. The one process adds ((g₀ + g₁) + g₂) + g₃; two
processes add (g₀ + g₂) + (g₁ + g₃); four add in the order of gloo's ring. 20 steps summed in the order of two, by one
process, were 1.1e-7 away in their losses, 4.1e-7 in gradient norms and 1.7e-7 in the adapter's norm, each relative, so
the limits are 1e-6 and 2e-6. Where one process and two add the same two numbers, nothing is rounded otherwise: equal to
the bit. So are DDP and FSDP2 at the same number of processes, since both reduce adapters in one call.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace
from tests.recipes.test_full_ranks import FULL
from tests.recipes.test_validation import DRAWN

from resume_matrix import ADAPTER_LIMIT, LOSS_LIMIT, distance, drawn_pairs, matrix
from simpletuner.config.options.ranks import ZERO_STAGES
from simpletuner.flux2.export import read_lora

STEPS = 20
MATRIX: dict[str, Any] = {
    "max_train_steps": STEPS,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "lora_dropout": 0.1,
    "use_ema": True,
    "ema_decay": 0.9,
    "checkpoint_step_interval": 10,
}
FEATURES: Mapping[str, dict[str, Any]] = {
    "tread": {
        "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]},
        "gradient_checkpointing": True,
        "fsdp_reshard_after_forward": False,
    },
    # Rollouts begin after the second step: losses that differ before it are the quantized base's fault.
    "int8 and rollout": {
        "base_model_precision": "int8-quanto",
        "fsdp_cpu_offload": True,
        "scheduled_sampling_max_step_offset": 40,
        "scheduled_sampling_sampler": "heun",
        "scheduled_sampling_prob_start": 0.0,
        "scheduled_sampling_prob_end": 1.0,
        "scheduled_sampling_start_step": 2,
        "scheduled_sampling_ramp_steps": 1,
    },
}
SHARD_ALL = '--deepspeed_config={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
"""By default tensors as small as most of these stay whole."""
MOMENTARY = {"time", "seconds", "pid", "memory_gib", "memory_allocated_gib", "images_per_s", "tflop_per_s", "plan"}
PART = re.compile(r"-\d{5}-of-\d{5}")
ROUNDED = {"loss", "grad_norm"}
OF_PROCESSES = {"processes", "engine"}


def train(place: Workplace, name: str, processes: int, batches: int, *more: str) -> None:
    """A run `output/NAME` of as many processes, each with as many micro-batches a step."""
    flags = [f"--output_dir=output/{name}", f"--num_processes={processes}", f"--gradient_accumulation_steps={batches}"]
    done = place.train_apart(*flags, *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def assert_sharded(place: Workplace, name: str, processes: int) -> None:
    """As the run itself says: that results are right does not show that anything was sharded."""
    assert f"Sharded: each of {processes} processes holds" in place.run(name).log.read_text()


@pytest.fixture(scope="session")
def accumulated(shared_folder: Path, uninterrupted: Workplace) -> Workplace:
    """20 steps of one process, four micro-batches accumulated, with its caches. One for all workers."""
    place = Workplace(shared_folder / "accumulated")
    place.config |= MATRIX
    with (shared_folder / "accumulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.run("alone").lora.exists():
            for name in ("cache", "datasets"):
                shutil.copytree(uninterrupted.folder / name, place.folder / name)
            train(place, "alone", 1, 4)
    return place


def beside(place: Workplace, other: Workplace) -> Workplace:
    """`place` with the caches and the runs of `other`."""
    shutil.copytree(other.folder / "cache", place.folder / "cache", dirs_exist_ok=True)
    shutil.copytree(other.folder / "output", place.folder / "output")
    place.config |= other.config
    return place


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    assert [name for name, tensor in left.items() if not tensor.equal(right[name])] == []


def told(place: Workplace, name: str) -> list[dict[str, Any]]:
    """The run's events but for those that say how far something is, without what no two runs share."""
    lines = place.run(name).events.read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["type"] not in ("progress", "plan", "notice")]
    return [
        {key: value for key, value in event.items() if key not in MOMENTARY | OF_PROCESSES | {"id", "bytes"}}
        for event in events
    ]


def files(place: Workplace, name: str) -> set[str]:
    """Names below the run; a file that ranks share out counts as one."""
    root = place.run(name).root
    return {PART.sub("", path.relative_to(root).as_posix()) for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_train_what_one_accumulates(workplace: Workplace, accumulated: Workplace) -> None:
    """Four. Two are compared to the bit: under DDP in `test_launch.py`, under FSDP2 below."""
    place = beside(workplace, accumulated)
    train(place, "ddp", 4, 1)
    train(place, "fsdp", 4, 1, "--fsdp_enable")
    ema = f"ema/{place.run().lora.name}"
    for name in ("ddp", "fsdp"):
        own, alone = place.run(name), place.run("alone")
        steps, expected = (place.events("step", each) for each in (name, "alone"))
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], rel=LOSS_LIMIT)
        norms = [[step["grad_norm"] for step in each] for each in (steps, expected)]
        assert norms[0] == pytest.approx(norms[1], rel=2 * ADAPTER_LIMIT)
        assert distance(own.lora, alone.lora) <= ADAPTER_LIMIT
        assert distance(own.root / ema, alone.root / ema) <= ADAPTER_LIMIT
        # All else that the run says and leaves is the same: rates, epochs, checkpoints; one of each file.
        exact = [
            [{k: v for k, v in e.items() if k not in ROUNDED} for e in told(place, each)] for each in (name, "alone")
        ]
        assert exact[0] == exact[1]
        assert files(place, name) == files(place, "alone")
        assert read_lora(own.lora).layers.keys() == read_lora(alone.lora).layers.keys()
    assert_sharded(place, "fsdp", 4)
    assert place.losses("ddp") == place.losses("fsdp")
    assert_same_tensors(place.run("ddp").lora, place.run("fsdp").lora)
    assert_same_tensors(place.run("ddp").root / ema, place.run("fsdp").root / ema)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("features", FEATURES)
def test_two_sharding_processes_are_two_accumulated_batches_to_the_bit(
    cached_workplace: Workplace, features: str
) -> None:
    place = cached_workplace
    place.config |= FEATURES[features] | {"max_train_steps": 5, "checkpoint_step_interval": 5}
    train(place, "alone", 1, 2)
    train(place, "fsdp", 2, 1, "--fsdp_enable")
    assert_sharded(place, "fsdp", 2)
    assert place.losses("fsdp") == place.losses("alone")
    calls = [[step["rollout_calls"] for step in place.events("step", name)] for name in ("fsdp", "alone")]
    assert calls[0] == calls[1]
    assert (sum(calls[0]) > 0) == ("rollout" in features)
    assert_same_tensors(place.run("fsdp").lora, place.run("alone").lora)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_layout_resumes_in_one_process_and_the_other_way_round(accumulated: Workplace, own_folder: Path) -> None:
    """And two drawn pairs, which have four processes too. `tools/resume_matrix.py` goes through all."""
    place = Workplace(own_folder)
    for name in ("cache", "datasets"):
        shutil.copytree(accumulated.folder / name, own_folder / name)
    place.config |= {"lora_dropout": 0.1, "checkpoint_step_interval": 1000}
    place.write()
    differences = matrix(own_folder, drawn_pairs(2, seed=16, beside=("ddp2", "fsdp2")), steps=2)
    assert [f"{start} → {end}: {each}" for (start, end), each in differences.items() if not each.is_within] == []


@pytest.fixture
def deepspeed() -> None:
    """Skips where DeepSpeed is not installed."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: none of its stages is tested")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_deepspeed_trains_what_one_accumulates(stage: str, workplace: Workplace, accumulated: Workplace) -> None:
    """Over three epochs of buckets of different sizes."""
    place = beside(workplace, accumulated)
    train(place, stage, 2, 2, f"--deepspeed_config={stage}")
    own, alone = place.run(stage), place.run("alone")
    steps, expected = (place.events("step", each) for each in (stage, "alone"))
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], rel=LOSS_LIMIT)
    norms = [[step["grad_norm"] for step in each] for each in (steps, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=2 * ADAPTER_LIMIT)
    for name in (own.lora.name, f"ema/{own.lora.name}"):
        assert distance(own.root / name, alone.root / name) <= ADAPTER_LIMIT
    assert files(place, stage) == files(place, "alone")
    assert f"DeepSpeed, ZeRO stage {stage[-1]}: each of 2 processes steps" in own.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("features", FEATURES)
def test_features_under_deepspeed_stage_3(cached_workplace: Workplace, features: str) -> None:
    """TREAD and recompute; an int8 base and rollouts, which are not equally many on the ranks; an average."""
    place = cached_workplace
    shards = {key: value for key, value in FEATURES[features].items() if not key.startswith("fsdp_")}
    place.config |= shards | {"max_train_steps": 5, "checkpoint_step_interval": 5, "use_ema": True, "ema_decay": 0.9}
    train(place, "alone", 1, 2)
    train(place, "zero", 2, 1, SHARD_ALL)
    assert place.losses("zero") == pytest.approx(place.losses("alone"), rel=LOSS_LIMIT)
    calls = [[step["rollout_calls"] for step in place.events("step", name)] for name in ("zero", "alone")]
    assert calls[0] == calls[1]
    assert (sum(calls[0]) > 0) == ("rollout" in features)
    for name in (place.run().lora.name, f"ema/{place.run().lora.name}"):
        assert distance(*(place.run(each).root / name for each in ("zero", "alone"))) <= ADAPTER_LIMIT


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("deepspeed")
def test_deepspeed_goes_on_where_other_engines_were(accumulated: Workplace, own_folder: Path) -> None:
    place = Workplace(own_folder)
    for name in ("cache", "datasets"):
        shutil.copytree(accumulated.folder / name, own_folder / name)
    place.config |= {"lora_dropout": 0.1, "checkpoint_step_interval": 1000}
    place.write()
    differences = matrix(own_folder, [("zero3", "single"), ("fsdp2", "zero3")], steps=2)
    assert [f"{start} → {end}: {each}" for (start, end), each in differences.items() if not each.is_within] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("deepspeed")
def test_a_whole_model_goes_on_under_another_stage(cached_workplace: Workplace) -> None:
    """Stage 1 draws an image of the average too, beside a rank without one; then stage 3 goes on."""
    place = cached_workplace
    place.config.pop("lora_rank")
    place.config |= FULL | DRAWN | {"max_train_steps": 4, "validation_step_interval": 2}
    place.prompts = {"one": "a gradient"}
    assert place.train("--output_dir=output/alone", "--num_processes=1") == 0
    train(place, "zero", 2, 1, "--deepspeed_config=zero1", "--max_train_steps=2")
    train(place, "zero", 2, 1, SHARD_ALL)
    assert place.losses("zero") == pytest.approx(place.losses("alone"), rel=LOSS_LIMIT)
    ours, theirs = (place.run(name) for name in ("zero", "alone"))
    for name in ("transformer.safetensors", "ema/transformer.safetensors"):
        assert distance(ours.root / name, theirs.root / name) <= ADAPTER_LIMIT
    for step in (2, 4):
        for name in ("one_32x32_0.png", "ema/one_32x32_0.png"):
            one, two = (Image.open(each.validation(step) / name).convert("RGB") for each in (ours, theirs))
            levels = np.abs(np.asarray(one, np.int16) - np.asarray(two, np.int16))
            assert levels.max() <= 1  # where a value lies between two
    log = ours.log.read_text()
    assert all(f"DeepSpeed, ZeRO stage {stage}: each of 2 processes steps" in log for stage in (1, 3))
