"""Configs of SimpleTuner carry over: they load, or one report says what to type, after which they load."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.load import RUN
from simpletuner.config.other_keys import OPTION_ALIASES, OTHER_OPTIONS, OTHER_SET_KEYS, OTHER_STORE_KEYS
from simpletuner.config.run import RunConfig
from simpletuner.config.values import nearest

NAMES = json.loads((Path(__file__).parents[2] / "fixtures" / "simpletuner-names.json").read_bytes())
"""Names of options and of dataset keys of SimpleTuner 4.x."""
OPTIONS = " ".join(NAMES["options"]).split()
DATASET_KEYS = " ".join(NAMES["dataset_keys"]).split()

USUAL = {
    "model_family": "flux2",
    "model_type": "lora",
    "base_model_precision": "int8-quanto",
    "checkpoint_step_interval": 20,
    "controlnet": False,
    "data_backend_config": "config/multidatabackend.json",
    "disable_bucket_pruning": True,
    "flow_schedule_shift": 2,
    "fuse_qkv_projections": False,
    "grad_clip_method": "value",
    "hub_model_id": "somebody/cats",
    "learning_rate": 5e-5,
    "lora_alpha": 8,
    "lora_rank": 8,
    "lora_type": "standard",
    "lr_scheduler": "constant",
    "max_train_steps": 40,
    "num_eval_images": 4,
    "num_train_epochs": 0,
    "optimizer": "adamw_bf16",
    "output_dir": "output/cats",
    "push_checkpoints_to_hub": False,
    "push_to_hub": False,
    "quantize_via": "cpu",
    "report_to": "none",
    "tracker_project_name": "cats",
    "tracker_run_name": "first",
    "use_ema": False,
    "vae_cache_ondemand": False,
    "validation_disable_unconditional": True,
    "validation_guidance": 4.0,
    "validation_guidance_rescale": 0.0,
    "validation_negative_prompt": "blurry",
    "validation_prompt": "a cat on a wall",
    "validation_prompt_library": False,
    "validation_steps": 20,
    "validation_torch_compile": False,
}
"""What stands in most of them; nothing in it asks for what is not here."""

OTHERS: dict[str, dict[str, object]] = {
    "usual": {},
    "controlnet": {"controlnet": True, "flux_lora_target": "controlnet"},
    "tread": {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}},
    "lycoris": {"lora_type": "lycoris", "lycoris_config": "config/lycoris.json", "model_flavour": "klein-9b"},
    "sdnq": {
        "base_model_precision": "int8-sdnq",
        "sdnq_compile_mode": "compile",
        "sdnq_group_size": -1,
        "sdnq_use_hadamard": True,
        "sdnq_use_quantized_matmul": True,
    },
    "much": {
        "base_model_precision": "uint4-sdnq",
        "crepa_enabled": True,
        "crepa_lambda": 0.5,
        "delete_problematic_images": True,
        "ema_warmup_steps": 10,
        "gradient_checkpointing_backend": "unsloth",
        "musubi_blocks_to_swap": 12,
        "offset_noise": False,
        "push_to_hub": True,
        "ramtorch": True,
        "resolution": 768,
        "timestep_bias_strategy": "later",
        "train_text_encoder": True,
        "trust_remote_code": True,
        "validation_adapter_path": "other.safetensors",
        "webhook_config": {"webhook_type": "discord"},
    },
}


def typed(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`config` with what each problem says to do done."""
    done = dict(config)
    for problem in problems:
        key = re.split(r" = |: ", problem, maxsplit=1)[0]
        take = re.search(r"(?:Use|it takes) ([\w-]+)(?:, [\w-]+)*(?: or [\w-]+)?\.$", problem)
        if take is not None:
            done[key] = take[1]
        else:
            assert re.search(r"(Remove it[^.]*|Leave it out until then)\.( |$|\w)", problem), problem
            del done[key]
    return done


@pytest.mark.parametrize("name", OTHERS)
def test_a_config_loads_or_loads_after_what_one_report_says(place: Any, name: str) -> None:
    place.config = USUAL | OTHERS[name]
    flags = ["--model_flavour", "tiny"]
    if name not in ("usual", "tread"):
        problems = place.problems(*flags)
        place.config = typed(place.config, problems)
        assert len(problems) == {"controlnet": 2, "lycoris": 1, "sdnq": 1, "much": 14}[name]
    loaded = place.load(*flags)
    assert (loaded.config.lora_rank, loaded.config.validation_step_interval) == (8, 20)
    text = "\n".join(loaded.notices)
    assert "validation_steps is read as validation_step_interval." in text
    assert "hub_model_id has no effect: push_to_hub is false." in text
    assert "tracker_project_name and tracker_run_name have no effect: report_to is none." in text
    assert text.count("sdnq_") == (4 if name == "sdnq" else 0)


def test_variables_of_simpletuner_do_not_stop_a_start(place: Any) -> None:
    environ = {"SIMPLETUNER_LOG_LEVEL": "DEBUG", "SIMPLETUNER_TRAINING_LOOP_LOG_LEVEL": "INFO"}
    assert place.load(environ=environ).notices == (
        "SIMPLETUNER_LOG_LEVEL and SIMPLETUNER_TRAINING_LOOP_LOG_LEVEL have no effect: a run logs everything in "
        "events.jsonl.",
    )
    assert place.problems(environ={"SIMPLETUNER_CONTROLNET": "true"}) == [
        "SIMPLETUNER_CONTROLNET = true: this program trains no ControlNets. "
        "Remove it to train a LoRA or the whole model."
    ]


