from typing import Any

import pytest

from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.other_keys import (
    LATER_OPTIONS,
    NOT_YET,
    OPTION_ALIASES,
    OPTION_NICKNAMES,
    OTHER_CONDITION_KEYS,
    OTHER_OPTIONS,
    OTHER_SET_KEYS,
    OTHER_STORE_KEYS,
    OtherKeys,
)
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.values import kinds

VALUES = [(key, value) for key, values in OTHER_OPTIONS.values.items() for value in values]
REFUSED = [key for key, other in OTHER_OPTIONS.keys.items() if not other.is_ignored]
IGNORED = [key for key, other in OTHER_OPTIONS.keys.items() if other.is_ignored]


def test_each_refused_key_says_why_and_what_to_do(place: Any) -> None:
    place.config |= dict.fromkeys(REFUSED, "something else")
    problems = place.problems()
    assert len(problems) == len(REFUSED)
    for key, problem in zip(REFUSED, problems, strict=True):
        other = OTHER_OPTIONS.keys[key]
        value = " = 'something else'" if other.off else ""
        assert problem == f"{key}{value}: {other.meaning}. {other.remedy}"


def test_each_ignored_key_passes_and_each_reason_is_said_once(place: Any) -> None:
    place.config |= dict.fromkeys([*IGNORED, "sdnq_group_size", "sdnq_use_hadamard", "crepa_lambda"], "something else")
    notices = place.load().notices
    assert "hub_model_id, model_card_private, model_card_note" in "\n".join(notices)
    said = [notice for notice in notices if "no effect: SDNQ's precisions" in notice]
    assert len(said) == 1
    assert said[0].startswith("sdnq_group_size and sdnq_use_hadamard have no effect")
    for key in IGNORED:
        assert sum(f"{OTHER_OPTIONS.keys[key].meaning}." in notice for notice in notices) == 1


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_each_value_says_why_and_what_is_taken(place: Any, key: str, value: str) -> None:
    place.config[key] = value
    (problem,) = place.problems()
    assert problem.startswith(f"{key} = '{value}': {OTHER_OPTIONS.values[key][value].meaning}. ")
    if NOT_YET in problem:
        assert problem.endswith(f"Until then it takes {kinds(RunConfig)[key].expects}.")


def test_values_that_ask_for_nothing_pass_in_silence(place: Any) -> None:
    for number in range(max(len(other.off) for other in OTHER_OPTIONS.keys.values())):
        place.config |= {key: other.off[number] for key, other in OTHER_OPTIONS.keys.items() if len(other.off) > number}
        assert place.load().notices == ()
    place.config |= dict.fromkeys(OTHER_OPTIONS.keys, "")
    assert place.load().notices == ()
    place.config |= dict.fromkeys(OTHER_OPTIONS.keys)
    assert place.load().notices == ()


@pytest.mark.parametrize(
    "flag", ["--use_ema=false", "--quantize_via=accelerator", "--num_processes=1", "--controlnet=false"]
)
def test_off_may_come_from_a_flag(place: Any, flag: str) -> None:
    assert place.load(flag).notices == ()


def test_false_is_not_zero(place: Any) -> None:
    place.config["input_perturbation"] = False
    assert place.problems() == [
        "input_perturbation = false: not built yet: input perturbation. Leave it out until then."
    ]


def test_sets_of_references_are_not_drawn_at_random(place: Any) -> None:
    place.config["conditioning_multidataset_sampling"] = "combined"
    assert place.load().notices == ()
    place.config["conditioning_multidataset_sampling"] = "random"
    assert place.problems() == [
        "conditioning_multidataset_sampling = 'random': each sample uses the references of all its "
        "conditioning sets. Remove it to train with all."
    ]


def test_a_secret_is_not_shown(place: Any) -> None:
    place.config["webhook_config"] = "https://discord.com/api/webhooks/1/secret"
    place.datasets[0]["aws_secret_access_key"] = "hunter2"
    told = "\n".join(place.problems())
    assert "webhook_config: not built yet" in told
    assert "aws_secret_access_key: not built yet" in told
    assert "secret'" not in told
    assert "hunter2" not in told


def test_flags_of_the_quickstart_for_offloading_are_known(place: Any) -> None:
    loaded = place.load(
        "--enable_group_offload",
        "--group_offload_type",
        "block_level",
        "--group_offload_blocks_per_group",
        "1",
        "--group_offload_use_stream",
        "--group_offload_text_encoder",
    )
    assert loaded.notices == ()
    assert loaded.config.enable_group_offload
    assert loaded.config.group_offload_text_encoder


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (RunConfig, OTHER_OPTIONS),
        (ImageSet, OTHER_SET_KEYS),
        (ConditioningSet, OTHER_CONDITION_KEYS),
        (TextStore, OTHER_STORE_KEYS),
    ],
)
def test_a_name_has_one_meaning(model: Any, others: OtherKeys) -> None:
    names = set(model.model_fields)
    assert not others.keys.keys() & names
    assert not others.aliases.keys() & (names | others.keys.keys())
    assert not others.nicknames.keys() & (names | others.keys.keys() | others.aliases.keys())
    assert {*others.aliases.values(), *others.nicknames.values()} <= names
    assert not {name for name in names for prefix in others.prefixes if name.startswith(prefix)}
    for key, values in others.values.items():
        assert not values.keys() & set(kinds(model)[key].choices)


def test_later_work_is_in_no_other_part_of_the_table() -> None:
    assert all(OTHER_OPTIONS.keys[key] is other for key, other in LATER_OPTIONS.items())
    assert set(OPTION_NICKNAMES.values()) | set(OPTION_ALIASES.values()) <= set(OPTION_NAMES)


def test_a_config_for_several_gpus_carries_over(place: Any) -> None:
    """As one of the ancestor's that writes everything out, with FSDP2 on."""
    place.config |= {
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_ip": "127.0.0.1",
        "main_process_port": 29500,
        "context_parallel_size": 1,
        "accelerate_config": None,
        "accelerate_extra_args": "",
        "fsdp_enable": True,
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_offload": False,
        "fsdp_limit_all_gathers": True,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": None,
        "validation_multigpu": "batch-parallel",
    }
    assert place.load().notices == ()
    place.config |= {"fsdp_version": 1, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    assert place.load().notices == (
        "fsdp_version has no effect: fsdp_enable always means FSDP2.",
        "fsdp_state_dict_type has no effect: checkpoints have this program's own format, from which any "
        "number of processes can resume.",
    )


def test_configs_of_accelerate_are_not_built_yet(place: Any) -> None:
    place.config["accelerate_config"] = "config/accelerate.yaml"
    (problem,) = place.problems()
    assert NOT_YET in problem


def test_an_image_is_not_shared_by_processes(place: Any) -> None:
    """docs/decisions/0031-context-parallel.md says why."""
    place.config["context_parallel_size"] = 2
    (problem,) = place.problems()
    assert problem.endswith("Remove it, or give --activation_offload=true.")
    del place.config["context_parallel_size"]
    place.config["activation_offload"] = True
    place.load()
