from typing import Any

import pytest

from simpletuner.config import later
from simpletuner.config.datasets import ImageSet, TextStore
from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds


@pytest.mark.parametrize("key", later.LATER_OPTIONS)
def test_each_key_says_that_it_is_not_built_yet(place: Any, key: str) -> None:
    place.config[key] = "something else"
    (problem,) = place.problems()
    assert problem == f"{key}: not built yet: {later.LATER_OPTIONS[key].work}. Leave it out until then."


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in later.OPTION_VALUES.items() for value in values]
)
def test_each_value_says_that_it_is_not_built_yet(place: Any, key: str, value: str) -> None:
    place.config[key] = value
    (problem,) = place.problems()
    assert problem.startswith(f"{key} = '{value}': not built yet: ")
    assert kinds(RunConfig)[key].expects in problem


@pytest.mark.parametrize(
    ("key", "off"), [(key, off) for key, option in later.LATER_OPTIONS.items() for off in option.off], ids=repr
)
def test_a_key_that_asks_for_nothing_passes(place: Any, key: str, off: object) -> None:
    place.config[key] = off
    assert place.load().notices == ()


@pytest.mark.parametrize(
    "flag", ["--use_ema=false", "--quantize_via=accelerator", "--num_processes=1", "--lora_plus_ratio", "1"]
)
def test_off_may_come_from_a_flag(place: Any, flag: str) -> None:
    flags = {"--lora_plus_ratio": ("--lora_plus_ratio", "1.0"), "1": ("--lora_plus_ratio=1",)}
    assert place.load(*flags.get(flag, (flag,))).notices == ()


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


def test_false_is_not_zero(place: Any) -> None:
    place.config["input_perturbation"] = False
    assert "not built yet" in place.problems()[0]


def test_nothing_is_built_and_to_come_at_once() -> None:
    assert not later.LATER_OPTIONS.keys() & RunConfig.model_fields.keys()
    assert not later.SET_KEYS.keys() & ImageSet.model_fields.keys()
    assert not later.STORE_KEYS.keys() & TextStore.model_fields.keys()
    for model, values in (
        (RunConfig, later.OPTION_VALUES),
        (ImageSet, later.SET_VALUES),
        (TextStore, later.STORE_VALUES),
    ):
        for key, works in values.items():
            assert not works.keys() & set(kinds(model)[key].choices)