def test_it_is_said_once_which_flavour_a_config_without_one_trains(place: Any) -> None:
    place.config = dict(USUAL)
    notices = place.load().notices
    (notice,) = [text for text in notices if "klein-9b" in text]
    assert notice == (
        "model_flavour is not set, so this run trains dev. SimpleTuner would train klein-9b: add "
        "--model_flavour klein-9b for that, or --model_flavour dev."
    )
    for flag in re.findall(r"(--model_flavour) (\S+?)[.,]?(?= for|$)", notice):
        assert not [text for text in place.load(*flag).notices if text.startswith("model_flavour is not set")]
    for changes, flags in (
        ({"model_flavour": "dev"}, ()),
        ({"pretrained_model_name_or_path": "black-forest-labs/FLUX.2-dev"}, ()),
        ({}, ("--model_flavour=tiny",)),
        ({"model_family": None}, ()),
        ({"model_family": None}, ("--model_family=flux2",)),
    ):
        place.config = USUAL | changes
        assert not [text for text in place.load(*flags).notices if "klein-9b" in text]


def test_every_option_of_simpletuner_is_known() -> None:
    known = RunConfig.model_fields.keys() | OPTION_ALIASES.keys()
    assert [name for name in OPTIONS if name not in known and OTHER_OPTIONS.of(name) is None] == []


def test_no_option_of_simpletuner_is_called_unknown(place: Any) -> None:
    assert len(OPTIONS) > 480
    others = [name for name in OPTIONS if name not in RunConfig.model_fields and name not in OPTION_ALIASES]
    place.config |= dict.fromkeys(others, "something else")
    assert not [problem for problem in place.problems() if "no such option" in problem]


def test_every_dataset_key_of_simpletuner_is_known() -> None:
    known = ImageSet.model_fields.keys() | ConditioningSet.model_fields.keys() | TextStore.model_fields.keys()
    others = [name for name in DATASET_KEYS if name not in known]
    assert [name for name in others if OTHER_SET_KEYS.of(name) is None and OTHER_STORE_KEYS.of(name) is None] == []


def test_datasets_of_simpletuner_carry_over(place: Any) -> None:
    place.datasets[0] |= {
        "crop": True,
        "disabled": False,
        "hash_filenames": True,
        "metadata_backend": "discovery",
        "prepend_instance_prompt": False,
        "preserve_data_backend_cache": True,
        "repeats": 2,
        "skip_file_discovery": "",
        "text_encoder_batch_size": 4,
        "vae_cache_clear_each_epoch": False,
    }
    place.datasets[1] |= {"disabled": False, "preserve_data_backend_cache": False, "write_batch_size": 8}
    notices = place.load().notices
    assert [notice.partition(": ")[2] for notice in notices] == [
        "hash_filenames and preserve_data_backend_cache have no effect: caches are checked by content, and never "
        "deleted.",
        "text_encoder_batch_size has no effect: the run's option applies to all datasets.",
        "preserve_data_backend_cache has no effect: caches are checked by content, and never deleted.",
    ]


def test_dataset_keys_that_ask_for_what_is_not_here_are_refused_with_what_to_do(place: Any) -> None:
    place.datasets[0] |= {
        "delete_problematic_images": True,
        "conditioning": [{"type": "canny"}],
        "num_repeats": 3,
        "slider_strength": 0.5,
    }
    place.datasets[1]["disabled"] = True
    problems = [re.sub(r"^[^:]*, (cats|text): ", "", problem) for problem in place.problems()]
    assert problems == [
        "delete_problematic_images = true: a run never deletes files of a dataset. Remove it: unusable "
        "images are left out, counted and listed.",
        'conditioning = [{"type": "canny"}]: this program generates no conditioning images. Remove it, and generate '
        "them with another program.",
        "num_repeats: repeats counts EXTRA passes. Remove it, and set repeats to one less.",
        "slider_strength = 0.5: this program trains no slider LoRAs. Remove it.",
        "disabled = true: image sets name the store they use. Remove it, or remove the whole entry.",
    ]
    place.datasets = [typed(place.datasets[0], problems[:-1]), typed(place.datasets[1], problems[-1:])]
    place.load()


@pytest.mark.parametrize(
    "name",
    [
        "validation_disable_un",
        "ema_config",
        "precision",
        "group_offload",
        "min_snr_gamma",
        "noise_scheduler",
        "save_state",
        "sample",
        "guidance_scale",
        "text_encoder_lr2",
        "rolling_backup",
        "clip_skip",
        "quantize",
        "dtype",
        "output_dtype",
    ],
)
def test_a_name_of_another_meaning_is_never_suggested(place: Any, name: str) -> None:
    place.config[name] = 1
    assert place.problems() == [f"{name}: no such option."]


def test_a_slip_is_answered_with_the_name_itself() -> None:
    for typo, meant in (
        ("train_batchsize", "train_batch_size"),
        ("optimiser", "optimizer"),
        ("resume_checkpoint", "resume_from_checkpoint"),
        ("model_flavor", "model_flavour"),
        ("lora-rnak", "lora_rank"),
    ):
        assert nearest(typo, RUN.names) == meant
    assert nearest("adamw4bit", ["adamw8bit"]) is None
