"""What `deepspeed_config` may say: DeepSpeed's own settings are handed on, ours must agree, the rest is refused."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from simpletuner.config.deepspeed import ZeroOffload, ZeroSettings, deepspeed_problem
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.run import RunConfig

pytestmark = pytest.mark.usefixtures("said_deepspeed")

OF_OTHERS = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The example of stage 3 in the documentation of transformers."""
OWN_LOOP = "this program has its own loop, logs and checkpoints"


def zero(**settings: object) -> dict[str, object]:
    return {"zero_optimization": {"stage": 2, **settings}}


def typed(remedy: str) -> list[str]:
    """The flags in a remedy."""
    return re.findall(r"--\w+=[^\s,]+(?=[\s,.]|$)", remedy.rstrip("."))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_is_a_name_an_object_or_a_file(place: Any, stage: int) -> None:
    document = {"zero_optimization": {"stage": stage}}
    file = place.write("ds.json", document)
    for value in (f"zero{stage}", json.dumps(document), "ds.json", str(file)):
        config = place.load(f"--deepspeed_config={value}", "--num_processes=2").config
        assert (config.zero_stage, config.zero_optimization) == (stage, {"stage": stage})
    place.config["deepspeed_config"] = document
    assert place.load().config.takes_every_gpu
    assert place.load("--num_processes=2").notices == ()


def test_without_a_stage_it_is_off(place: Any) -> None:
    off = "deepspeed_config has no effect: its zero_optimization has no stage above 0."
    for document in ({}, {"train_batch_size": "auto"}, zero(stage=0), {"zero_optimization": None}):
        place.config["deepspeed_config"] = document
        loaded = place.load("--num_processes=2")
        assert (loaded.config.zero_stage, loaded.config.zero_optimization, loaded.notices) == (0, {}, (off,))
        assert not loaded.config.takes_every_gpu
    assert RunConfig().zero_stage == 0


def test_one_process_has_no_use_for_it(place: Any) -> None:
    place.config["deepspeed_config"] = "zero2"
    loaded = place.load("--num_processes=1")
    assert loaded.config.zero_stage == 0
    assert loaded.notices == ("deepspeed_config has no effect: num_processes is 1.",)


def test_a_config_of_others_is_taken(place: Any) -> None:
    place.config |= {"deepspeed_config": OF_OTHERS, "num_processes": 2}
    loaded = place.load()
    assert loaded.config.zero_optimization == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    }
    assert all(loaded.config.offloads(name) for name in ("offload_optimizer", "offload_param"))
    assert loaded.notices == (
        f"deepspeed_config: steps_per_print has no effect: {OWN_LOOP}.",
        "deepspeed_config: zero_optimization: sub_group_size and stage3_gather_16bit_weights_on_model_save have no "
        f"effect: {OWN_LOOP}.",
    )


def test_what_agrees_with_the_options_passes(place: Any) -> None:
    place.config |= {"num_processes": 2, "gradient_accumulation_steps": 4, "lr_scheduler": "linear"}
    place.config["deepspeed_config"] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 2,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "amp": {"enabled": False},
        "pipeline": {},
        "communication_data_type": "fp32",
        "gradient_predivide_factor": 1.0,
        **zero(),
    }
    assert place.load().notices == ()


def test_every_contradiction_names_its_option_and_the_remedies_work(place: Any) -> None:
    place.config |= {"num_processes": 2}
    document = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "optimizer": {"type": "Lion", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupCosineLR"},
        **zero(),
    }
    place.config["deepspeed_config"] = document
    problems = place.problems()
    assert problems[0] == (
        "deepspeed_config: train_micro_batch_size_per_gpu = 3, and train_batch_size is 1. Remove it, or give "
        "--train_batch_size=3."
    )
    assert len(problems) == 9
    flags = [each for problem in problems for each in typed(problem)]
    config = place.load(*flags).config
    assert (config.optimizer, config.optimizer_beta2, config.lr_scheduler) == ("lion", 0.95, "cosine")
    assert (config.mixed_precision, config.adam_weight_decay, config.gradient_accumulation_steps) == ("no", 0.1, 2)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"train_batch_size": 7}, "gradient_accumulation_steps × num_processes is 2. Remove it."),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled = true: this is not supported. Remove it.",
        ),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            "optimizer.type = 'OneBitAdam', and optimizer is 'adamw'. Remove it.",
        ),
        ({"optimizer": {"params": {"amsgrad": True}}}, "amsgrad = true: this is not supported. Remove it."),
        ({"optimizer": {"params": {"lr": "fast"}}}, "lr = 'fast', and learning_rate is 0.0001. Remove it."),
        ({"zero_optimizaton": {}}, "zero_optimizaton: no such DeepSpeed setting here. Did you mean zero_optimiz"),
        ({"communication_data_type": "fp16"}, "communication_data_type = 'fp16': this is not supported. Remove it."),
        ({"amp": {"enabled": True}}, "this is not supported. Remove it."),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size = 2: this is not supported. Remove it."),
        ({"zero_optimization": True}, "zero_optimization = true: this is not supported. Remove it."),
        (zero(stage=4), "stage = 4: expected a whole number from 0 to 3."),
        (
            zero(overlap_com=True),
            "zero_optimization: overlap_com: no such DeepSpeed setting here. Did you mean over",
        ),
        (zero(reduce_bucket_size=0.5), "reduce_bucket_size = 0.5: expected a whole number of at least 1."),
        (zero(allgather_bucket_size=500_001), "allgather_bucket_size = 500001: expected an even whole number."),
        (zero(cpu_offload=True), "Did you mean offload_optimizer?"),
        (zero(round_robin_gradients=True), "this is not supported. Remove it."),
        (zero(offload_optimizer={"devise": "cpu"}), 'expected an object of "device", none or cpu, and "pin_memory"'),
        (zero(offload_optimizer={"device": "nvme"}), 'expected an object of "device", none or cpu, and "pin_memory"'),
        (zero(offload_param={"device": "cpu"}), "offload_param at stage 2, which does not shard the weights: expected"),
    ],
)
def test_what_cannot_be_had_is_refused(place: Any, document: dict[str, object], said: str) -> None:
    place.config |= {"num_processes": 2, "deepspeed_config": {**zero(), **document}}
    (problem,) = place.problems()
    assert problem.startswith("deepspeed_config: ")
    assert said in problem


