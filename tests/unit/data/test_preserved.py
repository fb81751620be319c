"""The prompts that are preserved beside captions."""

from pathlib import Path
from typing import Any

import pytest
from tests.recipes.conftest import PICTURES

from simpletuner.base.errors import DataError
from simpletuner.config.datasets import ImageSet
from simpletuner.config.options.preservation import PreservationOptions, with_trigger_replaced
from simpletuner.data.manifest import Manifest, scan
from simpletuner.data.preserved import PreservedPrompts

CLASS = {"preservation": "class", "preservation_trigger": "zwx cat", "preservation_class": "cat"}


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("a photo of zwx", "a photo of dog"),
        ("zwx, zwx-like; (zwx)", "dog, dog-like; (dog)"),
        ("zwxy and azwx and zwx_2", None),
        ("Zwx", None),
        ("ein zwx über", "ein dog über"),
        ("äzwx", None),
        ("", None),
    ],
)
def test_the_trigger_is_replaced_where_it_stands_as_a_word(caption: str, prompt: str | None) -> None:
    assert with_trigger_replaced(caption, "zwx", "dog") == prompt


def test_triggers_and_classes_are_texts_and_no_patterns() -> None:
    assert with_trigger_replaced("a (z.w)+ b", "(z.w)+", r"\1 \g<0>") == r"a \1 \g<0> b"
    assert with_trigger_replaced("a zzw b", "z.w", "dog") is None


def prompts(**options: Any) -> PreservedPrompts:
    return PreservedPrompts(PreservationOptions(**options))


def image_set(**keys: Any) -> ImageSet:
    return ImageSet.model_validate(PICTURES | keys)


def test_a_sets_class_comes_first() -> None:
    assert prompts(**CLASS).of(image_set(), "one zwx cat") == "one cat"
    assert prompts(**CLASS).of(image_set(class_prompt="kitten"), "one zwx cat") == "one kitten"


def test_who_takes_no_part() -> None:
    blank = prompts(preservation="blank")
    assert blank.of(image_set(), "anything") == ""
    assert blank.of(image_set(), "") is None, "a dropped caption"
    assert blank.of(image_set(is_regularisation_data=True), "anything") is None
    for off in ({}, {"preservation": "blank", "preservation_weight": 0.0}):
        assert prompts(**off).of(image_set(), "anything") is None


@pytest.fixture
def manifest(pictures: Path, own_folder: Path) -> Manifest:
    """Six captions: "a soft gradient, number 0" to 5."""
    return scan(image_set(instance_data_dir=str(pictures), cache_dir_vae=str(own_folder / "cache")), seed=0, workers=1)


def test_captions_without_the_trigger_are_counted(manifest: Manifest) -> None:
    found = prompts(preservation="class", preservation_trigger="number 3", preservation_class="gradient")
    assert found.all_of(manifest) == ["a soft gradient, gradient"]
    assert found.notice([manifest]) == (
        "preservation class: 5 of 6 captions do not contain 'number 3' and take no part: a soft gradient, number 0; "
        "a soft gradient, number 1; a soft gradient, number 2; …"
    )
    everywhere = prompts(preservation="class", preservation_trigger="gradient", preservation_class="image")
    assert everywhere.notice([manifest]) is None
    assert prompts(preservation="blank").notice([manifest]) is None


def test_a_trigger_in_no_caption_is_an_error(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="preservation_trigger = 'zwx cat' is in none of 6 captions"):
        prompts(**CLASS).notice([manifest])


def test_what_changes_the_loss_changes_the_fingerprint(manifest: Manifest) -> None:
    seen = {manifest.fingerprint}
    for keys in ({"is_regularisation_data": True}, {"loss_weight": 0.5}, {"class_prompt": "cat"}):
        changed = Manifest(manifest.image_set.model_copy(update=keys), manifest.samples, (), ())
        seen.add(changed.fingerprint)
    assert len(seen) == 4
