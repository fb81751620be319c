"""The prompts that pictures are made of during training."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.imagefiles import PICTURE_SUFFIXES
from simpletuner.base.text import FILE_NAME, does_as_file_name, is_visible
from simpletuner.config.datasets import MOST_REFERENCES, Datasets
from simpletuner.config.documents import read_document
from simpletuner.config.listing import Surroundings
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.paths import filled, joined
from simpletuner.config.values import join_names, shown

SUBJECT = "<subject>"
SINGLE = "validation_prompt"
"""The name under which the option of the same name makes its pictures."""

BUILT_IN = {
    "portrait": "a portrait photograph of <subject> by a window, soft daylight, shallow depth of field",
    "outdoors": "a wide photograph of <subject> on a hillside at golden hour, long shadows",
    "still_life": "<subject> on a wooden table beside a blue vase, studio light, plain background",
    "drawing": "a pencil drawing of <subject> on rough paper, visible strokes",
    "lettering": 'a shop window with the words "open late" and <subject> behind the glass, at night',
}
"""`validation_prompt_library`."""


@dataclass(frozen=True)
class Prompt:
    """What a validation image shows."""

    text: str
    references: tuple[str, ...] = ()
    """Paths of reference images, in the order of their positions."""


def load_prompts(
    options: ValidationOptions, datasets: Datasets | None, library: Path | None, label: str, around: Surroundings
) -> tuple[dict[str, Prompt], list[str]]:
    """Prompts by name, `<subject>` replaced, and notices.

    `library` is the user's file, which messages call `label`; `datasets` may be None where they are faulty.

    Raises:
        ConfigError: every fault of the library.
    """
    prompts = {name: Prompt(text) for name, text in BUILT_IN.items()} if options.validation_prompt_library else {}
    if options.validation_prompt is not None:
        prompts[SINGLE] = Prompt(options.validation_prompt)
    if library is not None:
        prompts.update(_library(read_document(library, label), label, tuple(prompts), around))
    subject = options.validation_subject or _subject_of(datasets)
    if subject is not None:
        return {
            name: replace(prompt, text=prompt.text.replace(SUBJECT, subject)) for name, prompt in prompts.items()
        }, []
    if datasets is not None and any(SUBJECT in prompt.text for prompt in prompts.values()):
        return prompts, [f"{SUBJECT} stays in the prompts as typed: validation_subject says what it stands for."]
    return prompts, []


def reference_faults(label: str, paths: tuple[str, ...]) -> Iterator[Problem]:
    """What is wrong with the paths of a prompt's reference images; messages call the list `label`."""
    if len(paths) > MOST_REFERENCES:
        yield Problem(f"{label}: {len(paths)} reference images", f"at most {MOST_REFERENCES}")
    for path in paths:
        if not os.path.isfile(path):  # which raises for no path, as Path.is_file does for one that is too long
            what = "no file" if os.path.exists(path) else "no such file"
            yield Problem(f"{label} = {path}: {what}", "the path of an image")
        elif Path(path).suffix.lower() not in PICTURE_SUFFIXES:
            yield Problem(f"{label} = {path}", f"an image, such as {join_names(['.png', '.jpg', '.webp'])}")


def _subject_of(datasets: Datasets | None) -> str | None:
    sets = () if datasets is None else datasets.train_sets
    return next((image_set.instance_prompt for image_set in sets if image_set.instance_prompt), None)


def _library(value: Any, label: str, taken: tuple[str, ...], around: Surroundings) -> dict[str, Prompt]:
    if not isinstance(value, dict):
        raise ConfigError.of(f"{label}: {shown(value)}", 'an object {"name": "prompt"}')
    problems = []
    prompts: dict[str, Prompt] = {}
    seen = {_as_read(name): name for name in taken}
    for typed, entry in value.items():
        name = unicodedata.normalize("NFC", typed)
        same = seen.setdefault(_as_read(name), typed)
        if not does_as_file_name(name):
            problems.append(Problem(f"{label}: the name {shown(typed)}", f"{FILE_NAME}: it becomes a file's name"))
        elif same is not typed:
            found = f"{label}: the name {shown(typed)} is taken by {shown(same)}"
            problems.append(Problem(found, remedy="Rename one of them."))
        try:
            prompts[name] = _prompt(entry, f"{label}: {name}", around)
        except ConfigError as error:
            problems.extend(error.problems)
    ConfigError.raise_if(problems)
    return prompts


def _prompt(entry: Any, label: str, around: Surroundings) -> Prompt:
    """An entry of the library: a text, or an object with its references.

    Raises:
        ConfigError: every fault of it.
    """
    if isinstance(entry, str) and is_visible(entry):
        return Prompt(entry)
    if not isinstance(entry, dict):
        raise ConfigError.of(f"{label} = {shown(entry)}", f"a prompt, as text or as {_OBJECT}")
    problems = [Problem(f"{label}.{key}", f"{_OBJECT}") for key in entry if key not in ("prompt", "references")]
    text, typed = entry.get("prompt"), entry.get("references", [])
    if not isinstance(text, str) or not is_visible(text):
        found = f"{label}.prompt = {shown(text)}" if "prompt" in entry else f"{label} has no prompt"
        problems.append(Problem(found, "a prompt, as text"))
    if not isinstance(typed, list) or not all(isinstance(path, str) and is_visible(path) for path in typed):
        problems.append(Problem(f"{label}.references = {shown(typed)}", 'a list of paths, ["a.png"]'))
        typed = []
    paths = []
    for path in typed:
        try:
            paths.append(joined(around.folder, filled(path, around.names, around.environ)))
        except ValueError as error:
            problems.append(Problem(f"{label}.references = {shown(path)}: {error}"))
            continue
        refused = None if around.rule is None else around.rule("references", paths[-1])
        if refused is not None:
            paths.pop()
            problems.append(replace(refused, found=f"{label}.{refused.found}", key=""))
    ConfigError.raise_if([*problems, *reference_faults(f"{label}.references", tuple(paths))])
    return Prompt(str(text), tuple(paths))


_OBJECT = '{"prompt": "text", "references": ["a.png"]}'


def _as_read(name: str) -> str:
    """Equal for names that a file system may take for one: other case, accents composed differently."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
