"""The real command with the base model sharded over several processes."""

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace
from tests.recipes.test_ranks import train_together

ACCUMULATED = "--gradient_accumulation_steps=2"
ONCE = "--gradient_accumulation_steps=1"
SHARDED = "--fsdp_enable=true"

TREAD = '--tread_config={"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}'
QUANTIZED = ("--base_model_precision=int8-quanto", "--gradient_checkpointing=true")
ROLLOUT = ("--scheduled_sampling_max_step_offset=60", "--scheduled_sampling_probability=0.3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*QUANTIZED, TREAD, *ROLLOUT, "--lora_dropout=0.1", "--use_ema=true"), id="all-at-once"),
        pytest.param(("--fsdp_reshard_after_forward=false", "--fsdp_cpu_offload=true"), id="kept-in-host-memory"),
    ],
)
def test_a_sharded_base_trains_the_same_bits(flags: tuple[str, ...], cached_workplace: Workplace) -> None:
    place = cached_workplace
    of_one = [flag for flag in flags if not flag.startswith("--fsdp")]
    train_together(place, 1, "--output_dir=output/alone", ACCUMULATED, *of_one)
    train_together(place, 2, ONCE, SHARDED, *flags)
    assert place.losses() == place.losses("alone")
    ours, theirs = load_file(place.run().lora), load_file(place.run("alone").lora)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