def test_all_that_is_wrong_is_said_at_once(place: Any) -> None:
    place.config |= {"num_processes": 2, "learning_rate": -1}
    place.config["deepspeed_config"] = {"pipline": 1, **zero(stage="two", offload_param={"device": "disk"})}
    problems = place.problems()
    assert [each.partition(" = ")[0].rpartition(":")[2].strip() for each in problems] == [
        "learning_rate", "no such DeepSpeed setting here. Did you mean pipeline?", "stage", "offload_param",
    ]  # fmt: skip


def test_what_deepspeed_cannot_train_beside_is_said_at_once(place: Any) -> None:
    place.config |= {
        "num_processes": 2,
        "deepspeed_config": "zero3",
        "fsdp_enable": True,
        "mixed_precision": "fp16",
        "optimizer": "adafactor",
        "validation_preview_model": "some/model",
        "dynamo_backend": "inductor",
    }
    assert [each.partition(":")[0].partition(" = ")[0] for each in place.problems("--fsdp_enable=false")] == [
        "mixed_precision", "optimizer", "validation_preview_model", "dynamo_backend",
    ]  # fmt: skip
    flags = ["--fsdp_enable=false", "--mixed_precision=bf16", "--optimizer=adamw", "--dynamo_backend=no"]
    del place.config["validation_preview_model"]
    assert place.load(*flags).config.zero_stage == 3
    assert place.problems(*flags[1:]) == [
        "fsdp_enable = true with deepspeed_config, which shards in another way. Give --fsdp_enable=false, or "
        "remove deepspeed_config."
    ]
    (problem,) = place.problems(*flags, "--enable_group_offload")
    assert problem.startswith("--enable_group_offload with deepspeed_config, which places the blocks itself.")
    # Whole weights on each process can be compiled, and a preview's model may stand beside them.
    place.config["validation_preview_model"] = "some/model"
    assert place.load(*flags[:3], "--deepspeed_config=zero2").config.zero_stage == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_share_is_stepped_by_elementwise_optimizers(place: Any, stage: int) -> None:
    place.config |= {"deepspeed_config": f"zero{stage}", "num_processes": 2}
    for optimizer in (*OPTIMIZERS, "torch:adam"):
        if optimizer in ("adamw", "adamw_bf16", "lion"):
            assert place.load(f"--optimizer={optimizer}", "--learning_rate=1e-5").config.zero_stage == stage
        else:
            said = f"optimizer = '{optimizer}' with deepspeed_config, where each process steps a shard"
            assert any(said in each for each in place.problems(f"--optimizer={optimizer}"))


def test_gradients_are_not_released_under_deepspeed(place: Any) -> None:
    place.config |= {"model_type": "full", "optimizer": "adamw_bf16", "max_grad_norm": 0, "deepspeed_config": "zero2"}
    (problem,) = place.problems("--optimizer_release_gradients")
    assert problem.startswith("--optimizer_release_gradients with deepspeed_config = ")
    assert place.load("--optimizer_release_gradients", "--num_processes=1").config.optimizer_release_gradients


def test_it_must_be_installed_and_new_enough(
    place: Any, said_deepspeed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.config |= {"deepspeed_config": "zero1"}
    said_deepspeed("0.19.2")
    assert place.problems() == [
        "deepspeed_config: deepspeed 0.19.2 is installed: expected 0.19.8 or newer. pip install -e '.[deepspeed]'"
    ]
    for version in ("0.19.8", "0.20.0+cpu", "1.0"):
        said_deepspeed(version)
        assert deepspeed_problem() is None

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert place.problems() == [
        "deepspeed_config: deepspeed is not installed: expected 0.19.8 or newer. pip install -e '.[deepspeed]'"
    ]
    assert place.load("--num_processes=1")  # which has no use for it
    assert place.load("--deepspeed_config={}")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install -e '.[deepspeed]'")
def test_names_and_defaults_are_those_of_deepspeed() -> None:
    code = """
import json
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
models = DeepSpeedZeroConfig, DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
fields = [{field.alias or name: field.default for name, field in model.model_fields.items()} for model in models]
print(json.dumps(fields, default=str))
"""
    environ = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True, check=True)
    zero_fields, *offloads = json.loads(done.stdout.splitlines()[-1])
    ours = {name: field.default for name, field in ZeroSettings.model_fields.items()}
    ours["stage3_model_persistence_threshold"] = zero_fields["stage3_model_persistence_threshold"]  # no bound is null
    assert zero_fields | ours == zero_fields
    for fields in offloads:
        assert fields | {name: field.default for name, field in ZeroOffload.model_fields.items()} == fields


def test_weights_of_two_formats_are_not_fetched_by_all_reduce(place: Any) -> None:
    name = "stage3_use_all_reduce_for_fetch_params"
    place.config |= {"deepspeed_config": zero(stage=3, **{name: True}), "num_processes": 2}
    (problem,) = place.problems()
    assert problem == f"deepspeed_config: {name} with a LoRA, whose dtype differs from the base's. Remove it."
