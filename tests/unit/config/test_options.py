from typing import Any

import pytest
from pydantic import ValidationError

from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.run import OPTION_NAMES, SLICES, RunConfig
from simpletuner.config.values import OptionType, from_text, is_quoted_number, join_names, kinds, nearest, value_text


def test_slices_are_disjoint_and_complete() -> None:
    assert len(set(OPTION_NAMES)) == len(OPTION_NAMES)
    assert set(OPTION_NAMES) == set(RunConfig.model_fields)


def test_every_default_would_be_accepted() -> None:
    """pydantic does not check defaults."""
    defaults = RunConfig().model_dump()
    assert RunConfig.model_validate(defaults) == RunConfig()


@pytest.mark.parametrize("model", [*SLICES, ImageSet, ConditioningSet, TextStore], ids=lambda model: model.__name__)
def test_every_field_is_documented(model: Any) -> None:
    texts = model.documentation()
    assert list(texts) == list(model.model_fields)
    assert all(text[0].isupper() or text[0] == "`" for text in texts.values())
    assert all(text.endswith(".") for text in texts.values())


def test_alpha_is_the_rank_unless_given() -> None:
    assert RunConfig(lora_rank=8).alpha == 8.0
    assert RunConfig(lora_rank=8, lora_alpha=4).alpha == 4.0


def test_the_average_of_a_full_model_lies_on_the_cpu_unless_asked_for() -> None:
    places = {
        (model_type, device): RunConfig.model_validate({"model_type": model_type, "ema_device": device})
        for model_type in ("lora", "full")
        for device in ("auto", "cpu", "accelerator")
    }
    on_cpu = {place for place, config in places.items() if config.is_average_on_cpu}
    assert on_cpu == {("lora", "cpu"), ("full", "auto"), ("full", "cpu")}


def test_the_base_has_the_format_of_the_computation_unless_another_is_asked_for() -> None:
    assert RunConfig().base_dtype == "bf16"
    assert RunConfig(mixed_precision="fp16").base_dtype == "fp16"
    assert RunConfig(mixed_precision="no").base_dtype == "fp32"
    assert RunConfig(mixed_precision="no", base_model_default_dtype="bf16").base_dtype == "bf16"


@pytest.mark.parametrize(
    ("given", "text", "is_autocast"),
    [
        ({}, "bf16", False),
        ({"mixed_precision": "no"}, "fp32", False),
        ({"mixed_precision": "fp16"}, "bf16", False),
        ({"mixed_precision": "fp16", "base_model_default_dtype": "bf16"}, "bf16", True),
        ({"mixed_precision": "fp16", "base_model_default_dtype": "fp32"}, "fp32", True),
    ],
)
def test_fp16_is_cast_to_only_from_another_format_and_never_encodes_text(
    given: dict[str, object], text: str, is_autocast: bool
) -> None:
    config = RunConfig.model_validate(given)
    assert (config.text_dtype, config.is_autocast) == (text, is_autocast)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1024", ((1024, 1024),)),
        (512, ((512, 512),)),
        ("1024x768", ((1024, 768),)),
        ("1024X768, 64", ((1024, 768), (64, 64))),
    ],
    ids=repr,
)
def test_sizes_are_read(text: object, sizes: tuple[tuple[int, int], ...]) -> None:
    assert RunConfig.model_validate({"validation_resolution": text}).sizes == sizes


@pytest.mark.parametrize("text", ["", "1000", "1024x", "1024*1024", "0", "-16", 1024.0, True, "1024,,512"], ids=repr)
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"validation_resolution": text})


def test_no_steps_means_not_set() -> None:
    assert RunConfig(max_train_steps=0).max_train_steps is None


def test_sizes_on_disk_are_bytes() -> None:
    assert RunConfig().disk_low_bytes == 2 * 1024**3
    with pytest.raises(ValidationError):
        RunConfig(disk_low_threshold="much")


@pytest.mark.parametrize("value", ["10,20,30", "10, 20, 30", [10, 20, 30]], ids=repr)
def test_layers_are_a_list(value: object) -> None:
    config = RunConfig.model_validate({"custom_text_encoder_intermediary_layers": value})
    assert config.custom_text_encoder_intermediary_layers == (10, 20, 30)


@pytest.mark.parametrize("value", ["", "10,20,x", [], [0], [20, 10], [10, 10], 10], ids=repr)
def test_layers_rise_from_one(value: object) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"custom_text_encoder_intermediary_layers": value})


def test_torch_adamw_is_adamw() -> None:
    assert RunConfig.model_validate({"optimizer": "torch-adamw"}).optimizer == "adamw"


def test_workers_are_at_most_eight_unless_given() -> None:
    assert 1 <= RunConfig().workers <= 8
    assert RunConfig(max_workers=20).workers == 20


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_rank", "a whole number of at least 1"),
        ("lora_alpha", "a number above 0"),
        ("lora_dropout", "a number of at least 0 and below 1"),
        ("caption_dropout_probability", "a number from 0 to 1"),
        ("gradient_checkpointing", "true or false"),
        ("flux_lora_target", "all, attention, mlp or tiny"),
        ("model_type", "lora or full"),
        ("output_dir", "a path"),
        ("pretrained_model_name_or_path", "a Hub id or a path"),
        ("validation_prompt", "text"),
        ("disk_low_threshold", "a size such as 2GB"),
    ],
)
def test_what_is_expected_in_words(key: str, words: str) -> None:
    assert kinds(RunConfig)[key].expects == words


def kind(base: Any) -> OptionType:
    return OptionType(base, (), "", is_path=False, is_model=False, is_json=False)


@pytest.mark.parametrize(
    ("text", "base", "value"),
    [
        ("1", int, 1),
        ("-1", int, -1),
        ("1.0", int, "1.0"),
        ("1e3", float, 1000.0),
        (".5", float, 0.5),
        ("inf", float, "inf"),
        ("1_0", float, "1_0"),
        ("١", int, "١"),
        ("true", bool, True),
        ("TRUE", bool, "TRUE"),
        ("true", str, "true"),
    ],
)
def test_text_becomes_a_value_only_where_it_is_exactly_one(text: str, base: Any, value: object) -> None:
    assert from_text(text, kind(base)) == value
    assert type(from_text(text, kind(base))) is type(value)


def test_a_quoted_number_is_seen() -> None:
    assert is_quoted_number("8", kind(int))
    assert not is_quoted_number("8.5", kind(int))
    assert not is_quoted_number("8", kind(str))


def test_lists_in_words() -> None:
    assert join_names(["a"]) == "a"
    assert join_names(["a", "b", "c"]) == "a, b or c"
    assert join_names(["a", "b"], "and") == "a and b"


def test_values_are_shown_as_typed_and_cut() -> None:
    assert [value_text(value) for value in ("al", -1, True, None, {"a": 1})] == [
        "'al'",
        "-1",
        "true",
        "null",
        '{"a": 1}',
    ]
    assert len(value_text("x" * 1000)) == 80


def test_the_nearest_name() -> None:
    assert nearest("LORA-RANK", ["lora_rank", "lora_alpha"]) == "lora_rank"
    assert nearest("zebra", ["lora_rank"]) is None
