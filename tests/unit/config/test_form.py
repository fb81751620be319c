"""The form names every option once, in the words of the docs."""

import json

from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.form import BASIC, BASIC_DATASET_KEYS, UNITS, form
from simpletuner.config.labels import DATASET_LABELS, LABELS
from simpletuner.config.run import OPTION_NAMES, RunConfig

KEYS_OF_SETS = ImageSet.model_fields.keys() | ConditioningSet.model_fields.keys() | TextStore.model_fields.keys()


def test_every_option_is_asked_for_once() -> None:
    assert tuple(field.name for group in form().groups for field in group.fields) == OPTION_NAMES
    assert [field.name for field in form().image_set] == list(ImageSet.model_fields)
    assert [field.name for field in form().conditioning_set] == list(ConditioningSet.model_fields)
    assert [field.name for field in form().text_store] == list(TextStore.model_fields)


def test_what_is_marked_is_an_option() -> None:
    assert set(OPTION_NAMES) >= BASIC
    assert KEYS_OF_SETS >= BASIC_DATASET_KEYS
    assert KEYS_OF_SETS | set(OPTION_NAMES) >= UNITS.keys()
    assert len(BASIC) <= 30


def test_every_option_has_a_label_in_words_and_no_two_are_equal() -> None:
    for labels, names in ((LABELS, set(OPTION_NAMES)), (DATASET_LABELS, KEYS_OF_SETS)):
        assert labels.keys() == names
        assert len({label.lower() for label in labels.values()}) == len(labels)
        assert [label for label in labels.values() if "_" in label or not label[0].isupper() or len(label) > 30] == []
    assert {field.name: field.label for group in form().groups for field in group.fields} == LABELS


def test_each_field_says_what_it_takes() -> None:
    fields = {field.name: field for group in form().groups for field in group.fields}
    assert all(field.meaning and field.expects for field in fields.values())
    assert fields["gradient_checkpointing"].kind == "boolean"
    assert fields["lora_rank"].kind == "integer"
    assert (fields["lora_rank"].minimum, fields["lora_rank"].default, fields["lora_rank"].basic) == (1, 16, True)
    assert (fields["learning_rate"].kind, fields["learning_rate"].minimum) == ("number", 0)
    assert (fields["lora_dropout"].minimum, fields["lora_dropout"].maximum) == (0, 1)
    assert (fields["flux_lora_target"].kind, fields["flux_lora_target"].choices[0]) == ("choice", "all")
    assert fields["pretrained_model_name_or_path"].kind == "model"
    assert fields["output_dir"].kind == "path"
    assert fields["peft_lora_target_modules"].kind == "json"
    assert fields["flow_custom_timesteps"].kind == "json"
    assert "adamw" in fields["optimizer"].choices
    assert fields["max_train_steps"].unit == "steps"
    assert {field.name: field.required for field in form().image_set}["instance_data_dir"]


def test_defaults_are_those_of_the_config() -> None:
    defaults = RunConfig().model_dump(mode="json")
    shown = json.loads(form().model_dump_json())
    assert {field["name"]: field["default"] for group in shown["groups"] for field in group["fields"]} == defaults


def test_no_link_of_the_docs_is_left() -> None:
    sets = [*form().image_set, *form().conditioning_set, *form().text_store]
    every = [field for group in form().groups for field in group.fields] + sets
    assert not [field.name for field in every if "](" in field.meaning]
