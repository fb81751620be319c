from typing import Any

import pytest

from simpletuner.config.datasets import MAX_REFERENCES
from simpletuner.config.prompts import BUILT_IN_PROMPTS, Prompt


def test_without_a_library_there_are_no_prompts(place: Any) -> None:
    assert place.load().prompts == {}


def test_the_library_beside_the_config_is_found(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"one": "a cat"})
    assert place.load().prompts == {"one": Prompt("a cat")}


def test_the_library_in_config_is_found_from_elsewhere(place: Any) -> None:
    place.write("elsewhere/config.json", place.config)
    place.write("elsewhere/multidatabackend.json", place.datasets)
    place.write("config/user_prompt_library.json", {"one": "a cat"})
    assert place.load("--config=elsewhere/config.json").prompts == {"one": Prompt("a cat")}


def test_a_named_library_must_be_there(place: Any) -> None:
    place.config["user_prompt_library"] = "mine.json"
    assert place.problems() == ["mine.json: no such file."]
    place.write("mine.json", {"one": "a cat"})
    assert place.load().prompts == {"one": Prompt("a cat")}


def test_the_sources_add_up(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"one": "a cat"})
    prompts = place.load(
        "--validation_prompt", "a dog", "--validation_prompt_library", "--validation_subject=x"
    ).prompts
    assert list(prompts) == [*BUILT_IN_PROMPTS, "validation_prompt", "one"]
    assert not any("<subject>" in prompt.text for prompt in prompts.values())


def test_the_subject_comes_from_the_option_else_from_the_dataset_else_stays(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"one": "a photo of <subject>"})
    place.config["validation_resolution"] = "128x128"
    loaded = place.load()
    assert loaded.prompts == {"one": Prompt("a photo of <subject>")}
    assert loaded.notices == ("<subject> stays in the prompts as typed: set validation_subject to replace it.",)
    place.datasets[0]["instance_prompt"] = "Tom the cat"
    assert place.load().prompts == {"one": Prompt("a photo of Tom the cat")}
    assert place.load("--validation_subject=Kitty").prompts == {"one": Prompt("a photo of Kitty")}


@pytest.mark.parametrize(
    "name",
    ["a/b", "..", "", ".hidden", "a:b", "x" * 201, "ก" * 67, "dot.", "line\nbreak", "\u200b", "\ud800"],
    ids=repr,
)
def test_a_name_must_do_as_a_file_name(place: Any, name: str) -> None:
    place.write("config/user_prompt_library.json", {name: "a cat"})
    (problem,) = place.problems()
    assert "it becomes a file name" in problem


@pytest.mark.parametrize(
    "name", ["portrait_subject", "Größe 2", "a-b.c", "x" * 200, "चित्र दीवार", "ภาพสวย ๑", "祭り", "a (1)"]
)
def test_usual_names_pass(place: Any, name: str) -> None:
    place.write("config/user_prompt_library.json", {name: "a cat"})
    assert name in place.load().prompts


def test_decomposed_accents_are_composed_and_collide(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"e\u0301te\u0301": "a cat"})
    assert place.load().prompts == {"\u00e9t\u00e9": Prompt("a cat")}
    place.write("config/user_prompt_library.json", {"e\u0301te\u0301": "a cat", "\u00c9t\u00e9": "a dog"})
    (problem,) = place.problems()
    assert "is taken by" in problem


def test_names_that_differ_only_in_case_collide(place: Any) -> None:
    place.write("config/user_prompt_library.json", {"Cat": "a cat", "cat": "a cat"})
    assert place.problems() == [
        "config/user_prompt_library.json: the name 'cat' is taken by 'Cat'. Rename one of them."
    ]


@pytest.mark.parametrize("prompt", [3, None, "", "  ", ["x"]], ids=repr)
def test_a_prompt_is_text_or_an_object(place: Any, prompt: object) -> None:
    place.write("config/user_prompt_library.json", {"one": prompt})
    (problem,) = place.problems()
    assert problem.endswith('expected a prompt, as text or as {"prompt": "text", "references": ["a.png"]}.')


def test_references_are_paths_from_the_working_folder(place: Any) -> None:
    for name in ("a.png", "b.JPG"):
        (place.folder / name).write_bytes(b"")
    entries = {"plain": {"prompt": "a cat"}, "two": {"prompt": "a <subject>", "references": ["b.JPG", "a.png"]}}
    place.write("config/user_prompt_library.json", entries)
    assert place.load("--validation_subject=dog").prompts == {
        "plain": Prompt("a cat"),
        "two": Prompt("a dog", (str(place.folder / "b.JPG"), str(place.folder / "a.png"))),
    }


def test_every_fault_of_a_prompt_with_references_is_told(place: Any) -> None:
    for name in ("a.png", "notes.txt"):
        (place.folder / name).write_bytes(b"")
    (place.folder / "folder").mkdir()
    entries = {
        "keys": {"prompt": "a cat", "reference": ["a.png"]},
        "none": {"references": []},
        "text": {"prompt": "", "references": "a.png"},
        "files": {"prompt": "a cat", "references": ["gone.png", "folder", "notes.txt", "{nobody}.png", "a.png"]},
        "many": {"prompt": "a cat", "references": ["a.png"] * (MAX_REFERENCES + 1)},
        "most": {"prompt": "a cat", "references": ["a.png"] * MAX_REFERENCES},
    }
    place.write("config/user_prompt_library.json", entries)
    found = [text.removeprefix("config/user_prompt_library.json: ") for text in place.problems()]
    folder = place.folder
    assert found == [
        'keys.reference: expected {"prompt": "text", "references": ["a.png"]}.',
        "none has no prompt: expected a prompt, as text.",
        "text.prompt = '': expected a prompt, as text.",
        "text.references = 'a.png': expected a list of paths, [\"a.png\"].",
        "files.references = '{nobody}.png': placeholder {nobody} is not one of "
        "{model_family}, {output_dir} or {env:NAME}.",
        f"files.references = {folder / 'gone.png'}: no such file: expected the path of an image.",
        f"files.references = {folder / 'folder'}: this is not a file: expected the path of an image.",
        f"files.references = {folder / 'notes.txt'}: expected an image, such as .png, .jpg or .webp.",
        "many.references: 11 reference images: expected at most 10.",
    ]


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
