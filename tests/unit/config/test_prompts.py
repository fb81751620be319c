from typing import Any

import pytest

from simpletuner.config.prompts import BUILT_IN


def test_without_a_library_there_are_no_prompts(place: Any) -> None:
    assert place.load().prompts == {}


def test_the_library_beside_the_config_is_found(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"one": "a cat"})
    assert place.load().prompts == {"one": "a cat"}


def test_the_library_in_config_is_found_from_elsewhere(place: Any) -> None:
    place.write("elsewhere/config.json", place.config)
    place.write("elsewhere/multidatabackend.json", place.datasets)
    place.write("config/user_prompt_library.json", {"one": "a cat"})
    assert place.load("--config=elsewhere/config.json").prompts == {"one": "a cat"}


def test_a_named_library_must_be_there(place: Any) -> None:
    place.config["user_prompt_library"] = "mine.json"
    assert place.problems() == ["mine.json: no such file."]
    place.write("mine.json", {"one": "a cat"})
    assert place.load().prompts == {"one": "a cat"}


def test_the_sources_add_up(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"one": "a cat"})
    prompts = place.load(
        "--validation_prompt", "a dog", "--validation_prompt_library", "--validation_subject=x"
    ).prompts
    assert list(prompts) == [*BUILT_IN, "validation_prompt", "one"]
    assert not any("<subject>" in prompt for prompt in prompts.values())


def test_the_subject_comes_from_the_option_else_from_the_dataset_else_stays(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"one": "a photo of <subject>"})
    place.config["validation_resolution"] = "128x128"
    loaded = place.load()
    assert loaded.prompts == {"one": "a photo of <subject>"}
    assert loaded.notices == ("<subject> stays in the prompts as typed: validation_subject says what it stands for.",)
    place.datasets[0]["instance_prompt"] = "Tom the cat"
    assert place.load().prompts == {"one": "a photo of Tom the cat"}
    assert place.load("--validation_subject=Kitty").prompts == {"one": "a photo of Kitty"}


@pytest.mark.parametrize(
    "name",
    ["a/b", "..", "", ".hidden", "a:b", "x" * 201, "ก" * 67, "dot.", "line\nbreak", "\u200b", "\ud800"],
    ids=repr,
)
def test_a_name_must_do_as_a_file_name(place: Any, name: str) -> None:
    place.write("config/user_prompt_library.json", {name: "a cat"})
    (problem,) = place.problems()
    assert "it becomes a file's name" in problem


@pytest.mark.parametrize(
    "name", ["portrait_subject", "Größe 2", "a-b.c", "x" * 200, "चित्र दीवार", "ภาพสวย ๑", "祭り", "a (1)"]
)
def test_usual_names_pass(place: Any, name: str) -> None:
    place.write("config/user_prompt_library.json", {name: "a cat"})
    assert name in place.load().prompts


def test_decomposed_accents_are_composed_and_collide(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"e\u0301te\u0301": "a cat"})
    assert place.load().prompts == {"\u00e9t\u00e9": "a cat"}
    place.write("config/user_prompt_library.json", {"e\u0301te\u0301": "a cat", "\u00c9t\u00e9": "a dog"})
    (problem,) = place.problems()
    assert "is taken by" in problem


def test_names_that_differ_only_in_case_collide(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"Cat": "a cat", "cat": "a cat"})
    assert place.problems() == [
        "config/user_prompt_library.json: the name 'cat' is taken by 'Cat'. Rename one of them."
    ]


@pytest.mark.parametrize("prompt", [3, None, "", "  ", {"prompt": "x"}], ids=repr)
def test_a_prompt_is_text(place: Any, prompt: object) -> None:
    place.write("config/user_prompt_library.json", {"one": prompt})
    (problem,) = place.problems()
    assert problem.endswith("expected a prompt, as text.")


def test_the_library_is_an_object(place: Any) -> None:
    place.write("config/user_prompt_library.json", ["a cat"])
    assert place.problems()[0].startswith('config/user_prompt_library.json: ["a cat"]: expected an object')


@pytest.mark.parametrize(("resolution", "is_said"), [("128x128", False), ("128x192", False), ("512", True)])
def test_the_embedded_model_says_at_which_size_it_draws(place: Any, resolution: str, is_said: bool) -> None:
    place.config |= {"validation_resolution": resolution}
    assert place.load().notices == (), "nothing is drawn without a prompt"
    place.config["validation_prompt"] = "a star"
    said = [notice for notice in place.load().notices if "was trained at 128x128" in notice]
    assert bool(said) is is_said
    assert not is_said or "Give --validation_resolution=128x128, and resolution 128 in the image sets." in said[0]
    assert not [notice for notice in place.load("--validation_disable").notices if "was trained at" in notice]
