"""Load the prompts of validation images."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.imagefiles import IMAGE_SUFFIXES
from simpletuner.base.text import FILE_NAME, is_file_name, is_visible
from simpletuner.config.datasets import MAX_REFERENCES, Datasets
from simpletuner.config.documents import read_document
from simpletuner.config.listing import PathContext
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.values import join_names, value_text

SUBJECT = "<subject>"
OPTION_PROMPT = "validation_prompt"
"""Name of the prompt that the option `validation_prompt` gives."""

BUILT_IN_PROMPTS = {
    "portrait": "a portrait photograph of <subject> by a window, soft daylight, shallow depth of field",
    "outdoors": "a wide photograph of <subject> on a hillside at golden hour, long shadows",
    "still_life": "<subject> on a wooden table beside a blue vase, studio light, plain background",
    "drawing": "a pencil drawing of <subject> on rough paper, visible strokes",
    "lettering": 'a shop window with the words "open late" and <subject> behind the glass, at night',
}
"""Prompts that `validation_prompt_library` adds, by name."""


@dataclass(frozen=True)
class Prompt:
    """The prompt of a validation image."""

    text: str
    references: tuple[str, ...] = ()
    """Paths of reference images, in order."""


def load_prompts(
    options: ValidationOptions, datasets: Datasets | None, library: Path | None, label: str, path_context: PathContext
) -> tuple[dict[str, Prompt], list[str]]:
    """Prompts by name, with `<subject>` replaced, and notices.

    `library` is the user's file, which messages call `label`. `datasets` is None if they are faulty.

    Raises:
        ConfigError: lists every problem of the library.
    """
    prompts = (
        {name: Prompt(text) for name, text in BUILT_IN_PROMPTS.items()} if options.validation_prompt_library else {}
    )
    if options.validation_prompt is not None:
        prompts[OPTION_PROMPT] = Prompt(options.validation_prompt)
    if library is not None:
        prompts.update(_library(read_document(library, label), label, tuple(prompts), path_context))
    subject = options.validation_subject or _subject_of(datasets)
    if subject is not None:
        return {
            name: replace(prompt, text=prompt.text.replace(SUBJECT, subject)) for name, prompt in prompts.items()
        }, []
    if datasets is not None and any(SUBJECT in prompt.text for prompt in prompts.values()):
        return prompts, [f"{SUBJECT} stays in the prompts as typed: set validation_subject to replace it."]
    return prompts, []


def reference_faults(label: str, paths: tuple[str, ...]) -> Iterator[Problem]:
    """Problems with the paths of a prompt's reference images; messages call the list `label`."""
    if len(paths) > MAX_REFERENCES:
        yield Problem(f"{label}: {len(paths)} reference images", f"at most {MAX_REFERENCES}")
    for path in paths:
        if not os.path.isfile(path):  # unlike Path.is_file, does not raise if the path is too long
            fault = "this is not a file" if os.path.exists(path) else "no such file"
            yield Problem(f"{label} = {path}: {fault}", "the path of an image")
        elif Path(path).suffix.lower() not in IMAGE_SUFFIXES:
            yield Problem(f"{label} = {path}", f"an image, such as {join_names(['.png', '.jpg', '.webp'])}")


def _subject_of(datasets: Datasets | None) -> str | None:
    sets = () if datasets is None else datasets.train_sets
    return next((image_set.instance_prompt for image_set in sets if image_set.instance_prompt), None)


def _library(value: Any, label: str, taken: tuple[str, ...], path_context: PathContext) -> dict[str, Prompt]:
    if not isinstance(value, dict):
        raise ConfigError.of(f"{label}: {value_text(value)}", 'an object {"name": "prompt"}')
    problems = []
    prompts: dict[str, Prompt] = {}
    names = {_folded(name): name for name in taken}
    for typed, entry in value.items():
        name = unicodedata.normalize("NFC", typed)
        earlier = names.setdefault(_folded(name), typed)
        if not is_file_name(name):
            problems.append(Problem(f"{label}: the name {value_text(typed)}", f"{FILE_NAME}: it becomes a file name"))
        elif earlier is not typed:
            found = f"{label}: the name {value_text(typed)} is taken by {value_text(earlier)}"
            problems.append(Problem(found, remedy="Rename one of them."))
        try:
            prompts[name] = _prompt(entry, f"{label}: {name}", path_context)
        except ConfigError as error:
            problems.extend(error.problems)
    ConfigError.raise_if(problems)
    return prompts


def _prompt(entry: Any, label: str, path_context: PathContext) -> Prompt:
    """Parse an entry of the library: a text, or an object with a prompt and references.

    Raises:
        ConfigError: lists every problem of the entry.
    """
    if isinstance(entry, str) and is_visible(entry):
        return Prompt(entry)
    if not isinstance(entry, dict):
        raise ConfigError.of(f"{label} = {value_text(entry)}", f"a prompt, as text or as {_OBJECT}")
    problems = [Problem(f"{label}.{key}", f"{_OBJECT}") for key in entry if key not in ("prompt", "references")]
    text, typed = entry.get("prompt"), entry.get("references", [])
    if not isinstance(text, str) or not is_visible(text):
        found = f"{label}.prompt = {value_text(text)}" if "prompt" in entry else f"{label} has no prompt"
        problems.append(Problem(found, "a prompt, as text"))
    if not isinstance(typed, list) or not all(isinstance(path, str) and is_visible(path) for path in typed):
        problems.append(Problem(f"{label}.references = {value_text(typed)}", 'a list of paths, ["a.png"]'))
        typed = []
    resolved = [path_context.resolve(f"{label}.", "references", path) for path in typed]
    problems += [path for path in resolved if isinstance(path, Problem)]
    paths = tuple(path for path in resolved if isinstance(path, str))
    ConfigError.raise_if([*problems, *reference_faults(f"{label}.references", paths)])
    return Prompt(str(text), paths)


_OBJECT = '{"prompt": "text", "references": ["a.png"]}'


def _folded(name: str) -> str:
    """`name` with case and Unicode composition folded. Some file systems do not distinguish names with equal
    results."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
